"""The benchmarks themselves: the gates catch wrong results, the records hold what they promise, every command runs."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.kernels import DEVICE

from bench import __main__ as command
from bench import checkout, compare, e2e, micro, plots, quality, readme, record, summary, table, timing
from bench.accuracy import WrongResult
from bench.workloads import WORKLOADS, base
from vtc import ops, tiny
from vtc.methods import METHODS
from vtc.methods.vtc_cls import VTCCLS
from vtc.tiny import evaluate
from vtc.tiny.evaluate import Answers, answer, batches
from vtc.tiny.scenes import FAMILIES, balanced_questions

CPU = torch.device("cpu")
MODEL = base.SMALL_MODELS[1]
QUICK = micro.Options(models=("small",), batches=(1,), keeps=(8,), rep_ms=1.0, providers=("reference", "sdpa+row"))


def inputs_of(op, dtype=torch.float32, device=CPU):
    shape = MODEL.shape(2, 8)
    return shape, WORKLOADS[op].make(shape, dtype, device)


def make_record(host=(1.0, 2.0, 4.0), device_ms=None, **changes):
    times = timing.Times(host, device_ms, None if device_ms else "no GPU")
    values = dict(
        suite="micro", op="topk", model="small", shape={"B": 1}, dtype="fp32", backend="reference",
        times=times, moved=10**6, copy=10.0, peak_bytes=None, sdpa=None, device=CPU,
    )  # fmt: skip
    return record.make(**values | changes)


# --- workloads and their gates ---------------------------------------------------------------------------------------


def test_every_operation_has_a_workload():
    assert set(WORKLOADS) == {*ops.OPS, "select"}


@pytest.mark.parametrize("op", WORKLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_provider_passes_its_gate(op, dtype):
    """The Triton ones in the interpreter, those of torch.compile without compiling."""
    _, inputs = inputs_of(op, dtype, DEVICE)
    providers = WORKLOADS[op].providers()
    assert {"triton", "reference", "compiled"} <= set(providers)
    if op in ("cls_attention", "row_scores", "select"):
        assert {"sdpa+row", "full-weights"} <= set(providers)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for provider in providers.values():
            WORKLOADS[op].check(inputs, provider(*inputs))


def altered(result, path, change):
    """`result` with the tensor at `path` replaced by what `change` makes of it."""
    if not path:
        return change(result.clone())
    return tuple(altered(part, path[1:], change) if i == path[0] else part for i, part in enumerate(result))


def first_row(value):
    def change(x):
        x[0] = value
        return x

    return change


WRONG = {
    "cls_attention": [((0,), first_row(0)), ((1,), lambda x: x * 1.001), ((0,), lambda x: x.transpose(1, 2))],
    "row_scores": [((), lambda x: x * 1.001), ((), first_row(float("nan"))), ((), lambda x: x[:, :-1])],
    "topk": [((), lambda x: x.flip(1)), ((), lambda x: x + 1), ((), lambda x: x.int())],
    "compact": [((), first_row(0)), ((), lambda x: x.flip(1)), ((), lambda x: x[:, :-1])],
    "compact_kv": [((0, 1), first_row(0)), ((1, 0), lambda x: x.flip(2)), ((1, 1), lambda x: x.half())],
    "merge_neighbors": [
        ((0,), first_row(0)),
        ((1,), lambda x: x * (torch.arange(x.shape[2]) > 3)),
        ((1,), lambda x: x.roll(1, dims=2)),
    ],
    "merge_nearest": [
        ((0,), first_row(0)),
        ((1,), lambda x: x * (torch.arange(x.shape[2]) > 3)),
        ((1,), lambda x: x.roll(1, dims=1)),
    ],
    "select": [
        ((0,), first_row(0)),
        ((1,), lambda x: x * 1.001),
        ((2,), lambda x: x.flip(1)),
        ((2,), lambda x: (x[:, :1] + torch.arange(x.shape[1])) % 30),
        ((3,), lambda x: x.flip(1)),
    ],
}


@pytest.mark.parametrize(("op", "number"), [(op, i) for op, wrong in WRONG.items() for i in range(len(wrong))])
def test_the_gate_refuses_a_wrong_result(op, number):
    _, inputs = inputs_of(op)
    result = WORKLOADS[op].providers()["reference"](*inputs)
    WORKLOADS[op].check(inputs, result)
    with pytest.raises(WrongResult):
        WORKLOADS[op].check(inputs, altered(result, *WRONG[op][number]))


def test_the_gate_sees_layers_that_changed_places():
    """No two layers of a cache are alike, keys or values."""
    _, inputs = inputs_of("compact_kv")
    keys, values = WORKLOADS["compact_kv"].providers()["reference"](*inputs)
    for wrong in ((keys[::-1], values), (keys, values[::-1]), (values, keys)):
        with pytest.raises(WrongResult):
            WORKLOADS["compact_kv"].check(inputs, wrong)


def nbytes(x):
    return x.nbytes if isinstance(x, torch.Tensor) else sum(map(nbytes, x)) if isinstance(x, (tuple, list)) else 0


@pytest.mark.parametrize("op", ["cls_attention", "topk"])
def test_bytes_are_those_of_inputs_and_outputs(op):
    shape, inputs = inputs_of(op)
    result = WORKLOADS[op].providers()["reference"](*inputs)
    assert WORKLOADS[op].bytes_moved(shape, 4) == nbytes(inputs) + nbytes(result)


@pytest.mark.parametrize("op", ["compact", "compact_kv"])
def test_bytes_of_a_gather_are_its_output_twice_and_the_indices(op):
    shape, inputs = inputs_of(op)
    result = WORKLOADS[op].providers()["reference"](*inputs)
    assert WORKLOADS[op].bytes_moved(shape, 4) == 2 * nbytes(result) + inputs[-1].nbytes


def test_bytes_of_row_scores_are_one_query_row_all_keys_and_the_scores():
    shape, (query, key) = inputs_of("row_scores")
    result = WORKLOADS["row_scores"].providers()["reference"](query, key)
    assert WORKLOADS["row_scores"].bytes_moved(shape, 4) == query[:, :, 0].nbytes + key.nbytes + result.nbytes


def test_shapes_are_those_of_the_models():
    """LLaVA-1.5: 24 x 24 patches and [CLS], 16 heads of 64; Llama-2-7B: 32 layers, 32 heads of 128."""
    assert base.MODELS[0].shape(4, 64) == {
        "B": 4, "T": 1, "N": 577, "H": 16, "D": 64, "L": 32, "G": 32, "F": 128, "K": 64
    }  # fmt: skip
    work = WORKLOADS["select"]
    pairs = micro.sizes(work, micro.Options(), on_gpu=True)
    assert {b for b, _ in pairs} == {1, 4, 16, 64}
    assert {k for _, k in pairs} == {32, 64, 128, 192, 256}
    assert len(pairs) == 8
    assert len(micro.sizes(work, micro.Options(full=True), on_gpu=True)) == 20


# --- records ---------------------------------------------------------------------------------------------------------


def test_a_record_holds_its_provenance(tmp_path):
    one = make_record()
    assert set(record.FIELDS) == set(dataclasses.asdict(one))
    assert (one.ms_20, one.ms_50, one.ms_80) == (1.0, 2.0, 4.0)
    assert one.gb_per_s == pytest.approx(0.5)  # 1e6 bytes in 2 ms
    assert one.copy_share == pytest.approx(0.05)
    assert one.torch == torch.__version__
    assert one.device == "cpu"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", one.date)
    record.append(tmp_path / "micro.jsonl", [one])
    record.append(tmp_path / "micro.jsonl", [one])
    assert record.read(tmp_path / "micro.jsonl") == [one, one]


def test_the_revision_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.delenv("VTC_REVISION", raising=False)
    assert record.git_state(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "1")
    assert record.git_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "another").touch()
    assert record.git_state(tmp_path) == (git("rev-parse", "HEAD"), True)
    monkeypatch.setenv("VTC_REVISION", "c27cee3")  # files copied over an older .git, or without one
    assert record.git_state(tmp_path) == ("c27cee3", None)


def test_speed_ups_are_against_every_other_and_losses_stay():
    fast, slow = make_record(backend="fast"), make_record(backend="slow", host=(2.0, 8.0, 9.0))
    text = table.tables([fast, slow])
    assert re.search(r"\| fast +\| 1000.0 +\| 2000.0 +\| 4000.0 +\|.*\| +\| 4.00 +\|$", text, re.MULTILINE)
    assert re.search(r"\| slow +\| 2000.0 +\| 8000.0 +\| 9000.0 +\|.*\| 0.25", text)


def test_speed_ups_are_the_devices_where_there_is_a_device_time():
    fast = make_record(backend="fast", host=(9.0, 9.0, 9.0), device_ms=(1.0, 2.0, 3.0))
    slow = make_record(backend="slow", host=(9.0, 9.0, 9.0), device_ms=(1.0, 3.0, 3.0), sdpa="cudnn")
    text = table.tables([fast, slow])
    assert re.search(r"\| fast .*\| 9000.0 +\| 9000.0 +\| 1000.0 +\| 2000.0 +\| 3000.0 +\|.*\| 1.50 +\|$", text, re.M)
    assert "| slow (cudnn) |" in text
    assert fast.gb_per_s == pytest.approx(0.5)  # 1e6 bytes in the device's 2 ms


def test_variants_with_fewer_visual_tokens_stand_beside_the_stock_model():
    stock = make_record(suite="e2e", op="prefill", backend="sdpa", shape={"B": 4, "visual": 576, "text": 40})
    other = make_record(suite="e2e", op="prefill", backend="vtc 64", shape={"B": 4, "visual": 64, "text": 40})
    larger = make_record(suite="e2e", op="prefill", backend="sdpa", shape={"B": 16, "visual": 576, "text": 40})
    assert table.case(stock) == table.case(other) != table.case(larger)


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    """A writer may be killed within its line, and another one goes on in the same file."""
    path = tmp_path / "micro.jsonl"
    one = make_record()
    record.append(path, [one])
    path.write_text(path.read_text() + path.read_text()[:70])
    record.append(path, [{"job": "topk", "failed": "killed"}])
    record.append(path, [one])
    assert record.read(path) == [one, one]
    assert record.failures(path) == {"topk": "killed"}
    assert record.read(tmp_path / "none.jsonl") == []


# --- times -----------------------------------------------------------------------------------------------------------


def test_times_have_seven_samples_or_more_in_order():
    calls = []
    times = timing.measure([lambda: calls.append(1)], CPU, rep_ms=0.0)
    assert 0 <= times.host[0] <= times.host[1] <= times.host[2]
    assert len(calls) == 1 + timing.SAMPLES == 8
    assert (times.device, times.why) == (None, "no GPU")


def test_inputs_take_turns():
    seen = []
    timing.measure([lambda: seen.append("a"), lambda: seen.append("b")], CPU, rep_ms=0.0)
    assert "".join(seen) == "ab" + "abababa"


def test_what_a_call_is_compared_with_takes_turns_with_it(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "host_ms", lambda call, device: call() or 2.0)
    times = timing.measure([lambda: seen.append("a")], CPU, rep_ms=0.0, other=lambda: seen.append("b") or 6.0)
    assert "".join(seen) == "ab" + 7 * "ba"
    assert times.host == (2.0, 2.0, 2.0)
    assert times.speedup == (3.0, 3.0, 3.0)


def test_a_played_graph_gives_a_time_and_refuses_what_a_capture_refuses():
    x = torch.randn(64, 64)
    times = timing.measure([lambda: x @ x], CPU, rep_ms=1.0, played=True)
    assert 0 < times.device[0] <= times.device[1] <= times.device[2]
    assert times.why is None
    for waits, name in (
        (lambda: x.sum().item(), "_local_scalar_dense"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: x[x > 0], "index"),
        (lambda: torch.equal(x, x), "equal"),
    ):
        times = timing.measure([waits], CPU, rep_ms=1.0, played=True)
        assert times.device is None
        assert times.why == f"not captured: RuntimeError: aten.{name} would wait for the GPU"
        assert times.host[1] > 0


def test_the_sdpa_that_ran_is_known():
    query = torch.randn(1, 2, 8, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert timing.sdpa_backend(lambda: sdpa(query, query, query)) == "flash (CPU)"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert timing.sdpa_backend(lambda: sdpa(query, query, query)) == "math"
    assert timing.sdpa_backend(lambda: query @ query.mT) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
def test_a_captured_graph_on_a_gpu():
    x = torch.randn(64, 64, device=DEVICE)
    times = timing.measure([lambda: x @ x], DEVICE, rep_ms=1.0)
    assert 0 < times.device[1] < times.host[1]
    assert timing.measure([lambda: x.sum().item()], DEVICE, rep_ms=1.0).device is None
    assert (x + 1).sum().isfinite()  # a capture that failed leaves the GPU usable


# --- commands --------------------------------------------------------------------------------------------------------


def test_micro_times_every_operation_on_a_cpu(tmp_path):
    said = []
    assert micro.run(QUICK, CPU, tmp_path / "micro.jsonl", said.append) == 0
    records = record.read(tmp_path / "micro.jsonl")
    assert {r.op for r in records} == set(WORKLOADS)
    assert {r.backend for r in records if r.op == "select"} == {"reference", "sdpa+row"}
    assert "no GPU: torch providers on small shapes; Triton timings need a GPU" in said
    assert all(r.ms_20 <= r.ms_50 <= r.ms_80 and r.bytes > 0 for r in records)


def test_a_wrong_or_broken_provider_gets_no_number(tmp_path, monkeypatch):
    def broken(scores, k):
        raise RuntimeError("out of memory")

    providers = {"reference": lambda scores, k: scores.sum(0).topk(k).indices, "broken": broken}
    monkeypatch.setattr(WORKLOADS["topk"], "providers", lambda: providers | {"torch.topk": right["torch.topk"]})
    right = type(WORKLOADS["topk"])().providers()
    said = []
    options = micro.Options(ops=("topk",), models=("small",), batches=(1,), keeps=(8,), rep_ms=1.0)
    assert micro.run(options, CPU, tmp_path / "micro.jsonl", said.append) == 1
    assert [r.backend for r in record.read(tmp_path / "micro.jsonl")] == ["torch.topk"]
    assert "2 without a number" in said[-1]
    assert re.search(r"B=1 T=1 N=145 K=8 reference: WrongResult: indices", said[-1])
    assert "broken: RuntimeError: out of memory" in said[-1]
    assert list(record.failures(tmp_path / "micro.jsonl").values())[1] == "RuntimeError: out of memory"


def test_micro_leaves_out_what_it_has_no_time_for(tmp_path):
    said = []
    assert micro.run(dataclasses.replace(QUICK, budget=0.0), CPU, tmp_path / "micro.jsonl", said.append) == 1
    assert re.fullmatch(r"left out, the time is up: \d+ numbers", said[-1])
    assert not (tmp_path / "micro.jsonl").exists()


@pytest.fixture
def small_images(monkeypatch):
    """144 tokens instead of 576."""
    build = e2e.build
    monkeypatch.setattr(e2e, "build", lambda device, image_size: build(device, 168))


def test_decoding_leaves_the_prompts_own_cache(small_images):
    """Or a captured graph would read tensors that its own capture has made."""
    bench = e2e.Bench(CPU, 168)
    with bench.running(e2e.VARIANTS[1]) as model:
        stages = bench.stages(model, 1, e2e.VARIANTS[1])
        before = [(layer.keys, layer.values) for layer in stages.cache.layers]
        first, second = stages.decode(), stages.decode()
    assert torch.equal(first, second)
    assert stages.cache.get_seq_length() == stages.embeds.shape[1]
    for layer, (keys, values) in zip(stages.cache.layers, before, strict=True):
        assert layer.keys is keys
        assert layer.values is values


def test_e2e_times_every_stage(tmp_path, small_images):
    said = []
    assert e2e.run(CPU, (1,), tmp_path / "e2e.jsonl", rep_ms=1.0, say=said.append) == 0
    records = record.read(tmp_path / "e2e.jsonl")
    variants = {stage: {r.backend for r in records if r.op == stage} for stage in e2e.STAGES}
    assert variants.pop("select") == {"vtc 128", "vtc 64"}
    for stage in ("first token, new length", "generate"):
        assert variants.pop(stage) == {"sdpa", "vtc 64", "sdpa, no cudnn", "vtc 64, no cudnn"}
    assert {r.sdpa for r in records if r.op in ("vision", "prefill", "decode")} == {"flash (CPU)"}
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert all(found == {"sdpa", "vtc 128", "vtc 64"} for found in variants.values())
    assert {r.shape["visual"] for r in records} == {144, 128, 64}
    assert {r.backend for r in records if r.speedup_50 is None and r.op != "select"} == {"sdpa", "sdpa, no cudnn"}
    assert sum("of the stock tower" in line for line in said) == 2


def test_e2e_compares_with_the_stock_model_in_turn(small_images):
    bench, (_, _, variant) = e2e.Bench(CPU, 168), e2e.VARIANTS
    prompts = []
    language = bench.model[2].model.language_model
    language.register_forward_pre_hook(
        lambda *call: prompts.append(call[2]["inputs_embeds"].shape[1]), with_kwargs=True
    )
    (made,) = bench.number(1, variant, "first token", rep_ms=0.0, played=False)
    assert str(timing.SAMPLES * [40 + 144, 40 + 64])[1:-1] in str(prompts)
    assert made.speedup_20 <= made.speedup_50 <= made.speedup_80


def test_a_stock_model_that_fails_costs_no_other_number(monkeypatch, small_images):
    prefill = e2e.Stages.prefill
    monkeypatch.setattr(e2e.Stages, "prefill", lambda stages: prefill(stages) if stages.keep else 1 / 0)
    bench = e2e.Bench(CPU, 168)
    (made,) = bench.number(1, e2e.VARIANTS[2], "projector", rep_ms=0.0, played=False)
    assert made.speedup_50 is None
    with pytest.raises(ZeroDivisionError):
        bench.number(1, e2e.VARIANTS[0], "projector", rep_ms=0.0, played=False)


def test_e2e_gives_no_number_for_the_wrong_patches(tmp_path, monkeypatch, small_images):
    select = VTCCLS.select
    monkeypatch.setattr(VTCCLS, "select", lambda *args: (select(*args)[0], -select(*args)[1]))
    said = []
    assert e2e.run(CPU, (1,), tmp_path / "e2e.jsonl", rep_ms=1.0, say=said.append) == 1
    assert {r.backend for r in record.read(tmp_path / "e2e.jsonl")} == {"sdpa", "sdpa, no cudnn"}
    refused = [line for line in said if line.startswith("NO NUMBER: B=1 vtc")]
    assert len(refused) == 6 + 6 + 2 + 2  # every stage of every variant
    assert all("WrongResult: " in line for line in refused)


def test_micro_refuses_more_tokens_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="keep must be less than the 145 tokens of small, got 145"):
        micro.run(dataclasses.replace(QUICK, keeps=(145,)), CPU, None)


def test_inputs_are_as_many_as_take_twice_the_cache(monkeypatch):
    about = SimpleNamespace(L2_cache_size=50 * 10**6, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    sets = {
        needed: micro.number_of_sets(needed, torch.device("cuda"))
        for needed in (10**4, 10**7, 10**9, 2 * 10**10, 10**11)
    }
    assert list(sets.values()) == [64, 10, 4, 1, 0]


def test_compiled_providers_are_timed_when_asked_for():
    def providers(options):
        return {job.name.split()[-1] for job in micro.jobs(options, CPU)}

    assert "compiled" not in providers(micro.Options())
    assert providers(micro.Options(providers=("compiled",))) == {"compiled"}
    assert micro.jobs(micro.Options(), CPU)[0].name.startswith("select small fp32")


def test_compare_takes_the_median_of_both_rounds():
    old = [make_record((1, ms, 9)) for ms in (4.0, 8.0)]
    new = [make_record((1, ms, 9)) for ms in (1.0, 2.0)]
    (row,) = compare.compare(old, [*new, make_record(backend="another")])
    assert row[-3:] == ["6000.0", "1500.0", "4.00"]


@pytest.mark.skipif(not (checkout.ROOT / ".git").exists(), reason="no .git here")
def test_a_revision_is_checked_out_and_cleaned_up():
    with checkout.revision("HEAD") as root:
        assert (root / "kernels" / "topk.py").exists()
        code = "import os, bench, vtc; from vtc_kernels import topk\n"
        code += "print(*(os.path.realpath(module.__file__) for module in (vtc, topk, bench)))"
        status, output = checkout.run(["-c", code], root)
        assert status == 0, output
        expected = [root / "vtc/__init__.py", root / "kernels/topk.py", checkout.ROOT / "bench/__init__.py"]
        assert [Path(path) for path in output.split()] == [path.resolve() for path in expected]
    assert not root.exists()
    with pytest.raises(ValueError, match="cannot check out 'no-such-revision'"), checkout.revision("no-such-revision"):
        pass


def test_plots_are_drawn_for_light_and_dark_pages(tmp_path):
    records = [
        make_record((1.0, ms * batch, 99.0), op=op, backend=backend, shape={"B": batch, "K": 64})
        for op in ("topk", "compact")
        for backend, ms in (("triton", 1.0), ("reference", 3.0))
        for batch in (1, 4)
    ]
    light, dark = plots.draw(records, tmp_path / "micro")
    assert (light.name, dark.name) == ("micro-light.svg", "micro-dark.svg")
    assert light.read_text() != dark.read_text()
    for word in ("topk", "compact", "triton", "reference", "small, CPU"):
        assert f"<!-- {word} -->" in light.read_text()
    assert light.read_bytes() == plots.draw(records, tmp_path / "again")[0].read_bytes()
    with pytest.raises(ValueError, match="no records to plot"):
        plots.draw([], tmp_path / "none")


def test_the_command_writes_records_and_plots(tmp_path, capsys):
    arguments = ["--op", "topk", "compact", "--batch", "1", "2", "--keep", "8", "--rep-ms", "1", "--device", "cpu"]
    arguments += ["--provider", "reference", "torch.topk", "gather", "--model", "small"]
    assert command.main(["micro", *arguments, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"micro.jsonl", "micro-light.svg", "micro-dark.svg"}
    lines = (tmp_path / "micro.jsonl").read_text().splitlines()
    assert {json.loads(line)["shape"]["B"] for line in lines} == {1, 2}
    assert "x torch.topk" in capsys.readouterr().out
    assert command.main(["plot", str(tmp_path / "micro.jsonl"), "--out", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["micro", "--op", "sort"], "unknown op sort; there are select, cls_attention, row_scores, topk"),
        (["micro", "--model", "GPT"], "unknown model GPT; there are"),
        (["micro", "--dtype", "int8"], "unknown dtype int8; there are fp16, bf16, fp32"),
        (["compare", "no-such-revision"], "cannot check out 'no-such-revision'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_explains_what_cannot_be(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_one_says_what_to_run(tmp_path, capsys):
    assert command.main(["gpu", "--out", str(tmp_path)]) == 2
    assert "bench gpu needs a GPU" in capsys.readouterr().err


def test_help_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--help"], cwd=checkout.ROOT, capture_output=True, text=True, check=True
    )
    for name in command.COMMANDS:
        assert name in done.stdout


# --- quality ---------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_textbook():
    """Newcombe (1998): 81 of 263 is 0.2553 to 0.3662 by Wilson's method."""
    assert quality.wilson(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    assert quality.wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=1e-4)
    ours, theirs = [True] * 40 + [False] * 60, [True] * 30 + [False] * 10 + [True] * 2 + [False] * 58
    half = 1.96 * (10 + 2 - 8**2 / 100) ** 0.5 / 100
    assert quality.paired(ours, theirs) == pytest.approx((0.08, 0.08 - half, 0.08 + half))
    assert quality.paired(ours, ours) == (0.0, 0.0, 0.0)


def test_quality_asks_every_method_the_same_questions(tmp_path, monkeypatch):
    """The model's part is played: it is right wherever enough tokens are kept, and random does worse."""

    asked = balanced_questions("val", 50)

    def play(model, processor, batches, method="", keep=0, ensemble="sum", **options):
        share = {"vtc-cls": 0.8, "random": 0.2, "prumerge": 0.6, "": 1.0}[method]
        known = round(share * 50 * (0.5 if ensemble == "min" else 1))
        texts = [question.answer if i < known else "?" for i, (_, question) in enumerate(asked)]
        return Answers(texts, {"": None, "prumerge": 29.3}.get(method, float(keep)), 1.0)

    monkeypatch.setattr(quality, "batches", lambda model, processor, asked: ["all of them"])
    monkeypatch.setattr(quality, "answer", play)
    said = []
    records = quality.run(
        50,
        (64, 16),
        ("vtc-cls", "prumerge", "random"),
        tmp_path / "quality.jsonl",
        sweep=True,
        split="val",
        say=said.append,
    )
    assert [(r.name, r.keep, r.tokens) for r in records[:8]] == [
        *(("all tokens", 576, 576), ("vtc-cls", 64, 64), ("vtc-cls", 16, 16), ("prumerge", 64, 29.3)),
        *(("random", 64, 64), ("random", 16, 16), ("vtc-cls prune_layer=2", 64, 64), ("vtc-cls prune_layer=2", 16, 16)),
    ]
    full, ours, _, _, random = records[:5]
    assert (full.accuracy[0], ours.accuracy[0], random.accuracy[0]) == (1.0, 0.8, 0.2)
    assert (full.agreement, ours.difference) == (None, None)
    assert random.agreement == quality.wilson(10, 50)
    assert random.difference == quality.paired([True] * 10 + [False] * 40, [True] * 40 + [False] * 10)
    assert {f for r in records for f in r.families} == {"existence", "attribute", "relation", "counting", "digit"}
    swept = [next(iter(r.options.items())) for r in records[8:]]
    assert swept == [("ensemble_layers", n) for n in (1, 2, 4, 5)] + [("ensemble", e) for e in ("mean", "max", "min")]
    text = quality.tables(records)
    assert re.search(r"\| random +\| 20\.0 ± ", text)
    assert re.search(r"\| prumerge +\| 60\.0 ± \d+\.\d \(29 tokens\) \| +\|", text)
    methods, settings = re.findall(r"^Against vtc-cls .* own\): (.*)$", text, re.MULTILINE)
    assert methods == "worse: prumerge, random; not told apart: vtc-cls prune_layer=2."
    assert settings.startswith("worse: vtc-cls ensemble=min; not told apart: vtc-cls ensemble_layers=1, ")
    read = quality.read(tmp_path / "quality.jsonl")
    assert [(r.name, r.keep, r.accuracy[0]) for r in read] == [(r.name, r.keep, r.accuracy[0]) for r in records]
    light, dark = plots.draw_quality(read, tmp_path / "quality")
    assert "<!-- random -->" in light.read_text()
    assert light.read_text() != dark.read_text()


@pytest.mark.parametrize(
    "setting", [{"method": "vtc-cls"}, {"method": "visionzip"}, {"method": "fastv"}, {"method": "pool"}]
)
def test_quality_runs_the_vision_tower_once_and_changes_nothing(setting):
    model, processor = tiny.load(attn_implementation="sdpa")
    asked = balanced_questions("val", 6)
    prepared = batches(model, processor, asked, 3)
    runs = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: runs.append(1))
    said = quality._answers(model, processor, prepared, (64, 16), **setting)
    assert len(runs) == len(prepared)
    for keep in (64, 16):
        alone = answer(model, processor, prepared, keep=keep, **setting)
        assert (said[keep].texts, said[keep].tokens) == (alone.texts, alone.tokens)
    assert len(runs) == 3 * len(prepared)


def test_quality_measures_the_bundled_model(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- quality -->\n<!-- /quality -->\n")
    arguments = ["--questions", "5", "--keep", "64", "--method", "random", "--split", "val", "--readme", str(page)]
    assert command.main(["quality", *arguments, "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"quality.jsonl", "quality-light.svg", "quality-dark.svg"}
    assert "| all tokens |" in capsys.readouterr().out
    assert "| random     |" in page.read_text()
    assert command.main(["quality", "--method", "best"]) == 2
    assert "unknown method best; there are" in capsys.readouterr().err


# --- README ----------------------------------------------------------------------------------------------------------


def test_the_readmes_comparison_of_methods_is_what_was_recorded():
    """And of the model that is bundled now, with every method at every number of tokens."""
    records = quality.read(checkout.ROOT / "bench/results/quality/quality.jsonl")
    assert quality.tables(records) in (checkout.ROOT / "README.md").read_text()
    assert {r.checkpoint for r in records} == {quality.provenance(1000, "test")["checkpoint"]}
    assert all(r.questions >= 1000 and not r.dirty for r in records)
    made = [(r.method, r.options, r.keep) for r in records[1:]]
    settings = quality._settings(quality.KEEPS, METHODS, True, 6)
    assert made == [(name, options, keep) for name, options, keeps in settings for keep in keeps]


H100 = checkout.ROOT / "bench/results/h100"


def test_what_is_said_of_the_h100_is_what_was_recorded():
    said = (H100 / "README.md").read_text()
    whole = record.read(H100 / "second/e2e.jsonl")
    for text in (said, (checkout.ROOT / "README.md").read_text()):
        assert summary.first_tokens(whole) in text
    single = [r for run in ("first", "second") for r in record.read(H100 / run / "micro.jsonl")]
    rows = re.findall(r"^\| `(\w+)`.*?" + 4 * r"\| ([\d.() ]*) ?" + r"\|$", said, re.MULTILINE)
    assert {op for op, *_ in rows} == set(WORKLOADS)
    for op, *cells in rows:
        for batch, cell in zip((1, 4, 16, 64), cells, strict=True):
            times = {  # the second run's, if both have one
                r.backend: f"{1e3 * r.ms:.1f}"
                for r in single
                if (r.suite, r.op, r.model, r.shape["B"], r.shape.get("K", 64)) == ("micro", op, "LLaVA-1.5", batch, 64)
            }
            ours = [times.pop(name) for name in ("triton", "triton-fused") if name in times]
            assert cell.strip() == (f"{ours[0]} ({min(times.values(), key=float)})" if ours else "")
    tests = [line["outcome"] for line in record.lines(H100 / "second/tests.jsonl") if "outcome" in line]
    assert f"{tests.count('passed')} passed, none failed, {tests.count('skipped')} skipped" in said
    assert set(tests) == {"passed", "skipped"}


def test_the_models_card_agrees_with_the_records():
    """Two measurements of the same questions; answers may differ where another batch rounds another way."""
    records = {
        (r.method, r.keep): r
        for r in quality.read(checkout.ROOT / "bench/results/quality/quality.jsonl")
        if not r.options
    }
    card = (tiny.CHECKPOINT / "README.md").read_text()
    for name, setting in evaluate.SETTINGS:
        r = records[setting.get("method", "vtc-cls") if setting else "all tokens", setting.get("keep", 576)]
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", card, re.MULTILINE)
        shares = [r.accuracy[0], *(r.families[family][0] for family in FAMILIES)]
        assert [float(cell) for cell in row.split(" | ")] == pytest.approx([100 * share for share in shares], abs=0.5)


def test_the_readmes_table_of_kernels_is_current(tmp_path):
    readme = (checkout.ROOT / "README.md").read_text()
    (shown,) = re.findall(r"<!-- kernels -->\n(.*?)\n<!-- /kernels -->", readme, re.DOTALL)
    assert shown == readme.kernels(), "run: python -m bench kernels --readme README.md"
    assert [line.split("`")[1] for line in shown.splitlines()[2:]] == list(ops.OPS)
    copy = tmp_path / "README.md"
    copy.write_text(readme.replace(shown, "old"))
    assert command.main(["kernels", "--readme", str(copy)]) == 0
    assert copy.read_text() == readme


def test_every_operation_of_the_table_must_be_complete(monkeypatch):
    monkeypatch.delitem(WORKLOADS, "compact")
    with pytest.raises(ValueError, match="compact lacks a workload"):
        readme.kernels()

"""The last page of `bench gpu`: what is right, wrong, fast, slow, and not reached."""

import re

from support.bench import CHECKED, make_record

from bench import attention, record, summary
from bench.summary import Ran
from bench.watch import Outcome


def on_gpu(op, backend, ms, host_ms, shape=None, **changes):
    one = make_record(
        (host_ms,) * 3, device_ms=(ms,) * 3, op=op, backend=backend, shape=shape or {"B": 1, "K": 64}, **changes
    )
    one.device, one.gpu = "cuda", "NVIDIA H100"
    return one


def test_the_page_says_what_is_right_wrong_fast_and_slow(tmp_path):
    record.append(tmp_path / "probe.jsonl", [{"probe": "gpu", "value": {"name": "NVIDIA H100", "capability": "9.0"}}])
    checked = {**vars(CHECKED), "errors": {"scores": (9e-8, 1e-7), "attention": (1e-8, 1e-7)}}
    record.append(tmp_path / "gate.jsonl", [vars(CHECKED), checked])
    micro_records = [
        on_gpu("select", "triton", 0.05, 0.9), on_gpu("select", "sdpa+row", 0.1, 0.3),
        on_gpu("topk", "triton", 0.04, 0.1), on_gpu("topk", "torch.topk", 0.02, 0.1),
        on_gpu("cls_attention", "triton 64x64 w4 s2", 0.08, 0.2, {"B": 16, "D": 64}, dtype="bf16", suite="attention"),
        on_gpu("cls_attention", "triton", 0.12, 0.2, {"B": 16, "D": 64}, dtype="bf16", suite="attention"),
        on_gpu("cls_attention", "sdpa+cls_probs", 0.09, 0.2, {"B": 16, "D": 64}, dtype="bf16", suite="attention"),
    ]  # fmt: skip
    record.append(tmp_path / "micro.jsonl", micro_records)
    stages = [
        on_gpu(stage, name, ms, ms + 10, {"B": 1, "visual": visual, "text": 40}, suite="e2e")
        for stage in ("vision", "projector", "prefill")
        for name, visual, ms in (("sdpa", 576, 4.0), ("vtc 64", 64, 2.0))
    ]
    for name, ms in (("sdpa", 30.0), ("vtc 64", 40.0)):
        shape = {"B": 1, "visual": 64, "text": 40}
        stages.append(make_record((ms,) * 3, op="generate", backend=name, shape=shape, suite="e2e"))
    record.append(tmp_path / "e2e.jsonl", stages)
    tests = [{"collected": 5}, {"test": "t.py::a[1]", "outcome": "failed", "reason": "E   AssertionError: error 3 > 2"}]
    tests += [{"test": "t.py::a[2]", "outcome": "failed", "reason": "x"}, {"test": "t.py::b", "outcome": "passed"}]
    record.append(tmp_path / "tests.jsonl", tests)
    gated = Outcome(names=["one", "two", "three", "four"], failed={"three": "WrongResult: x"}, left=["four"])
    ran = {
        "gate": Ran(outcome=gated, failed=gated.failed, seconds=9.6, allowed=20),
        "tests": Ran(failed=summary.tests(tmp_path / "tests.jsonl").failed, idle="BUSY: processes 7"),
    }
    page = summary.page(tmp_path, ran, ["gate", "ncu", "tests"])
    head, *parts = re.split(r"\n\n(?=[A-Z ]{4,})", page)
    assert head.startswith("name NVIDIA H100")
    sections = {part.split("\n")[0].split(" (")[0]: part for part in parts}
    assert list(sections) == [
        *("RIGHT", "WRONG", "FAST", "SLOW", "TO PASTE", "NO DEVICE TIME", "NOT REACHED", "PARTS"),
    ]
    for section, line in {
        "RIGHT": "gate: 2 of 4 checks against float64 passed",
        "WRONG": "gate: three: WrongResult: x",
        "FAST": "select small fp32: B=1 2.00x (triton 50.0 us, sdpa+row 100.0; host 0.33x)",
        "SLOW": "topk small fp32: B=1 0.50x (triton 40.0 us, torch.topk 20.0; host 1.00x)",
        "NOT REACHED": "ncu: all of it",
        "PARTS": "gate: 10 of 20 s, 2 of 4 done, 1 failed, 1 not reached",
    }.items():
        assert line in sections[section], page
    assert "the largest error is 0.90 of what is allowed: scores of topk small fp32" in sections["RIGHT"]
    assert "MEASURED: ((9, 0), 64, 2): (64, 64, 4, 2)," in sections["TO PASTE"]
    assert "tests: 1 of 5 passed, 0 skipped" in sections["RIGHT"]
    assert "tests: t.py::a: 2 failed: AssertionError: error 3 > 2" in sections["WRONG"]
    assert "best triton 64x64 w4 s2 80.0 us (triton 120.0, sdpa+cls_probs 90.0)" in sections["FAST"]
    assert "vtc 64, vision + projector + prefill as graphs: B=1 12.00 -> 6.00 ms = 2.00x" in sections["FAST"]
    assert "vtc 64, prefill: B=1 4.00 -> 2.00 ms = 2.00x (host 1.17x)" in sections["FAST"]
    assert "vtc 64, generate: host: B=1 30.00 -> 40.00 ms = 0.75x" in sections["SLOW"]
    assert "tests: 2 of 5" in sections["NOT REACHED"]
    assert "gate: 1 numbers, from four to four" in sections["NOT REACHED"]
    assert "before it the GPU was BUSY: processes 7" in sections["PARTS"]
    without = summary.page(tmp_path, {"ncu": Ran(note="there is no ncu here")}, ["ncu"])
    assert "COUNTERS" not in without
    assert "ncu: 0 of 0 s, there is no ncu here" in without


def test_one_choice_of_blocks_for_all_batch_sizes():
    """Not the best of one batch size; and fused only if it is slower at none."""

    def sweep(backend, one, many):
        pairs = ((1, one), (16, many))
        shapes = [({"B": batch, "D": 64}, ms) for batch, ms in pairs if ms]
        return [on_gpu("cls_attention", backend, ms, 9.0, s, dtype="bf16", suite="attention") for s, ms in shapes]

    records = [
        *sweep("triton", 1.0, 9.0),
        *sweep("triton 64x64 w4 s2", 1.0, 9.0),
        *sweep("triton 64x64 w4 s3", 1.1, 8.0),
    ]
    records += sweep("triton 128x64 w8 s2", 0.5, None)  # not reached with 16
    assert attention.to_paste(records, None) == []
    assert attention.to_paste([], "9.0") == []
    assert attention.to_paste(records + sweep("sdpa+cls_probs", 1.1, 8.5), "9.0") == [
        "MEASURED: ((9, 0), 64, 2): (64, 64, 4, 3),",
        "FUSED: ((9, 0), torch.bfloat16, 64),",
    ]
    slower = attention.to_paste(records + sweep("sdpa+cls_probs", 1.0, 8.5), "9.0")
    assert slower[1] == "FUSED: not bf16, 64: slower than SDPA and cls_probs at B=1"
    assert attention.to_paste(records, "9.0")[1].endswith("at B=1, B=16")  # nothing to compare with

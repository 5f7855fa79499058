"""`bench e2e`: every stage is timed beside the stock model, after its gate."""

import pytest
import torch
from support.bench import CPU

from bench import e2e, record, roofline, speedups, timing
from bench.played import PlayedRecorder
from vtc.methods.vtc_cls import VTCCLS

STOCK, FEW = e2e.Variant(None), e2e.Variant(64)
SMALL = e2e.Options(("small LLaVA",), (1,), (128, 64), rep_ms=1.0, image_size=168)


def bench_of():
    return e2e.Bench("small LLaVA", CPU, 168)


@pytest.fixture
def small_images(monkeypatch):
    """144 tokens instead of 576."""
    build = e2e.build
    monkeypatch.setattr(e2e, "build", lambda name, device, image_size: build(name, device, 168))


def test_decoding_leaves_the_prompts_own_cache(small_images):
    """Or a captured graph would read tensors that its own capture has made."""
    bench = bench_of()
    with bench.running(FEW) as model:
        stages = bench.stages(model, 1, FEW)
        before = [(layer.keys, layer.values) for layer in stages.cache.layers]
        first, second = stages.decode(), stages.decode()
    assert torch.equal(first, second)
    assert stages.cache.get_seq_length() == stages.embeds.shape[1]
    for layer, (keys, values) in zip(stages.cache.layers, before, strict=True):
        assert layer.keys is keys
        assert layer.values is values


def test_e2e_times_every_stage(tmp_path, small_images):
    said = []
    assert e2e.run(CPU, SMALL, tmp_path / "e2e.jsonl", say=said.append) == 0
    records = record.read(tmp_path / "e2e.jsonl")
    variants = {stage: {r.backend for r in records if r.op == stage} for stage in e2e.STAGES}
    assert variants.pop("selection") == {"vtc 128", "vtc 64"}
    lengths = {"sdpa", "vtc 64", "sdpa, no cudnn", "vtc 64, no cudnn"}
    assert variants.pop("first token, new length") == lengths
    graphed = {"sdpa, graphs", "vtc 64, graphs"}
    for stage in ("generate 1", "generate 32"):
        assert variants.pop(stage) == lengths | {"vtc 128"} | graphed
    assert variants.pop("first token") == {"sdpa", "vtc 128", "vtc 64"} | graphed
    assert {r.sdpa for r in records if r.op in ("vision", "prefill", "decode")} == {"flash (CPU)"}
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert all(found == {"sdpa", "vtc 128", "vtc 64"} for found in variants.values())
    assert {r.shape["visual"] for r in records} == {144, 128, 64}
    assert {r.backend for r in records if r.speedup_50 is None and r.op != "selection"} == {"sdpa", "sdpa, no cudnn"}
    assert sum("of the stock tower" in line for line in said) == 2
    floors = {(r.op, r.backend): r.floor_ms for r in records}
    assert all(r.floor_ms > 0 and r.bound in roofline.BOUNDS and r.matmul_tflop_per_s > 0 for r in records)
    for stage in ("first token", "vision", "projector", "prefill", "generate 32"):
        assert floors[stage, "vtc 64"] < floors[stage, "vtc 128"] < floors[stage, "sdpa"] or stage == "vision"
    (line,) = [line for line in said if line.startswith("small LLaVA B=1 vtc 64: first token")]
    assert "; most of it is " in line
    assert "\n| floor us | bound by |" not in line
    assert any("| floor us | bound by" in text for text in said)


def test_e2e_compares_with_the_stock_model_in_turn(small_images):
    bench = bench_of()
    prompts = []
    for model in (bench.compressed, bench.stock[1]):
        model.model.language_model.register_forward_pre_hook(
            lambda *call: prompts.append(call[2]["inputs_embeds"].shape[1]), with_kwargs=True
        )
    (made,) = bench.number(1, FEW, "first token", rep_ms=0.0, played=False)
    assert str(timing.SAMPLES * [40 + 144, 40 + 64])[1:-1] in str(prompts)
    assert made.speedup_20 <= made.speedup_50 <= made.speedup_80


def test_graphs_are_timed_beside_both_baselines(small_images):
    bench = bench_of()
    made = []
    for variant in (STOCK, FEW, STOCK._replace(graphs=True), FEW._replace(graphs=True)):
        made += bench.number(1, variant, "generate 1", rep_ms=0.0, played=False)
    assert [r.backend for r in made] == ["sdpa", "vtc 64", "sdpa, graphs", "vtc 64, graphs"]
    assert [r.speedup_50 is None for r in made] == [True, False, False, False]
    (row,) = speedups.with_graphs(made).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:4] == ["small LLaVA", "generate 1", "1", "64"]
    assert cells[4:8] == [f"{made[place].ms_50:.1f}" for place in (0, 2, 1, 3)]
    assert cells[8:] == [f"{made[place].ms_50 / made[3].ms_50:.2f}x" for place in (0, 2)]


def test_graphs_that_replay_nothing_give_no_number(small_images, monkeypatch):
    monkeypatch.setattr(e2e, "play_graphs", lambda model: None)
    with pytest.raises(e2e.WrongResult, match="nothing was replayed"):
        bench_of().number(1, FEW._replace(graphs=True), "generate 1", rep_ms=0.0, played=False)


def test_graphs_that_are_wrong_give_no_number(small_images, monkeypatch):
    monkeypatch.setattr(PlayedRecorder, "record", lambda self, function, inputs, outputs: lambda: None)
    with pytest.raises(e2e.WrongResult, match="logits: relative error"):
        bench_of().number(1, FEW._replace(graphs=True), "generate 1", rep_ms=0.0, played=False)


def test_the_stock_model_shares_its_weights_and_is_never_enabled(small_images):
    bench = bench_of()
    _, stock = bench.stock
    with bench.running(FEW) as compressed:
        assert compressed is not stock
        assert compressed.model.vision_tower.config._attn_implementation == "vtc"
        assert stock.model.vision_tower.config._attn_implementation == "sdpa"
        with bench.running(STOCK) as model:
            assert model is stock
    pairs = zip(stock.parameters(), compressed.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


def test_a_stock_model_that_fails_costs_no_other_number(monkeypatch, small_images):
    prefill = e2e.Stages.prefill
    monkeypatch.setattr(
        e2e.Stages, "prefill", lambda stages, *embeds: prefill(stages, *embeds) if stages.keep else 1 / 0
    )
    bench = bench_of()
    (made,) = bench.number(1, FEW, "projector", rep_ms=0.0, played=False)
    assert made.speedup_50 is None
    with pytest.raises(ZeroDivisionError):
        bench.number(1, STOCK, "projector", rep_ms=0.0, played=False)


def test_e2e_gives_no_number_for_the_wrong_patches(tmp_path, monkeypatch, small_images):
    select = VTCCLS.select
    monkeypatch.setattr(VTCCLS, "select", lambda *args: (select(*args)[0], -select(*args)[1]))
    said = []
    assert e2e.run(CPU, SMALL, tmp_path / "e2e.jsonl", say=said.append) == 1
    assert {r.backend for r in record.read(tmp_path / "e2e.jsonl")} == {"sdpa", "sdpa, no cudnn", "sdpa, graphs"}
    refused = [line for line in said if line.startswith("NO NUMBER: small LLaVA B=1 vtc")]
    assert len(refused) == 9 + 9 + 1 + 3 + 3  # every stage of every variant
    assert all("WrongResult: " in line for line in refused)


def test_one_graph_gives_the_logits_of_the_model(small_images):
    bench = bench_of()
    for variant in (STOCK, FEW):
        with bench.running(variant) as model:
            stages = bench.stages(model, 2, variant)
            assert torch.allclose(stages.one_graph(), stages.first_token(), atol=1e-5)


def test_generation_makes_the_tokens_that_its_name_says(small_images):
    bench = bench_of()
    with bench.running(FEW) as model:
        stages = bench.stages(model, 1, FEW)
        made = [stages.call(f"generate {count}")().shape[1] - 40 - 144 for count in (1, 5)]
    assert made == [1, 5]


def test_options_have_defaults_and_refuse_what_is_not_there():
    few = e2e.Options.of(CPU)
    assert (few.models, few.batches, few.keeps) == (("small LLaVA",), (1, 4), (192, 128, 64, 32))
    many = e2e.Options.of(torch.device("cuda"))
    assert (many.models, many.batches) == (("LLaVA-1.5-7B", "LLaVA-1.5-13B"), (1, 4, 16, 64))
    with pytest.raises(ValueError, match=r"unknown model LLaVA-9; there are LLaVA-1.5-7B, LLaVA-1.5-13B, small LLaVA"):
        e2e.Options.of(CPU, models=("LLaVA-9",))
    with pytest.raises(ValueError, match="--keep must be below the 576 visual tokens of an image, got 576"):
        e2e.Options.of(CPU, keeps=(64, 576))


def test_each_model_takes_the_place_of_the_last(monkeypatch, small_images):
    alive = []

    def number(bench, batch, variant, stage, rep_ms, played):
        alive.append(bench)
        return []

    monkeypatch.setattr(e2e.Bench, "number", number)
    options = e2e.Options(("LLaVA-1.5-7B", "small LLaVA"), (1, 4), (64,))
    made = e2e.jobs(CPU, options)
    for job in made:
        job.run()
    assert [bench.name for bench in dict.fromkeys(alive)] == list(options.models)
    names = [job.name for job in made]
    assert len(set(names)) == len(names)
    assert names[0] == "LLaVA-1.5-7B B=1 sdpa vision"
    assert sum("new length" in name for name in names) == 2 * 4  # at the first batch size only

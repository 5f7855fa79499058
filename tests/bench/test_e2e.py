"""`bench e2e`: every stage is timed beside the stock model, after its gate."""

import pytest
import torch
from support.bench import CPU

from bench import e2e, record, timing
from vtc.methods.vtc_cls import VTCCLS


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
    for model in (bench.compressed, bench.stock[2]):
        model.model.language_model.register_forward_pre_hook(
            lambda *call: prompts.append(call[2]["inputs_embeds"].shape[1]), with_kwargs=True
        )
    (made,) = bench.number(1, variant, "first token", rep_ms=0.0, played=False)
    assert str(timing.SAMPLES * [40 + 144, 40 + 64])[1:-1] in str(prompts)
    assert made.speedup_20 <= made.speedup_50 <= made.speedup_80


def test_the_stock_model_shares_its_weights_and_is_never_enabled(small_images):
    bench = e2e.Bench(CPU, 168)
    _, _, stock = bench.stock
    with bench.running(e2e.VARIANTS[1]) as compressed:
        assert compressed is not stock
        assert compressed.model.vision_tower.config._attn_implementation == "vtc"
        assert stock.model.vision_tower.config._attn_implementation == "sdpa"
        with bench.running(e2e.VARIANTS[0]) as model:
            assert model is stock
    pairs = zip(stock.parameters(), compressed.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


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

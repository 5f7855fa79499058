"""Floors: the weights and products of a configuration, against a model and PyTorch's own count."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.bench import make_record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import e2e, record, roofline, speedups
from bench.roofline import Work
from bench.stages import build as build_model
from bench.stages import config_of, make_inputs, shared_copy
from vtc.hf import names

SMALL = "small LLaVA"
SIZES = {"batch": 2, "text": 40, "size": 4}


@pytest.fixture(scope="module")
def model():
    return build_model(SMALL, torch.device("cpu"), 168)[1]


def weights(*modules):
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def part(model, stage, visual=144, **sizes):
    (work,) = roofline.works(model.config, stage, visual=visual, **SIZES | sizes)
    return work


def counted(call):
    """Of SDPA it counts only the plain implementation."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_weights_are_those_of_the_model(model):
    tower, base, width = model.model.vision_tower, model.model, model.config.text_config.hidden_size
    unused = weights(tower.post_layernorm) if hasattr(tower, "post_layernorm") else 0
    assert part(model, "vision").bytes == weights(tower) - unused
    assert part(model, "projector").bytes == weights(base.multi_modal_projector)
    cached = 2 * model.config.text_config.num_hidden_layers * width * 4
    language = weights(base.language_model, model.lm_head) - weights(base.get_input_embeddings())
    assert part(model, "prefill").bytes == language + 2 * 184 * cached
    assert part(model, "decode").bytes == language + 2 * 185 * cached


def test_the_products_are_those_that_pytorch_counts(model):
    """PyTorch counts all pairs of a causal attention, of which about half are needed."""
    config = model.config.text_config
    inputs = make_inputs(model, 2)
    base, features = model.model, torch.randn(2, 144, model.config.vision_config.hidden_size)
    embeds = torch.randn(2, 184, config.hidden_size)
    assert part(model, "vision").flops == counted(lambda: base.vision_tower(inputs["pixel_values"]))
    assert part(model, "projector").flops == counted(lambda: base.multi_modal_projector(features))
    full = counted(lambda: model(inputs_embeds=embeds, logits_to_keep=1))
    pairs = 184 * 184 - 184 * 185 // 2
    assert part(model, "prefill").flops == full - 2 * 4 * config.num_hidden_layers * pairs * config.hidden_size
    cache = names.cache_of(model(inputs_embeds=embeds, use_cache=True))
    token = counted(lambda: model(inputs_embeds=embeds[:, :1], **{names.CACHE: cache}))
    assert part(model, "decode").flops == token


def test_a_tower_that_ends_at_the_feature_layer_does_less(model):
    whole, ended = part(model, "vision"), part(model, "vision", visual=64)
    short = shared_copy(model.model.vision_tower)
    short.encoder.layers = short.encoder.layers[:-1]
    pixels = make_inputs(model, 2)["pixel_values"]
    assert ended.flops == counted(lambda: short(pixels)) < whole.flops
    assert whole.bytes - ended.bytes == weights(model.model.vision_tower.encoder.layers[-1])


def test_the_first_token_and_generation_are_sums(model):
    sizes = {"visual": 64, **SIZES}
    first = roofline.works(model.config, "first token", **sizes)
    assert first == [part(model, stage, 64) for stage in ("vision", "projector", "prefill")]
    assert first == roofline.works(model.config, "first token, one graph", **sizes)
    made = roofline.works(model.config, "generate 3", **sizes)
    assert made[:3] == first
    assert made[3:] == [part(model, "decode", 64 + grown) for grown in (0, 1)]
    assert roofline.works(model.config, "generate 1", **sizes) == first
    with pytest.raises(ValueError, match=r"no stage is called 'sing'; the stages are those of bench.e2e.STAGES"):
        roofline.works(model.config, "sing", **sizes)


def test_each_stage_has_work(model):
    for stage in e2e.STAGES:
        assert all(min(work) > 0 for work in roofline.works(model.config, stage, visual=64, **SIZES))


def test_a_floor_is_the_longer_of_two_times_for_each_part():
    moved, multiplied = Work(3 * 10**9, 10**9), Work(10**6, 2 * 10**12)
    assert roofline.floor([moved], copy_gb_per_s=1000, tflop_per_s=500) == (3.0, "bandwidth")
    assert roofline.floor([multiplied], copy_gb_per_s=1000, tflop_per_s=500) == (4.0, "arithmetic")
    assert roofline.floor([moved, multiplied], copy_gb_per_s=1000, tflop_per_s=500) == (7.0, "arithmetic")
    assert roofline.floor([moved, moved, multiplied], copy_gb_per_s=1000, tflop_per_s=500) == (10.0, "bandwidth")


def test_the_published_configurations():
    """LLaVA-1.5-7B: 6.6 billion weights read for each token; 616 tokens are 8.1 TFLOP and 64 + 40 are 1.4."""
    config = config_of("LLaVA-1.5-7B")
    (token,) = roofline.works(config, "decode", batch=1, visual=576, text=40, size=2)
    assert token.bytes / 2e9 == pytest.approx(6.6, rel=0.05)
    for visual, tflop in ((576, 8.1), (64, 1.37)):
        (prefill,) = roofline.works(config, "prefill", batch=1, visual=visual, text=40, size=2)
        assert prefill.flops / 1e12 == pytest.approx(tflop, rel=0.05)
    (larger,) = roofline.works(config_of("LLaVA-1.5-13B"), "decode", batch=1, visual=576, text=40, size=2)
    assert larger.bytes / 2e9 == pytest.approx(13.0, rel=0.05)


def stages(backend, visual, first_ms, device, floors=(1.0, 0.1, 4.0)):
    """Records of the stages of one variant, and of its first token."""
    made = []
    times = zip(("vision", "projector", "prefill"), device or (2.0, 0.2, 5.0), floors, strict=True)
    for op, ms, floor_ms in times:
        made.append(
            make_record(
                (ms,) * 3, (ms,) * 3 if device else None, op=op, backend=backend, suite="e2e", model="LLaVA",
                shape={"B": 1, "visual": visual, "text": 40}, floor_ms=floor_ms, bound="bandwidth",
            )
        )  # fmt: skip
    first = dict(floor_ms=sum(floors), bound="bandwidth", shape={"B": 1, "visual": visual, "text": 40})
    made.append(make_record((first_ms,) * 3, op="first token", backend=backend, suite="e2e", model="LLaVA", **first))
    return made


def test_what_bounds_the_first_token():
    slow, fast = stages("sdpa", 576, 11.0, (2.0, 1.0, 7.0)), stages("vtc 64", 64, 13.0, (2.0, 1.0, 7.0))
    assert speedups.bounds(slow + fast) == [
        "LLaVA B=1 sdpa: first token 11.0 ms, the GPU works for 10.0, floor 5.1 by bandwidth: bound by prefill, "
        "7.0 ms, 1.8 times its floor by bandwidth",
        "LLaVA B=1 vtc 64: first token 13.0 ms, the GPU works for 10.0, floor 5.1 by bandwidth: bound by the host",
    ]
    (line,) = speedups.bounds(stages("sdpa", 576, 8.0, None))
    assert line.endswith("floor 5.1 by bandwidth; most of it is prefill, 5.0 ms, 1.2 times its floor by bandwidth")
    assert speedups.bounds(slow[:2] + slow[3:]) == []  # a stage has no number
    assert speedups.bounds([dataclasses.replace(r, floor_ms=None) for r in slow]) == []


def test_records_without_floors_get_those_of_their_run():
    path = Path(__file__).resolve().parents[2] / "bench/results/h200/e2e.jsonl"
    before = [r for r in record.read(path) if r.op == "first token"]
    after = speedups.with_floors(before, 720.0)
    for old, new in zip(before, after, strict=True):
        assert dataclasses.replace(new, floor_ms=None, bound=None, matmul_tflop_per_s=None) == old
        assert 0 < new.floor_ms < new.ms
    floors = {(r.backend, r.shape["B"]): (r.floor_ms, r.bound) for r in after}
    assert floors["sdpa", 1][1] == floors["vtc 64", 16][1] == "arithmetic"
    assert floors["vtc 64", 1][1] == "bandwidth"
    assert floors["sdpa", 1][0] == pytest.approx(11.8, abs=0.1)
    assert speedups.with_floors(after, 1.0) == after  # floors that were measured stay


def test_tables_name_the_model_and_leave_out_what_is_missing():
    def first(model, batch, backend, speedup):
        shape = {"B": batch, "visual": 64, "text": 40}
        made = make_record((5.0,) * 3, op="first token", backend=backend, suite="e2e", model=model, shape=shape)
        return dataclasses.replace(made, speedup_50=speedup)

    records = [first("7B", 1, "vtc 64", 2.0), first("13B", 1, "vtc 64", 3.0), first("13B", 64, "vtc 64", None)]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in speedups.first_tokens(records).splitlines()[2:]]
    assert rows == [
        ["7B", "64", "model(...)", "2.00x", ""],
        ["7B", "64", "GPU time only", "", ""],
        ["13B", "64", "model(...)", "3.00x", ""],
        ["13B", "64", "GPU time only", "", ""],
    ]
    records = [dataclasses.replace(r, op="generate 32") for r in records]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in speedups.new_lengths(records).splitlines()[2:]]
    assert rows == [
        ["13B", "1", "64", "generate(...) 32", "yes", "15", "5", "3.00x"],
        ["7B", "1", "64", "generate(...) 32", "yes", "10", "5", "2.00x"],
    ]

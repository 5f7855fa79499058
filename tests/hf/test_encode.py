"""The vision tower: which layers run and are scored, how, and which patches are selected."""

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.kernels import DEVICE
from support.models import TOKENS
from support.prompts import STEPS, detailed, inputs, prompts
from transformers import (
    LlavaForConditionalGeneration,
)

import vtc


def test_each_layer_runs_once_and_the_scored_ones_are_scored(model, monkeypatch):
    vtc.configure(model, keep=9, ensemble_layers=2)
    ran, scored, projected = [], [], []
    for i, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: projected.append(args[0].shape))
    real = vtc.ops.cls_probs
    monkeypatch.setattr(
        vtc.ops, "cls_probs", lambda queries, *a, **k: scored.append((len(queries), len(ran))) or real(queries, *a, **k)
    )
    call = inputs(prompts("several_images"))
    model.generate(**call, max_new_tokens=3)
    assert ran == [0, 1, 2, 3, 4, 5]  # as in the stock model
    assert scored == [(2, 4)]  # layers 3 and 4 at once; 0 to 3 had run before
    assert projected == [(3, 9, 64)]


def test_which_way_a_scored_layer_takes(model, monkeypatch):
    """The fused kernel where it is asked for or known to be faster, and never where it would cut a gradient."""
    calls = []
    for op in ("cls_attention", "cls_probs"):
        real = getattr(vtc.ops, op)
        monkeypatch.setattr(vtc.ops, op, lambda *a, real=real, op=op, **k: calls.append(op) or real(*a, **k))
    pixels = models.images(1)
    vtc.configure(model, keep=9)

    def taken(grad=False, **options):
        calls.clear()
        with vtc.compress(model, **options), torch.set_grad_enabled(grad):
            model.get_image_features(pixels)
        assert calls in (["cls_attention"] * 3, ["cls_probs"])
        return calls[0]

    assert taken() == "cls_probs"
    assert taken(fused=True) == "cls_attention"
    assert taken(fused=True, grad=True) == "cls_probs"
    asked = []
    monkeypatch.setattr(vtc.ops, "fused_is_faster", lambda *a: not asked.append(a))
    assert taken() == "cls_attention"
    assert asked[0] == (torch.device("cpu"), torch.float32, 16, "auto")
    assert taken(fused=False) == "cls_probs"


def test_generate_records_no_graph(model):
    """Or every image would keep the activations of the whole vision tower alive."""
    vtc.configure(model, keep=9)
    grad = []
    model.model.multi_modal_projector.register_forward_hook(lambda *_: grad.append(torch.is_grad_enabled()))
    model.generate(**inputs(prompts("one")), max_new_tokens=2)
    assert grad == [False]


def test_no_square_attention_matrix(model):
    """The largest tensor that autograd would have to know about is the hidden states, not [B, H, N, N]."""
    vtc.configure(model, keep=9)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        model.model.requires_grad_(True).get_image_features(models.images(1))
    assert sizes
    assert not [s for s in sizes if s[-2:] == (TOKENS + 1, TOKENS + 1)]


@pytest.mark.parametrize(
    ("options", "layers", "combine"),
    [
        ({}, (2, 3, 4), sum),
        ({"ensemble_layers": 1}, (4,), sum),
        ({"ensemble_layers": 5}, (0, 1, 2, 3, 4), sum),
        ({"start_layer": 1}, (1, 2, 3, 4), sum),
        ({"ensemble": "mean"}, (2, 3, 4), lambda values: sum(values) / 3),
        ({"ensemble": "max"}, (2, 3, 4), max),
        ({"ensemble": "min"}, (2, 3, 4), min),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_select(stock, model, eager, options, layers, combine, fused):
    pixels = models.images(3)
    selection = vtc.select(model if fused else stock, pixels, keep=9, fused=fused, **options)
    with torch.no_grad():
        expected = [golden.scores(eager, image, layers, combine) for image in pixels]
    assert selection.grid == (6, 6)
    assert selection.scores.dtype == torch.float32
    torch.testing.assert_close(selection.scores, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert selection.indices.tolist() == [golden.top(values, 9) for values in expected]


@pytest.mark.parametrize(
    ("feature_layer", "layers"), [(-1, (2, 3, 4)), (-3, (1, 2, 3)), (4, (1, 2, 3)), (6, (2, 3, 4))]
)
def test_scored_layers_end_at_the_feature_layer_but_never_at_the_last(feature_layer, layers):
    model = models.build(vision_feature_layer=feature_layer)
    eager = golden.eager(model)
    rows = prompts("one")
    call = inputs(rows)
    with torch.no_grad():
        embeds, _ = golden.splice(eager, rows[0], call["pixel_values"], 9, layers, TOKENS)
    vtc.enable(model, keep=9)
    out = model.generate(**call, max_new_tokens=STEPS, do_sample=False)
    assert out[0, len(rows[0]) :].tolist() == golden.decode(eager, embeds, STEPS)[0]
    with torch.no_grad():
        expected = torch.tensor([golden.scores(eager, call["pixel_values"][0], layers)])
    torch.testing.assert_close(vtc.select(model, call["pixel_values"]).scores, expected, rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch(stock):
    pixels = models.images(4)
    for options in ({}, {"method": "random"}):
        together = vtc.select(stock, pixels, keep=9, **options)
        for i in range(4):
            alone = vtc.select(stock, pixels[i : i + 1], keep=9, **options)
            assert torch.equal(alone.indices[0], together.indices[i])


def test_random_is_uniform_seeded_and_per_image(stock):
    pixels = models.images(64)
    first = vtc.select(stock, pixels, keep=9, method="random")
    again = vtc.select(stock, pixels, keep=9, method="random")
    other = vtc.select(stock, pixels, keep=9, method="random", seed=1)
    assert torch.equal(first.indices, again.indices)
    assert (first.indices != other.indices).any(1).all()
    assert len({tuple(row) for row in first.indices.tolist()}) == 64
    assert first.scores.min() >= 0
    assert first.scores.max() < 1
    assert abs(first.scores.mean() - 0.5) < 0.03  # 2304 uniform numbers: 5 standard errors
    assert abs(first.scores.std() - 12**-0.5) < 0.02
    counts = torch.bincount(first.indices.flatten(), minlength=TOKENS)  # 64 * 9 / 36 = 16 each, deviation 3.5
    assert counts.min() >= 2
    assert counts.max() <= 33


@pytest.mark.parametrize("fused", [False, True])
def test_triton_backend_gives_the_same(saved, fused):
    """Through the interpreter where there is no GPU."""
    model = LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc").to(DEVICE)
    call = {name: tensor.to(DEVICE) for name, tensor in inputs(prompts("left_padded")).items()}
    vtc.configure(model, keep=9, backend="torch")
    expected = model.generate(**call, **detailed())
    with vtc.compress(model, backend="triton", fused=fused) as run:
        actual = model.generate(**call, **detailed())
    scored = "cls_attention" if fused else "cls_probs"
    assert run.backend == {scored: "triton", "select": "triton"}
    assert torch.equal(actual.sequences, expected.sequences)
    golden.close(torch.stack(actual.logits), torch.stack(expected.logits))

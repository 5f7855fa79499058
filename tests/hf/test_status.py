"""`vtc.status` says what the next image will meet, and options without effect are named once."""

import copy
import json

import pytest
import torch
from support import models
from support.models import ids
from support.prompts import inputs, prompts

import vtc
from vtc.hf import settings
from vtc.methods import METHODS
from vtc.methods.random import Random

ONE = {"max_new_tokens": 1, "do_sample": False}
WHY = "tensors on cpu; the Triton kernels need a GPU"


class Own(Random):
    name = "own"


def test_a_model_that_does_not_compress(stock):
    model = copy.deepcopy(stock)
    found = vtc.status(model)
    assert (found.compresses, found.way, found.method, found.attention, found.images) == (
        False,
        None,
        "vtc-cls",
        "sdpa",
        0,
    )
    assert str(found).splitlines() == [
        "compresses: no; vtc.enable(model) switches it on",
        "method: vtc-cls (default settings)",
        "vision tower: CLIP on cpu, attention 'sdpa'",
    ]


def test_an_enabled_model_and_what_it_has_compressed(stock):
    model = copy.deepcopy(stock)
    vtc.enable(model, keep=9, ensemble_layers=2)
    found = vtc.status(model)
    assert (found.compresses, found.way, found.tokens, found.kept, found.scored) == (True, "vtc.enable", 36, 9, (3, 4))
    model.generate(**inputs([ids(3, "image", 5), ids("image", 2, "image", 1)]), **ONE)
    model(**inputs(prompts("one")))
    assert str(vtc.status(model)).splitlines() == [
        "compresses: yes, by vtc.enable",
        "method: vtc-cls (keep=9, ensemble_layers=2)",
        "visual tokens per image: 36 -> 9, before the projector",
        "vision tower: CLIP on cpu, attention 'vtc'; layers 3, 4 of 0 to 5 are scored",
        *(f"{op}: torch ({WHY})" for op in ("cls_probs", "select")),
        "images compressed since then: 4",
    ]
    vtc.configure(model, keep=8)  # it was on all the time
    assert vtc.status(model).images == 4
    with vtc.compress(model, method="fastv", prune_layer=1) as run:
        model.generate(**inputs(prompts("one")), **ONE)
        inside = vtc.status(model)
        assert (inside.way, inside.images, inside.prune_layer) == ("an open vtc.compress block", 1, 1)
        assert inside.backends.keys() == run.backend.keys()
        assert "36 -> 8, after layer 1 of the language model" in str(inside)
    assert vtc.status(model).images == 4
    vtc.disable(model)
    assert (vtc.status(model).way, vtc.status(model).images) == (None, 0)
    vtc.enable(model)
    assert vtc.status(model).images == 0


def test_images_count_since_the_model_was_switched_on_last(model):
    vtc.enable(model, keep=9)
    model(**inputs(prompts("one")))
    assert vtc.status(model).images == 1
    model.model.vision_tower.set_attn_implementation("sdpa")  # not by vtc.disable
    vtc.enable(model)
    assert vtc.status(model).images == 0


def test_a_model_loaded_with_the_string(model):
    assert vtc.status(model).way == 'attn_implementation="vtc"'
    model.set_attn_implementation("sdpa")  # which ends compression
    assert vtc.status(model).way is None


def test_the_operations_where_tokens_are_dropped_later(stock):
    """In the language model, or from all tiles at once, tokens are not gathered where they are ranked."""
    with vtc.compress(stock, prune_layer=1):
        assert list(vtc.status(stock).backends) == ["cls_probs", "topk", "compact", "compact_kv"]
    with vtc.compress(tiles := models.build(family="llava_next"), keep=9):
        assert list(vtc.status(tiles).backends) == ["cls_probs", "topk", "compact"]
    with vtc.compress(tiles, keep=9, method="scope"):
        assert list(vtc.status(tiles).backends) == ["cls_probs", "similarity", "coverage", "compact", "topk"]
    with vtc.compress(tiles, keep=90, method="visionzip"):
        assert list(vtc.status(tiles).backends) == ["cls_probs", "select", "topk", "merge_nearest"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [None, True])
def test_the_operations_are_those_that_run(stock, method, fused):
    model = copy.deepcopy(stock)
    options = {"method": method, "keep": 9, "fused": fused} | (
        {"prune_layer": 1} if method in ("fastv", "dart") else {}
    )
    vtc.enable(model)
    with torch.no_grad(), vtc.compress(model, **options) as run:
        model.generate(**inputs(prompts("one")), **ONE)
        found = vtc.status(model)
    assert {op: backend for op, (backend, _) in found.backends.items()} == run.backend
    assert json.loads(json.dumps(found.to_dict()))["method"] == method
    if method != "none":
        kept = found.kept if found.adaptive else run.tokens_after
        assert (found.tokens, found.kept) == (run.tokens_before, kept)
        assert run.tokens_after <= found.kept


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_the_saliency_that_the_tower_decides(tower):
    has_cls = tower == "clip_vision_model"
    model = models.build(tower=tower, vision_feature_select_strategy="default" if has_cls else "full")
    vtc.enable(model, method="scope", keep=9, ensemble_layers=2)
    found = vtc.status(model)
    saliency, op = ("cls", "cls_probs") if has_cls else ("received", "received")
    assert found.settings == {"keep": 9, "saliency": saliency, "ensemble_layers": 2}
    assert (found.scored, list(found.backends)) == ((3, 4), [op, "similarity", "coverage", "compact"])
    assert f"method: scope (keep=9, ensemble_layers=2, saliency={saliency})" in str(found)
    vtc.configure(model, method="hiprune")
    assert "layers 1, 4 of 0 to 5 are scored" in str(vtc.status(model))


def test_settings_that_do_not_fit_are_named_and_not_raised(stock):
    model = copy.deepcopy(stock)
    vtc.enable(model)
    model.config.vtc = {"keep": 37}
    found = vtc.status(model)
    assert not found.compresses
    assert "keep=37, but an image of this model has only 36" in found.problem
    assert str(found).startswith("compresses: no, an image raises an error: keep=37, but")
    model.config.vtc = {"keep": "all"}
    assert vtc.status(model).problem.endswith("got 'all'; vtc.disable removes them")
    assert vtc.status(model).method is None


def test_none_tiles_objects_and_adaptive_methods(stock):
    with vtc.compress(stock, method="none"):
        assert str(vtc.status(stock)).startswith("compresses: no, method 'none' keeps all tokens (an open vtc.compress")
    with vtc.compress(stock, method="prumerge"):
        assert "visual tokens per image: 36 -> at most 10, before" in str(vtc.status(stock))
    with vtc.compress(stock, method=Own(seed=3)):
        assert "method: own (seed=3)" in str(vtc.status(stock))
        assert json.loads(json.dumps(vtc.status(stock).to_dict()))["settings"] == {"seed": 3}
    tiles = models.build(family="llava_next")
    vtc.enable(tiles, keep=9)
    assert (vtc.status(tiles).compresses, vtc.status(tiles).tokens) == (True, None)
    with pytest.raises(ValueError, match="Linear holds no LLaVA"):
        vtc.status(torch.nn.Linear(1, 1))


@pytest.fixture
def fresh():
    settings._NAMED.clear()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"method": "prumerge", "keep": 5},
            "keep=5 has no effect with method 'prumerge': each image has as many tokens as",
        ),
        (
            {"method": "prumerge+", "adaptive_count": True, "ratio": 0.5},
            "ratio=0.5 has no effect with method 'prumerge+'",
        ),
        ({"method": "none", "keep": 5}, "keep=5 has no effect with method 'none': all tokens stay"),
        ({"method": "none", "kv": "full"}, "kv=full has no effect with method 'none'"),
        ({"kv": "full"}, "kv=full has no effect with method 'vtc-cls': nothing is dropped inside the language model"),
        ({"tiles": "equal"}, "tiles=equal has no effect with method 'vtc-cls': LLaVA-1.5 sees an image in one piece"),
        (
            {"start_layer": 2, "ensemble_layers": 2},
            "ensemble_layers=2 has no effect with method 'vtc-cls': start_layer",
        ),
        *(
            ({"method": name, "fused": False}, f"fused=False has no effect with method '{name}'")
            for name in (
                "prumerge",
                "prumerge+",
                "coverage",
                "divprune",
                "hiprune",
                "received",
                "random",
                "pool",
                "none",
            )
        ),
    ],
)
def test_an_option_without_effect_is_named_once(stock, caplog, fresh, options, says):
    for _ in range(2):
        with vtc.compress(stock, **options):
            pass
    assert [record.message[: len(says)] for record in caplog.records] == [says]


def test_another_value_without_effect_is_not_named_again(stock, caplog, fresh):
    for keep in (5, 6, 7):
        with vtc.compress(stock, method="prumerge", keep=keep):
            pass
    with vtc.compress(stock, method="none", keep=5):
        pass
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "keep=5 has no effect with method 'prumerge'",
        "keep=5 has no effect with method 'none'",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "prumerge", "keep": 5, "adaptive_count": False},
        {"method": "prumerge+", "keep": 5},
        {"method": "visionzip", "contextual": 2, "fused": False},
        {"prune_layer": 1, "kv": "full", "fused": False},
        {"method": "fastv", "prune_layer": 1, "kv": "full"},
        {"start_layer": 2},
        {"ensemble_layers": 2, "ratio": 0.5},
        {"method": "none", "keep": None},
        {"method": "random", "seed": 3, "keep": 4},
    ],
)
def test_options_with_an_effect_are_not_named(stock, caplog, fresh, options):
    with vtc.compress(stock, **options):
        pass
    assert caplog.text == ""


def test_settings_from_before_are_not_named_and_tiles_have_an_effect_where_there_are_some(stock, caplog, fresh):
    model = copy.deepcopy(stock)
    vtc.enable(model, keep=9)
    vtc.configure(model, method="prumerge")
    assert caplog.text == ""
    tiles = models.build(family="llava_next")
    vtc.enable(tiles, tiles="equal")
    assert caplog.text == ""
    vtc.configure(tiles, method="visionzip", tiles="equal")
    assert "tiles=equal has no effect with method 'visionzip': each view" in caplog.text


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_what_has_no_effect_is_what_changes_nothing(stock, method):
    """Of the settings that all methods share, for every method: two values, and what they change."""
    model = copy.deepcopy(stock)
    vtc.enable(model)
    named = vtc.VTCConfig.of(method=method).without_effect()
    more = {"prune_layer": 1} if method in ("fastv", "dart") else {}

    def effect(**options):
        with vtc.compress(model, **{"method": method, "keep": 9, **more, **options}) as run:
            out = model.generate(**inputs(prompts("one")), return_dict_in_generate=True, **ONE)
            vtc.status(model)
        return run.tokens_after, run.kv_bytes_after, sorted(run.backend), out.sequences.shape

    assert (effect(keep=9) == effect(keep=4)) == ("keep" in named)
    assert (effect(keep=None, ratio=0.5) == effect(keep=None, ratio=0.25)) == ("ratio" in named)
    assert (effect(fused=True) == effect(fused=False)) == ("fused" in named)
    assert (effect(kv="full") == effect(kv="compact")) == ("kv" in named)

"""A method of one's own, given as an object, runs wherever a built-in one of the same formula runs, and equals it."""

import copy
import dataclasses
import json
import pickle
from typing import ClassVar

import pytest
import torch
from support import models
from support.models import ids
from support.prompts import inputs, prompts
from transformers import LlavaForConditionalGeneration

import vtc
from vtc import ops
from vtc.eval.engine import answer_all
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec
from vtc.eval.setting import Setting, ignores_keep, sweep
from vtc.eval.tasks.scenes import Scenes
from vtc.methods import METHODS, Method, Needs, Ranking, Tokens
from vtc.methods.fastv import FastV
from vtc.methods.prumerge import PruMerge
from vtc.methods.random import random_scores
from vtc.methods.visionzip import VisionZip
from vtc.methods.vtc_cls import VTCCLS


@dataclasses.dataclass(frozen=True)
class Mine(Method):
    """Random, written from outside."""

    name = "mine"
    needs = Needs(pixels=True)
    seed: int = 0

    def check(self):
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    def select(self, outputs, keep):
        scores = random_scores(outputs.pixel_values, outputs.patches.shape[1], self.seed)
        return ops.topk(scores, keep, backend=self.backend), scores


@dataclasses.dataclass(frozen=True)
class MyCLS(VTCCLS):
    name: ClassVar[str] = "my-cls"


@dataclasses.dataclass(frozen=True)
class MyZip(VisionZip):
    name: ClassVar[str] = "my-zip"


@dataclasses.dataclass(frozen=True)
class MyMerge(PruMerge):
    name: ClassVar[str] = "my-merge"


@dataclasses.dataclass(frozen=True)
class MyFastV(FastV):
    name: ClassVar[str] = "my-fastv"


PAIRS = {  # an object, what else is given, and the built-in method that it copies
    "mine": (Mine(seed=3), {}, {"method": "random", "seed": 3}),
    "mine, an option beside it": (Mine(), {"seed": 3}, {"method": "random", "seed": 3}),
    "vtc-cls": (MyCLS(ensemble_layers=2), {}, {"method": "vtc-cls", "ensemble_layers": 2}),
    "vtc-cls inside": (MyCLS(), {"prune_layer": 1}, {"method": "vtc-cls", "prune_layer": 1}),
    "visionzip": (MyZip(contextual=2), {}, {"method": "visionzip", "contextual": 2}),
    "prumerge": (MyMerge(neighbors=4), {}, {"method": "prumerge", "neighbors": 4}),
    "fastv": (MyFastV(), {"prune_layer": 1}, {"method": "fastv", "prune_layer": 1}),
    "fastv, reselecting": (
        MyFastV(reselect=True),
        {"prune_layer": 1},
        {"method": "fastv", "prune_layer": 1, "reselect": True},
    ),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("case", PAIRS)
@torch.no_grad()
def test_an_object_gives_the_tokens_of_the_built_in_that_it_copies(stock, case):
    own, beside, built_in = PAIRS[case]
    call = inputs([ids(3, "image", 5), ids("image", 2, "image", 1)])
    with vtc.compress(stock, keep=9, **built_in) as run:
        expected, logits = stock.generate(**call, **GREEDY), stock(**call).logits
    with vtc.compress(stock, keep=9, method=own, **beside) as mine:
        assert torch.equal(stock.generate(**call, **GREEDY), expected)
        assert torch.equal(stock(**call).logits, logits)
    # All but the operations: a method that defines `select` runs topk and compact.
    assert mine.report().splitlines()[:-1] == run.report().splitlines()[:-1]
    if METHODS[built_in["method"]].selects:
        found = vtc.select(
            stock, call["pixel_values"], keep=9, method=own, **{k: v for k, v in beside.items() if k == "seed"}
        )
        other = vtc.select(
            stock, call["pixel_values"], keep=9, **{k: v for k, v in built_in.items() if k != "prune_layer"}
        )
        assert torch.equal(found.indices, other.indices)
        assert torch.equal(found.scores, other.scores)


@torch.no_grad()
def test_an_enabled_model_keeps_the_object_through_copies_and_is_restored(stock):
    model = models.build()
    call = inputs(prompts("one"))
    plain = stock.generate(**call, **GREEDY)
    with vtc.compress(stock, keep=9, method="random", seed=3):
        expected = stock.generate(**call, **GREEDY)
    vtc.enable(model, keep=9, method=Mine(seed=3))
    for each in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        assert torch.equal(each.generate(**call, **GREEDY), expected)
    assert vtc.configure(model, keep=8).method == Mine(seed=3)  # the same method keeps its options
    assert vtc.configure(model, seed=4).method == Mine(seed=4)
    assert vtc.configure(model, method="fastervlm").method == "fastervlm"
    assert vtc.configure(model, method=Mine()).method == Mine()
    vtc.disable(model)
    assert torch.equal(model.generate(**call, **GREEDY), plain)
    assert not [name for name in model.base_model.__dict__ if "vtc" in name]


def test_a_saved_model_names_the_method_and_says_that_the_object_is_missing(stock, tmp_path, monkeypatch):
    model = copy.deepcopy(stock)
    vtc.enable(model, keep=9, method=Mine(seed=3))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["vtc"]
    assert (saved["method"], saved["seed"], saved["keep"]) == ("mine", 3, 9)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="vtc")
    with pytest.raises(
        ValueError,
        match=r"config.vtc are not valid: method must be one of .*, got 'mine'; .*takes a method object again",
    ):
        loaded.generate(**inputs(prompts("one")), **GREEDY)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "mine", Mine)
        assert vtc.configure(loaded, keep=8) == vtc.VTCConfig.of(method="mine", seed=3, keep=8)
    for switch in (vtc.enable, vtc.configure):
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="vtc")
        assert switch(again, method=Mine(), keep=9) == vtc.VTCConfig.of(method=Mine(), keep=9)
        with pytest.raises(ValueError, match="got 'mine'"):
            switch(LlavaForConditionalGeneration.from_pretrained(tmp_path), keep=9)


@pytest.mark.parametrize("options", [{}, {"prune_layer": 1}])
@torch.no_grad()
def test_forward_with_an_object_is_compiled_as_one_graph(stock, options):
    torch._dynamo.reset()
    model = copy.deepcopy(stock)
    call = inputs(prompts("one"))
    vtc.enable(model, keep=9, method=MyCLS(ensemble_layers=2) if options else Mine(seed=3), **options)
    expected = model.generate(**call, **GREEDY)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(**call, cache_implementation="static", **GREEDY), expected)
    if not options:  # other options compile again
        vtc.configure(model, seed=4)
        changed = model.generate(**call, cache_implementation="static", **GREEDY)
        model.forward = model.forward._torchdynamo_orig_callable
        assert torch.equal(changed, model.generate(**call, **GREEDY))
        assert not torch.equal(changed, expected)


def test_an_object_of_a_built_in_class_is_its_name_and_options():
    config = vtc.VTCConfig.of(method=METHODS["prumerge"](neighbors=4), keep=9)
    assert config == vtc.VTCConfig.of(method="prumerge", neighbors=4, keep=9)
    assert json.loads(json.dumps(config.to_dict()))["method"] == "prumerge"
    assert vtc.VTCConfig.of(method=METHODS["random"](seed=1), seed=2).options == {"seed": 2}


def test_settings_with_an_object():
    config = vtc.VTCConfig.of(method=Mine(seed=3), keep=9)
    assert (config.name, config.method, config.options) == ("mine", Mine(seed=3), {})
    assert vtc.VTCConfig.of(**config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(copy.deepcopy(config)) == hash(config)
    assert config != vtc.VTCConfig.of(method=Mine(seed=4), keep=9)
    assert config.updated(seed=4) == vtc.VTCConfig.of(method=Mine(seed=4), keep=9)
    assert config.updated(backend="torch").build_method() == Mine(seed=3, backend="torch")
    assert vtc.VTCConfig.of(method=Mine(backend="torch")).backend == "torch"
    assert vtc.VTCConfig(method=Mine(backend="torch")).backend == "torch"
    assert vtc.VTCConfig.of(method=Mine(backend="torch")).updated(backend="auto").backend == "auto"
    assert vtc.VTCConfig.of(method=Mine(backend="torch"), backend="auto").backend == "auto"
    assert vtc.VTCConfig.of(backend="triton").updated(method=Mine(backend="torch")).backend == "torch"
    assert vtc.VTCConfig.of(backend="torch").updated(method=Mine()).build_method() == Mine(backend="torch")
    with pytest.raises(ValueError, match="backend must be one of"):
        config.updated(backend="cuda")
    assert vtc.VTCConfig.of(method=MyFastV()).prune_after == 2
    assert vtc.VTCConfig.of(method=MyFastV()).kept_kv == "full"


class Nameless(Method):
    pass


class Random(Method):
    name = "random"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": Mine}, r"or an object of a subclass of vtc.methods.Method, got <class .*Mine'>; use Mine\(\)"),
        ({"method": Nameless()}, "a method needs a name of its own, a string, and Nameless has none; give it one"),
        (
            {"method": Random()},
            "a method needs a name of its own, a string, and Random has name='random', which is another's",
        ),
        (
            {"method": object()},
            "method must be one of 'vtc-cls', .*, or an object of a subclass of vtc.methods.Method, got",
        ),
        (
            {"method": Mine(), "neighbors": 3},
            "neighbors is an option of .*, and the method is 'mine', whose options are seed",
        ),
        ({"method": Mine(), "seed": -1}, "seed must be 0 or more, got -1"),
        ({"method": Mine(), "seeds": 1}, "unknown option.s. seeds; .*and method 'mine' has seed"),
        ({"method": Mine(), "prune_layer": 2}, "method 'mine' does not prune inside the language model"),
        ({"method": MyFastV(reselect=True), "kv": "compact"}, "reselect=True needs all tokens"),
    ],
)
def test_what_is_no_method_or_does_not_fit_it_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        vtc.VTCConfig.of(**given)


@dataclasses.dataclass(frozen=True)
class NeedsCLS(Method):
    name = "needs-cls"
    needs = Needs(cls_probs=True)


def test_what_an_object_needs_is_checked_against_the_model():
    model = models.build(tower="siglip_vision_model", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r"method 'needs-cls' needs a vision tower with a \[CLS\] token"):
        vtc.enable(model, method=NeedsCLS())
    model = models.build(family="llava_next")
    with pytest.raises(ValueError, match="method 'my-merge' makes new tokens of an image's patches"):
        vtc.enable(model, method=MyMerge())


def test_a_setting_of_an_object_answers_and_is_told_apart():
    own, built_in = Setting(Mine(seed=3), {"keep": 64}), Setting("random", {"keep": 64, "seed": 3})
    assert own.label == "mine-64-seed=3"
    assert json.loads(json.dumps(own.fingerprint())) == built_in.fingerprint() | {
        "method": "mine",
        "code": own.fingerprint()["code"],
    }
    assert len(own.fingerprint()["code"]) == 16
    assert own.fingerprint() != Setting(Mine(seed=4), {"keep": 64}).fingerprint()
    task, engine = Scenes(count=3), LocalEngine()
    mine, theirs = (answer_all(engine, ModelSpec(), task, each, 3) for each in (own, built_in))
    assert [answer.text for answer in mine] == [answer.text for answer in theirs]
    labels = [each.label for each in sweep([Mine(), MyMerge(), MyMerge(adaptive_count=False)], [9, 4], seed=3)]
    assert labels == [
        *("mine-9-seed=3", "mine-4-seed=3", "my-merge"),
        *("my-merge-9-adaptive_count=False", "my-merge-4-adaptive_count=False"),
    ]


def test_which_methods_ignore_keep_is_said_by_their_classes():
    assert [name for name in METHODS if ignores_keep(name, {})] == ["prumerge", "none"]
    assert ignores_keep("floor", {})
    assert ignores_keep("prumerge+", {"adaptive_count": True, "keep": 4})
    assert not ignores_keep("prumerge", {"adaptive_count": False})
    assert not ignores_keep("a method of an earlier run", {"power": 3})


@dataclasses.dataclass(frozen=True)
class Wrong(Mine):
    """It returns what `wrong` makes of the indices and the scores, or of the tokens."""

    name = "wrong"
    wrong: str = ""

    def select(self, outputs, keep):
        indices, scores = super().select(outputs, keep)
        if self.wrong == "tokens":
            return indices, scores
        return {
            "nothing": None,
            "one": indices,
            "fewer": (indices[:, :3], scores),
            "int32": (indices.int(), scores),
            "few scores": (indices, scores[:, :5]),
        }[self.wrong]

    def reduce(self, outputs, keep):
        tokens = super().reduce(outputs, keep)
        return tokens._replace(features=tokens.features[:, :3]) if self.wrong == "tokens" else tokens


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ("nothing", "got a NoneType"),
        ("one", "got a Tensor"),
        ("fewer", r"got torch.int64 \[3, 3\] and torch.float32 \[3, 36\]"),
        ("int32", r"got torch.int32 \[3, 9\] and torch.float32 \[3, 36\]"),
        ("few scores", r"got torch.int64 \[3, 9\] and torch.float32 \[3, 5\]"),
        ("tokens", r"reduce of method 'wrong' must return features \[3, 9, D\], as its num_outputs says, got \[3, 3, "),
    ],
)
def test_what_a_method_returns_is_checked(wrong, got):
    model, call = models.build(), inputs(prompts("left_padded"))
    vtc.enable(model, method=Wrong(wrong=wrong), keep=9)
    for run in (lambda: model.generate(**call, max_new_tokens=1), lambda: vtc.select(model, call["pixel_values"])):
        with pytest.raises(ValueError, match=got):
            run()


@dataclasses.dataclass(frozen=True)
class Ranked(Method):
    """Random, by its ranking; `wrong`: without the promised type."""

    name = "ranked"
    needs = Needs(pixels=True)
    wrong: str = ""

    def ranking(self, outputs):
        scores = random_scores(outputs.pixel_values, outputs.patches.shape[1], 0)
        wrong = {"tensor": scores, "none": Ranking(outputs.cls_probs), "fewer": Ranking(scores[:, 1:])}
        return wrong.get(self.wrong, Ranking(scores))


@dataclasses.dataclass(frozen=True)
class LastRanked(Ranked):
    """A method that ranks, but selects in another way: by the smallest scores."""

    name = "last-ranked"

    def select(self, outputs, keep):
        scores = self.ranking(outputs).scores
        return ops.topk(-scores, keep, backend=self.backend), scores


def test_a_method_that_ranks(stock):
    call = inputs(prompts("unequal_images"))
    found = {}
    for method in (Ranked(), "random", LastRanked()):
        with vtc.compress(stock, method=method, keep=9) as run:
            found[method] = stock(**call).logits, run.backend
    assert torch.equal(found[Ranked()][0], found["random"][0])
    assert not torch.equal(found[LastRanked()][0], found["random"][0])
    assert list(found[Ranked()][1]) == list(found["random"][1]) == ["select"]
    assert list(found[LastRanked()][1]) == ["topk", "compact"]
    selection = vtc.select(stock, call["pixel_values"], method=LastRanked(), keep=9)
    assert torch.equal(selection.indices, ops.topk(-selection.scores, 9))


class Reduced(Ranked):
    """It ranks, but does not take the best."""

    name = "reduced"

    def reduce(self, outputs, keep):
        return Tokens(outputs.patches[:, :keep])


class RankedZip(VisionZip):
    """Its ranking has no use."""

    name = "ranked-zip"
    ranking = Ranked.ranking


class Named(Ranked):
    """It says itself what it runs."""

    name = "named"
    operations = ("row_scores", "select")


class Mixed(type("Mixin", (), {"ranking": Ranked.ranking}), Method):
    name = "mixed"


class MixedAgain(Mixed):
    name = "mixed-again"


def test_which_operations_a_method_runs():
    classes = (
        Mine,
        MyCLS,
        Ranked,
        LastRanked,
        Reduced,
        RankedZip,
        Named,
        type("Same", (Named,), {}),
        Mixed,
        MixedAgain,
    )
    assert {cls.__name__: cls.operations for cls in classes} == {
        "Mine": ("topk", "compact"),
        "MyCLS": ("select",),
        "Ranked": ("select",),
        "LastRanked": ("topk", "compact"),
        "Reduced": ("select",),  # as it inherits them
        "RankedZip": VisionZip.operations,
        "Named": ("row_scores", "select"),
        "Same": ("row_scores", "select"),
        "Mixed": ("select",),
        "MixedAgain": ("select",),
    }
    assert not Reduced.only_ranks()


@pytest.mark.parametrize(
    ("wrong", "got"),
    [("tensor", "a Tensor"), ("none", "scores that are a NoneType"), ("fewer", r"scores \[1, 35\]")],
)
def test_a_ranking_of_another_type_is_explained(stock, wrong, got):
    with pytest.raises(ValueError, match=rf"ranking of method 'ranked' must return .*Ranking\(scores\).* got {got}$"):
        vtc.select(stock, models.images(1), method=Ranked(wrong=wrong), keep=9)

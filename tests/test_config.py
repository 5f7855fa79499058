"""VTCConfig accepts what it says, refuses the rest with a message that helps, and kept_count rounds in one place."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtc import VTCConfig, kept_count
from vtc import config as module
from vtc.methods import METHODS


def test_defaults():
    assert VTCConfig() == VTCConfig(method="vtc-cls", keep=None, ratio=None, backend="auto", options={})
    assert VTCConfig().build_method() == METHODS["vtc-cls"](ensemble="sum", ensemble_layers=3, start_layer=None)
    assert VTCConfig(ratio=0.5).keep is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        VTCConfig().keep = 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 64, "ratio": 0.1}, "both keep=64 and ratio=0.1"),
        ({"keep": 0}, "at least 1, got 0"),
        ({"keep": -3}, "at least 1, got -3"),
        ({"keep": 64.0}, "integer.*got 64.0"),
        ({"keep": "64"}, "integer.*got '64'"),
        ({"keep": True}, "integer.*got True"),
        ({"ratio": 0}, "0 < ratio <= 1, got 0"),
        ({"ratio": 1.5}, "0 < ratio <= 1, got 1.5"),
        ({"ratio": float("nan")}, "0 < ratio <= 1, got nan"),
        ({"ratio": "0.5"}, "0 < ratio <= 1, got '0.5'"),
        ({"ratio": True}, "0 < ratio <= 1, got True"),
        (
            {"method": "tome"},
            "'vtc-cls', 'fastervlm', .*'fastv', 'dart', 'random', 'pool', 'downsample', 'none', got 'tome'",
        ),
        ({"fused": 1}, "True, False or None .*got 1"),
        ({"prune_layer": -1}, "prune_layer.*at least 0, got -1"),
        (
            {"prune_layer": 2, "method": "pool"},
            "'pool' does not prune .*got prune_layer=2; .*'vtc-cls', 'coverage', 'scope', 'fastv'",
        ),
        ({"prune_layer": 0, "method": "fastv"}, "'fastv' scores inside .*got prune_layer=0; use prune_layer=2"),
        ({"backend": "cuda"}, "'auto', 'triton', 'torch', got 'cuda'"),
        ({"schedule": []}, r"pairs of integers .*such as \[\(0, 96\), \(16, 32\)\], got \[\]"),
        ({"schedule": "0:96"}, "pairs of integers .*got '0:96'"),
        ({"schedule": [(0, 96, 3)]}, "pairs of integers"),
        ({"schedule": [(0, 96.0)]}, "pairs of integers"),
        ({"schedule": [(False, 96)]}, "pairs of integers"),
        ({"schedule": 96}, "pairs of integers"),
        ({"schedule": [(-1, 96)]}, r"must ascend from 0 or more, got \[-1\]"),
        ({"schedule": [(0, 96), (0, 32)]}, r"layers of a schedule must ascend .*got \[0, 0\]"),
        ({"schedule": [(16, 96), (0, 32)]}, r"layers of a schedule must ascend .*got \[16, 0\]"),
        ({"schedule": [(0, 32), (16, 32)]}, r"tokens of a schedule must descend .*got \[32, 32\]"),
        ({"schedule": [(0, 32), (16, 96)]}, r"tokens of a schedule must descend .*got \[32, 96\]"),
        ({"schedule": [(0, 0)]}, "descend to 1 or more"),
        ({"schedule": [(0, 9)], "keep": 9}, "schedule=.* and keep, which it replaces"),
        ({"schedule": [(0, 9)], "ratio": 0.5}, "schedule=.* and ratio, which it replaces"),
        ({"schedule": [(2, 9)], "prune_layer": 2}, "schedule=.* and prune_layer, which it replaces"),
        ({"schedule": [(0, 9), (2, 3)], "method": "pool"}, "'pool' does not keep .*'vtc-cls', 'fastervlm', 'coverage'"),
        ({"schedule": [(2, 9), (3, 3)], "method": "fastv"}, "'fastv' does not keep the patches .*use one pair"),
        ({"schedule": [(2, 9), (3, 3)], "method": "random"}, "'random' does not prune inside .*begins at layer 0"),
        ({"schedule": [(0, 9)], "method": "fastv"}, r"'fastv' scores inside .*got schedule=\[\(0, 9\)\]"),
    ],
)
def test_bad_values(options, says):
    with pytest.raises(ValueError, match=says):
        VTCConfig(**options)
    with pytest.raises(ValueError, match=says):
        VTCConfig().updated(**options)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"keep": np.int64(6)}, {"keep": 6}),
        ({"keep": torch.tensor(6)}, {"keep": 6}),
        ({"keep": np.array(6)}, {"keep": 6}),
        ({"ratio": np.float32(0.25)}, {"ratio": 0.25}),
        ({"ratio": np.float64(0.1)}, {"ratio": 0.1}),
        ({"ratio": torch.tensor(0.5, requires_grad=True)}, {"ratio": 0.5}),
        ({"prune_layer": np.int32(2)}, {"prune_layer": 2}),
        ({"fused": np.bool_(True)}, {"fused": True}),
        ({"method": np.str_("random"), "seed": np.int64(1)}, {"method": "random", "seed": 1}),
        ({"method": "prumerge", "neighbors": torch.tensor(4)}, {"method": "prumerge", "neighbors": 4}),
        ({"ensemble": np.str_("max"), "start_layer": np.uint8(1)}, {"ensemble": "max", "start_layer": 1}),
    ],
)
def test_numbers_of_numpy_and_torch_are_stored_as_pythons(given, stored):
    config = VTCConfig.of(**given)
    assert config == VTCConfig.of(**stored)
    assert [type(config.to_dict()[name]) for name in stored] == [type(value) for value in stored.values()]
    assert VTCConfig.of(**json.loads(json.dumps(config.to_dict()))) == config
    method = config.build_method()
    assert METHODS[config.method](**{name: given[name] for name in config.options}) == method
    assert {type(getattr(method, name)) for name in config.options} <= {int, str}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": np.bool_(True)}, "keep must be an integer.*got True"),
        ({"keep": np.float64(6.0)}, "keep must be an integer.*got 6.0"),
        ({"keep": np.array([6])}, r"keep must be an integer.*got array\(\[6\]\)"),
        ({"keep": torch.tensor([6])}, r"keep must be an integer.*got tensor\(\[6\]\)"),
        ({"keep": torch.tensor(6, device="meta")}, "keep must be an integer.*got tensor"),
        ({"ratio": np.float32("nan")}, "0 < ratio <= 1, got nan"),
        ({"ratio": float("inf")}, "0 < ratio <= 1, got inf"),
        ({"ratio": np.bool_(True)}, "0 < ratio <= 1, got True"),
        ({"backend": np.array(["torch", "triton"])}, "backend must be one of 'auto'"),
        ({"method": ["random"]}, r"method must be one of .*got \['random'\]"),
        ({"method": "random", "seed": 2**32}, "seed must be an integer of at least 0.*at most 4294967295"),
        ({"method": "random", "seed": torch.tensor([1, 2])}, "seed must be an integer"),
    ],
)
def test_what_is_no_number_stays_refused(options, says):
    with pytest.raises(ValueError, match=says):
        VTCConfig.of(**options)


def test_updated():
    config = VTCConfig.of(keep=64, ensemble_layers=2)
    assert config == VTCConfig(keep=64, options={"ensemble_layers": 2})
    assert config.updated() == config
    assert config.updated(ratio=0.5) == VTCConfig.of(ratio=0.5, ensemble_layers=2)
    assert config.updated(ratio=0.5).updated(keep=3) == VTCConfig.of(keep=3, ensemble_layers=2)
    assert config.updated(keep=None) == VTCConfig.of(ensemble_layers=2)
    assert config.updated(backend="torch").keep == 64


def test_options_follow_the_method():
    """Another method starts with its own defaults; the same one keeps what is not changed."""
    config = VTCConfig.of(method="prumerge", neighbors=16)
    assert config.options == {"neighbors": 16}
    assert config.updated(keep=3).options == {"neighbors": 16}
    assert config.updated(method="prumerge", adaptive_count=False).options == {"neighbors": 16, "adaptive_count": False}
    assert config.updated(method="prumerge+").options == {}
    assert config.updated(method="prumerge+", neighbors=4).options == {"neighbors": 4}
    assert config.updated(neighbors=4, backend="torch").build_method() == METHODS["prumerge"](
        neighbors=4, backend="torch"
    )
    assert config.options == {"neighbors": 16}


def test_options_are_a_copy():
    options = {"neighbors": 16}
    config = VTCConfig(method="prumerge", options=options)
    options["neighbors"] = -1
    assert config.options == {"neighbors": 16}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"keeps": 3},
            r"unknown option.*keeps; VTCConfig has method, keep, ratio.*, and method 'vtc-cls' has ens",
        ),
        ({"keeps": 3, "method": "none"}, "unknown option.*keeps; .*and method 'none' has no options"),
        ({"options": {}}, r"unknown option.*options; VTCConfig has method"),
        (
            {"neighbors": 16},
            r"neighbors is an option of 'prumerge' and 'prumerge\+', and the method is 'vtc-cls', whose options are "
            r"ensemble, ensemble_layers, start_layer; use vtc.configure\(model, method='prumerge', neighbors=16\)",
        ),
        ({"method": "none", "ensemble": "max"}, r"of 'vtc-cls', .* 'none', whose .*method='vtc-cls', ensemble='max'\)"),
        ({"method": "tome", "seed": 3}, "method must be one of 'vtc-cls'.*got 'tome'"),
    ],
)
def test_options_of_others(given, says):
    with pytest.raises(ValueError, match=says):
        VTCConfig.of(**given)


@pytest.mark.parametrize("options", [{"backend": "torch"}, {"keep": 3}, {3: 3}])
def test_options_are_those_of_the_method(options):
    with pytest.raises(ValueError, match=r"unknown option (3|'\w+') of method 'vtc-cls', whose options are ensemble, "):
        VTCConfig(options=options)


@pytest.mark.parametrize("options", [None, 3, ["seed"]])
def test_options_are_a_mapping(options):
    with pytest.raises(ValueError, match=r"options must be a mapping.*got "):
        VTCConfig(options=options)


@pytest.mark.parametrize(
    "config",
    [
        VTCConfig(),
        VTCConfig(ratio=0.25),
        VTCConfig.of(keep=7, start_layer=1),
        VTCConfig.of(method="random", seed=4, ratio=0.5),
        VTCConfig.of(method="visionzip", contextual=None),
        VTCConfig(schedule=[[0, 96], (np.int64(16), torch.tensor(32))]),
    ],
)
def test_round_trips(config):
    assert VTCConfig.of(**config.to_dict()) == config
    assert VTCConfig.of(**json.loads(json.dumps(config.to_dict()))) == config
    assert VTCConfig(**dataclasses.asdict(config)) == config
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
        assert hash(other) == hash(config)


@pytest.mark.parametrize(
    ("ratio", "tokens", "kept"),
    [(0.11, 576, 64), (1 / 9, 576, 64), (0.07, 100, 7), (0.1, 10, 1), (1e-9, 576, 1), (1, 576, 576), (1.0, 7, 7)],
)
def test_ratio_rounds_up(ratio, tokens, kept):
    assert kept_count(VTCConfig(ratio=ratio), tokens) == kept


@pytest.mark.parametrize(
    ("ratio", "tokens", "kept"),
    [
        *((0.5, 576, 288), (0.25, 576, 144), (0.1, 576, 58), (0.11, 576, 63), (1 / 9, 576, 64), (0.07, 100, 7)),
        *((0.125, 36, 4), (0.375, 36, 14), (0.5, 5, 2), (0.5, 7, 4), (1e-9, 576, 1), (1, 576, 576), (None, 25, 6)),
    ],
)
def test_ratio_rounds_as_the_authors_round(ratio, tokens, kept):
    """To the nearest number, and a half to the even one, as Python does: they drop a share of 1 - ratio."""
    for method in ("fastv", "divprune"):
        assert kept_count(VTCConfig(method=method, ratio=ratio), tokens) == kept
    if ratio and ratio > 1e-3:
        assert kept == round(tokens * (1 - (1 - ratio)))


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_ratio_keeps_at_least_one_and_at_most_all(ratio, tokens):
    assert 1 <= kept_count(VTCConfig(method="fastv", ratio=ratio), tokens) <= tokens
    kept = kept_count(VTCConfig(ratio=ratio), tokens)
    assert 1 <= kept <= tokens
    assert ratio * tokens - 1e-5 <= kept <= ratio * tokens + 1


@pytest.mark.parametrize(("tokens", "kept"), [(576, 128), (129, 128), (128, 32), (25, 7), (3, 1), (1, 1)])
def test_the_default_keep_is_128_or_a_quarter_of_few_tokens(tokens, kept):
    assert kept_count(VTCConfig(), tokens) == kept
    assert kept_count(VTCConfig(keep=9).updated(keep=None), tokens) == kept
    assert kept_count(VTCConfig.of(**VTCConfig().to_dict()), tokens) == kept


def test_the_default_keep_of_few_tokens_is_said_once(caplog):
    module._say_default.cache_clear()
    kept_count(VTCConfig(method="none"), 25)
    kept_count(VTCConfig(), 576)
    kept_count(VTCConfig(ratio=0.25), 25)
    assert caplog.text == ""
    for _ in range(2):
        kept_count(VTCConfig(), 25)
    assert caplog.text.count("neither keep nor ratio is given, and an image has only 25 visual tokens: ratio=0.25") == 1


def test_keep_is_never_clamped():
    assert kept_count(VTCConfig(keep=576), 576) == 576
    with pytest.raises(ValueError, match=r"keep=577, but .* only 576 visual tokens.*at most 576.*keep=144"):
        kept_count(VTCConfig(keep=577), 576)


def test_a_schedule_says_what_keep_and_prune_layer_do():
    staged = VTCConfig(schedule=[(0, 96), (16, 32)])
    assert staged.schedule == ((0, 96), (16, 32))
    assert (staged.prune_after, staged.prunes_inside, staged.stages(576)) == (0, True, ((0, 96), (16, 32)))
    assert kept_count(staged, 576) == 96
    with pytest.raises(ValueError, match="keeps 96 visual tokens at first, but an image of this model has only 25"):
        kept_count(staged, 25)
    one, same = VTCConfig(schedule=[(2, 64)]), VTCConfig(keep=64, prune_layer=2)
    for config in (one, same):
        assert (config.prune_after, config.prunes_inside, config.stages(576)) == (2, True, ((2, 64),))
    assert VTCConfig(keep=64).stages(576) == ((0, 64),)
    assert not VTCConfig(keep=64).prunes_inside
    assert not VTCConfig(schedule=[(0, 64)]).prunes_inside


def test_a_new_schedule_replaces_the_budget_and_a_new_budget_the_schedule():
    stages = ((0, 96), (16, 32))
    assert VTCConfig(keep=3, prune_layer=2).updated(schedule=stages) == VTCConfig(schedule=stages)
    assert VTCConfig(ratio=0.5, kv="full").updated(schedule=stages) == VTCConfig(schedule=stages, kv="full")
    for budget in ({"keep": 3}, {"ratio": 0.5}, {"prune_layer": 2, "keep": 3}, {"prune_layer": 2, "ratio": 0.5}):
        assert VTCConfig(schedule=stages).updated(**budget) == VTCConfig(**budget)
    with pytest.raises(
        ValueError, match=r"prune_layer=2 would replace schedule=\[\(0, 96\), .* give keep or ratio, too"
    ):
        VTCConfig(schedule=stages).updated(prune_layer=2)
    assert VTCConfig(schedule=stages).updated(prune_layer=2, schedule=None) == VTCConfig(prune_layer=2)
    assert VTCConfig(schedule=stages).updated(schedule=None) == VTCConfig()
    assert VTCConfig(schedule=stages).updated(method="random").schedule == stages


@pytest.mark.parametrize(
    ("stages", "layers", "expected"),
    [
        (((0, 64),), 32, 64),
        (((2, 64),), 32, 96),  # FastV
        (((0, 96), (16, 32)), 32, 64),
        (((0, 128), (12, 64), (24, 16)), 32, 76),  # TOPS, published as 64
        (((0, 37.5),), 4, 37.5),
        (((2, 16),), 4, 296),
    ],
)
def test_token_layers(stages, layers, expected):
    assert module.token_layers(576, stages, layers) == expected
    of_each = [([kept for start, kept in stages if start <= layer] or [576])[-1] for layer in range(layers)]
    assert sum(of_each) / layers == expected

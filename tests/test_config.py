"""VTCConfig accepts what it says, refuses the rest with a message that helps, and kept_count rounds in one place."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtc import VTCConfig, kept_count
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
        ({"method": "tome"}, "'vtc-cls', 'fastervlm', .*'fastv', 'random', 'pool', 'none', got 'tome'"),
        ({"fused": 1}, "True, False or None .*got 1"),
        ({"prune_layer": -1}, "prune_layer.*at least 0, got -1"),
        ({"prune_layer": 2, "method": "pool"}, "'pool' does not prune .*got prune_layer=2; .*'vtc-cls', 'fastv'"),
        ({"prune_layer": 0, "method": "fastv"}, "'fastv' scores inside .*got prune_layer=0; use prune_layer=2"),
        ({"backend": "cuda"}, "'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_bad_values(options, says):
    with pytest.raises(ValueError, match=says):
        VTCConfig(**options)
    with pytest.raises(ValueError, match=says):
        VTCConfig().updated(**options)


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


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_ratio_keeps_at_least_one_and_at_most_all(ratio, tokens):
    kept = kept_count(VTCConfig(ratio=ratio), tokens)
    assert 1 <= kept <= tokens
    assert ratio * tokens - 1e-5 <= kept <= ratio * tokens + 1


def test_keep_is_never_clamped():
    assert kept_count(VTCConfig(keep=576), 576) == 576
    with pytest.raises(ValueError, match=r"keep=577, but .* only 576 visual tokens.*at most 576.*keep=144"):
        kept_count(VTCConfig(keep=577), 576)

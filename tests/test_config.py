"""VTCConfig accepts what it says, refuses the rest with a message that helps, and kept_count rounds in one place."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtc import VTCConfig, kept_count


def test_defaults():
    assert VTCConfig() == VTCConfig(method="vtc-cls", keep=128, ensemble_layers=3, ensemble="sum", backend="auto")
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
        ({"ensemble": "median"}, "'sum', 'mean', 'max', 'min', got 'median'"),
        ({"fused": 1}, "True, False or None .*got 1"),
        ({"ensemble_layers": 0}, "ensemble_layers.*at least 1, got 0"),
        ({"start_layer": -1}, "start_layer.*at least 0, got -1"),
        ({"start_layer": 2.0}, "start_layer.*integer.*got 2.0"),
        ({"backend": "cuda"}, "'auto', 'triton', 'torch', got 'cuda'"),
        ({"seed": -1}, "seed.*at least 0, got -1"),
        ({"contextual": -1}, "contextual.*at least 0, got -1"),
        ({"contextual": 0.5}, "contextual.*integer.*got 0.5"),
        ({"adaptive_count": 1}, "adaptive_count must be True, False or None .*got 1"),
        ({"neighbors": 0}, "neighbors.*at least 1, got 0"),
    ],
)
def test_bad_values(options, says):
    with pytest.raises(ValueError, match=says):
        VTCConfig(**options)
    with pytest.raises(ValueError, match=says):
        VTCConfig().updated(**options)


def test_updated():
    config = VTCConfig(keep=64, ensemble_layers=2)
    assert config.updated() == config
    assert config.updated(ratio=0.5) == VTCConfig(ratio=0.5, ensemble_layers=2)
    assert config.updated(ratio=0.5).updated(keep=3) == VTCConfig(keep=3, ensemble_layers=2)
    assert config.updated(keep=None) == VTCConfig(ensemble_layers=2)
    assert config.updated(backend="torch").keep == 64
    with pytest.raises(ValueError, match=r"unknown option.*keeps; VTCConfig has method, keep, ratio"):
        config.updated(keeps=3)


@pytest.mark.parametrize("config", [VTCConfig(), VTCConfig(ratio=0.25), VTCConfig(keep=7, start_layer=1, seed=4)])
def test_round_trips(config):
    assert VTCConfig(**dataclasses.asdict(config)) == config
    assert VTCConfig().updated(**dataclasses.asdict(config)) == config
    assert pickle.loads(pickle.dumps(config)) == config


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

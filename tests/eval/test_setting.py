"""Settings and sweeps: names, what is accepted, and what a fingerprint holds."""

import pytest

from vtc.eval.setting import Setting, sweep


def test_labels_tell_settings_apart():
    assert Setting().label == "none"
    assert Setting("floor").label == "floor"
    assert Setting("vtc-cls", {"keep": 64}).label == "vtc-cls-64"
    assert Setting("vtc-cls", {"ratio": 0.25}).label == "vtc-cls-0.25"
    assert Setting("vtc-cls", {"keep": 64, "start_layer": 2, "ratio": None}).label == "vtc-cls-64-start_layer=2"
    assert Setting("prumerge+", {"keep": 64, "backend": "torch"}).label == "prumerge+-64-backend=torch"


def test_what_the_method_does_not_accept_is_refused_at_once():
    with pytest.raises(ValueError, match="baseline without options, got keep"):
        Setting("none", {"keep": 64})
    with pytest.raises(ValueError, match="baseline without options, got keep"):
        Setting("floor", {"keep": 64})
    with pytest.raises(ValueError, match="method must be one of"):
        Setting("best", {"keep": 64})
    with pytest.raises(ValueError, match="keep"):
        Setting("vtc-cls", {"keep": 0})
    with pytest.raises(ValueError, match="seed is an option of 'random'"):
        Setting("vtc-cls", {"keep": 64, "seed": 1})


def test_a_fingerprint_holds_defaults_too():
    """So that a default that changes with a new version is noticed."""
    short, long = Setting("vtc-cls", {"keep": 64}), Setting("vtc-cls", {"keep": 64, "ensemble_layers": 3})
    assert short.fingerprint() == long.fingerprint()
    assert short.fingerprint()["ensemble_layers"] == 3
    assert Setting("vtc-cls", {"keep": 64, "ensemble_layers": 2}).fingerprint() != short.fingerprint()
    assert Setting().fingerprint() == {"method": "none"}
    assert Setting("fastv", {"keep": 64}).fingerprint()["prune_layer"] == 2


def test_a_sweep_has_every_method_at_every_number_and_the_others_once():
    settings = sweep(["none", "vtc-cls", "prumerge", "floor"], [128, 64], start_layer=2)
    assert [setting.label for setting in settings] == [
        *("none", "vtc-cls-128-start_layer=2", "vtc-cls-64-start_layer=2", "prumerge", "floor")
    ]
    with pytest.raises(ValueError, match=r"no method of none, random has the option.s. start_layer"):
        sweep(["none", "random"], [64], start_layer=2)
    with pytest.raises(ValueError, match=r"unknown method 'best'; there are vtc-cls, .*, floor"):
        sweep(["best"], [64])

"""What vLLM's configs and requests may say to VTC. Needs no vLLM."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
from support import models
from transformers import Qwen2VLConfig

from vtc import tiny
from vtc.config import VTCConfig
from vtc.methods import METHODS
from vtc.methods.vtc_cls import VTCCLS
from vtc.vllm import register, versions
from vtc.vllm.settings import of_text, plan_of, requested, require, require_fewer, stored, text_of

SERVED = ("vtc-cls", "fastervlm", "visionzip", "coverage", "scope", "divprune", "vispruner", "hiprune", "received")
SERVED += ("random", "pool")


def config(given=None, family="llava", tower="clip_vision_model", **overrides):
    make, _, fixed = models.FAMILIES[family]
    vision = models.TOWERS[tower](num_hidden_layers=6, **models.SMALL)
    found = make(vision_config=vision, text_config={"model_type": "llama"}, **fixed | overrides)
    if given is not None:
        found.vtc = given
    return found


def test_without_settings_nothing_is_compressed() -> None:
    for given in (None, {"method": "none"}, {"method": "none", "keep": 9}):
        assert stored(config(given)) is None
        assert plan_of(config(given)) is None
        require(config(given), served=False, name="Other")


def test_settings_that_a_model_was_saved_with() -> None:
    saved = json.loads(json.dumps(VTCConfig.of(method="vtc-cls", keep=9, start_layer=2).to_dict()))
    plan = plan_of(config(saved))
    assert (plan.num_kept, plan.num_tokens, plan.scored) == (9, 36, range(2, 5))


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    given = {"method": method, "keep": 9}
    if method == "none":
        assert plan_of(config(given)) is None
    elif method in SERVED:
        assert plan_of(config(given)).num_outputs == 9
    else:
        with pytest.raises(ValueError, match=f"method '{re.escape(method)}' ") as caught:
            plan_of(config(given))
        assert "; use " in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": 37}, "keep=37, but an image of this model has only 36 visual tokens"),
        ({"keep": 0}, "keep must be"),
        ({"keep": 9, "ratio": 0.1}, "give one of them"),
        ({"kep": 9}, "unknown option"),
        ({"method": "vtc"}, "method must be one of"),
        ({"ensemble_layers": 9, "keep": 9}, "cannot score vision layers"),
        ({"prune_layer": 1, "keep": 9}, "vLLM's KV cache has as many tokens in every layer"),
        ({"schedule": [[0, 20], [1, 9]]}, "vLLM's KV cache has as many tokens in every layer"),
        ({"method": "prumerge+", "keep": 9}, "counts an image's tokens by its features"),
        ({"method": "prumerge", "keep": 9}, "counts an image's tokens by its features"),
        ({"positions": "original", "keep": 9}, "vLLM counts positions itself"),
        ({"fused": True, "keep": 9}, "leave fused out"),
        ({"method": "visionzip", "keep": 1}, "visionzip keeps"),
        (64, "they must be names and values"),
    ],
)
def test_settings_that_are_refused(given, says) -> None:
    with pytest.raises(ValueError, match=says):
        require(config(given), served=True, name="LlavaForConditionalGeneration")


def test_tiles_share_what_an_image_keeps() -> None:
    plan = plan_of(config({"keep": 40}, "llava_next"))
    assert (plan.num_tokens, plan.num_kept, plan.num_outputs) == (36, 0, 0)


def test_a_method_that_is_an_object_is_refused() -> None:
    class Mine(VTCCLS):
        name = "mine"

    with pytest.raises(ValueError, match="method 'mine' is an object, and vLLM's processes pass names"):
        plan_of(config({"method": Mine(), "keep": 9}))


def test_models_that_are_refused() -> None:
    given = {"keep": 9}
    with pytest.raises(ValueError, match=r"'qwen2_vl' \(Qwen2-VL.*not supported"):
        require(SimpleNamespace(vtc=given, model_type=Qwen2VLConfig.model_type), served=False, name="Qwen2VL")
    with pytest.raises(ValueError, match="other code for videos"):
        plan_of(config(given, "llava_next_video"))
    with pytest.raises(ValueError, match="which vLLM's LlavaOnevisionForConditionalGeneration would ignore"):
        require(config(given), served=False, name="LlavaOnevisionForConditionalGeneration")
    with pytest.raises(ValueError, match=r"needs a vision tower with a \[CLS\] token, and SigLIP has none"):
        plan_of(config(given, tower="siglip_vision_model", vision_feature_select_strategy="full"))
    siglip = config(given | {"method": "divprune"}, tower="siglip_vision_model", vision_feature_select_strategy="full")
    assert plan_of(siglip).num_outputs == 9
    with pytest.raises(ValueError, match="makes new tokens"):
        plan_of(config(given | {"method": "pool"}, "llava_next"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "random"}, "a request can set keep or ratio, got 'method'"),
        ({"keep": 3, "tiles": "equal"}, "got 'keep', 'tiles'"),
        ({"keep": "3"}, "keep must be"),
        ({"keep": 3, "ratio": 0.5}, "give one of them"),
        ("64", "they must be names and values"),
    ],
)
def test_requests_that_are_refused(given, says) -> None:
    with pytest.raises(ValueError, match=says):
        requested(VTCConfig(keep=9), given)


def test_requests() -> None:
    engine = VTCConfig.of(method="random", ratio=0.5, seed=7)
    assert requested(engine, None) == requested(engine, {}) == engine
    assert requested(engine, {"keep": 3}) == VTCConfig.of(method="random", keep=3, seed=7)
    require_fewer(9, 9)
    with pytest.raises(ValueError, match="asks for 10 tokens of an image, and this engine reserves memory for 9"):
        require_fewer(10, 9)


def test_text_of_settings_tells_them_apart() -> None:
    different = [
        VTCConfig(),
        VTCConfig(keep=64),
        VTCConfig(keep=65),
        VTCConfig(tiles="equal"),
        VTCConfig.of(ensemble_layers=2),
    ]
    assert len({text_of(each) for each in different}) == len(different)
    for each in different:
        assert of_text(text_of(copy.deepcopy(each))) == each


def test_what_vtc_env_says_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(version):
        found = {"vllm": [SimpleNamespace(version=version)] if version else []}
        monkeypatch.setattr(metadata, "distributions", lambda name: found.get(name, []))

    installed(None)
    assert versions.plug_in() == (None, False, "vLLM is not installed")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    installed("0.33.0")
    points = [SimpleNamespace(name="vtc")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == versions.GROUP else [])
    assert versions.plug_in()[:2] == ("0.33.0", True)
    monkeypatch.setenv("VLLM_PLUGINS", "other,vtc")
    assert versions.plug_in().loads
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert versions.plug_in()[1:] == (
        False,
        "VLLM_PLUGINS='other' leaves out 'vtc': models run with all visual tokens",
    )
    monkeypatch.delenv("VLLM_PLUGINS")
    points.clear()
    assert "install it with pip" in versions.plug_in().why
    points.append(SimpleNamespace(name="vtc"))
    for version in ("0.30.2", "0.34.0", "dev"):
        installed(version)
        assert f"this is {version}" in versions.plug_in().why


def test_the_entry_point_is_installed() -> None:
    (point,) = [point for point in metadata.entry_points(group=versions.GROUP) if point.name == versions.NAME]
    assert point.load().__module__ == "vtc.vllm"


@pytest.mark.parametrize(("version", "lines"), [("0.31.0", 0), ("0.33.1", 0), ("0.30.0", 1), ("1.0.0", 1), ("dev", 1)])
def test_one_line_if_vllm_is_untested(version: str, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("vllm.vtc")
    logger.addHandler(caplog.handler)
    versions.warn_if_untested.cache_clear()
    try:
        for _ in range(2):
            assert versions.warn_if_untested(version) == (not lines)
    finally:
        logger.removeHandler(caplog.handler)
        versions.warn_if_untested.cache_clear()
    assert len({id(record) for record in caplog.records}) == lines


def test_the_bundled_model() -> None:
    from transformers import AutoConfig

    bundled = AutoConfig.from_pretrained(tiny.CHECKPOINT)
    bundled.vtc = {"keep": 64}
    assert plan_of(bundled).num_outputs == 64


@pytest.mark.parametrize("version", ["9.9.0", "0.32.0"])
def test_a_vllm_without_what_vtc_needs(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown version serves models without settings, and refuses the others. A known one has to have it."""
    fake = ModuleType("vllm")
    registry = SimpleNamespace(inspect_model_cls=lambda architectures, model_config: (None, architectures[0]))
    fake.ModelRegistry, fake.__version__ = registry, version
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.config"):
        monkeypatch.setitem(sys.modules, name, None)
    if version == "0.32.0":
        with pytest.raises(ImportError):
            register()
        return
    register()
    register()
    name = "LlavaForConditionalGeneration"
    assert registry.inspect_model_cls([name], SimpleNamespace(hf_config=config())) == (None, name)
    with pytest.raises(ValueError, match=f"which vLLM's {name} would ignore"):
        registry.inspect_model_cls([name], SimpleNamespace(hf_config=config({"keep": 9})))

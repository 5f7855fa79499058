"""`vtc env`: versions, devices, and which backend each operation would use."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch
import typer

import vtc
from vtc import ops
from vtc.cli.output import print_table
from vtc.eval.ask import counted
from vtc.eval.model import ModelSpec, pick_device, pick_dtype
from vtc.hf import attention
from vtc.hf.graphs.model import why_not
from vtc.vllm.versions import plug_in


def environment() -> dict[str, Any]:
    """The JSON document: `versions`, `devices`, `backends`, `attention`, `flash_attn`, `graphs` and `vllm`."""
    installed = {
        name: next((found.version for found in metadata.distributions(name=name)), None)
        for name in ("triton", "transformers", "pillow", "flash-attn")
    }
    flash = installed.pop("flash-attn")
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"}
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        devices[f"cuda:{number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return {
        "versions": {
            "vtc": vtc.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with the CUDA it was built for
            **installed,
        },
        "devices": devices,
        "backends": {name: {op: _backend(op, torch.device(name)) for op in ops.OPS} for name in devices},
        "attention": {name: _plain_attention(torch.device(name)) for name in devices},
        "flash_attn": flash,
        "graphs": {name: _graphs(torch.device(name)) for name in devices},
        "vllm": plug_in()._asdict(),
    }


def about_model(model: str, revision: str | None = None, device: str | None = None) -> dict[str, Any]:
    """What VTC does with a model of a folder or the hub, or the bundled one, which is loaded to see it.

    `type`, of its config; `compresses`, `way` and the other attributes of what `vtc.status` returns, once the model is
    loaded with attn_implementation="vtc"; `text`, the same as text.

    Raises
    ------
    ValueError
        If it cannot be loaded, or is not supported.
    """
    where = pick_device(device)
    dtype = str(pick_dtype("auto", where)).removeprefix("torch.")
    spec = ModelSpec(model, str(where), dtype, revision, attn_implementation="vtc")
    found = vtc.status(spec.load())
    return {"model": model, "type": spec.config().model_type, **found.to_dict(), "text": str(found)}


def _backend(op: str, device: torch.device) -> dict[str, str]:
    try:
        choice, why = ops.backend_for(op, device)
    except ValueError as error:  # VTC_BACKEND asks for what this device cannot do, and `vtc env` shows that
        choice, why = "none", str(error)
    return {"backend": choice, "why": why}


def _graphs(device: torch.device) -> dict[str, Any]:
    why = why_not(device)
    return {"available": why is None, "why": why or "vtc.graphs(model) replays CUDA graphs"}


def _plain_attention(device: torch.device) -> dict[str, dict[str, str]]:
    choices = {dtype: attention.plain_attention(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {
        str(dtype).removeprefix("torch."): {"choice": choice, "why": why} for dtype, (choice, why) in choices.items()
    }


def show(found: dict[str, Any]) -> None:
    """Print what `environment` returned as tables."""
    versions = [(name, version or "not installed") for name, version in found["versions"].items()]
    print_table("versions", ("package", "version"), versions)
    print_table("devices", ("device", "what"), list(found["devices"].items()))
    rows = [(device, op, b["backend"], b["why"]) for device, of in found["backends"].items() for op, b in of.items()]
    print_table("backends", ("device", "operation", "backend", "why"), rows)
    rows = [
        (device, dtype, a["choice"], a["why"]) for device, of in found["attention"].items() for dtype, a in of.items()
    ]
    print_table("attention of layers without scores", ("device", "dtype", "choice", "why"), rows)
    graphs = [(device, "yes" if g["available"] else "no", g["why"]) for device, g in found["graphs"].items()]
    print_table("graphs", ("device", "available", "why"), graphs)
    typer.echo(f"flash-attn: {found['flash_attn'] or 'not installed'}")
    served = found["vllm"]
    typer.echo(f"vLLM: {served['version'] or 'not installed'}" + (f", {served['why']}" if served["version"] else ""))
    if about := found.get("model"):
        typer.echo(
            f'\n{about["model"]}, of type {about["type"]}, loaded with attn_implementation="vtc"\n{about["text"]}'
        )

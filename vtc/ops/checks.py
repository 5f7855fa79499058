"""Checks that several operations share. Each raises a `ValueError` that starts with the operation's name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_scale(op: str, scale: float | None) -> None:
    if scale is not None and not is_finite(scale):
        raise ValueError(f"{op}: scale must be a finite number or None, got {scale!r}. Use float(scale) of a number.")


def check_indices(op: str, indices: Tensor, num_images: int) -> None:
    if indices.ndim != 2 or len(indices) != num_images:
        raise ValueError(f"{op}: indices must be [B, K] with B = {num_images}, got {shapes(indices)}.")
    if indices.dtype != torch.int64:
        raise ValueError(f"{op}: indices must be int64, got {indices.dtype}. Use indices.long().")


def check_range(op: str, indices: Tensor, end: int, *, what: str = "indices", size: str = "N") -> None:
    """Only on the CPU: on a GPU the check would have to synchronise with the device."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{op}: {what} must lie in [0, {size}) = [0, {end}), got values from {low} to {high}.")


def check_devices(op: str, **tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {got}.")


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is a finite int or float. True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return False
    return math.isfinite(value)


def remedy(name: str, dtype: torch.dtype, tensor: Tensor) -> str:
    """How to give the argument `name` the `dtype`, for the end of a message; empty if it has it."""
    call = {torch.float32: "float", torch.bool: "bool", torch.int64: "long"}[dtype]
    return "" if tensor.dtype == dtype else f" Use {name}.{call}()."


def shapes(*tensors: Tensor) -> str:
    """The tensors' shapes, for a message."""
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)

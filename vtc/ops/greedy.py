"""The checks that `coverage` and `maxmin` share: greedy choices of k columns."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.checks import check_devices, is_int, remedy, shapes


def check_choices(
    op: str,
    name: str,
    matrix: Tensor,
    k: int,
    weight: Tensor | None,
    allowed: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Check the arguments of a greedy operation on `matrix`, its argument `name`."""
    if matrix.ndim != 3 or matrix.dtype != torch.float32 or 0 in matrix.shape[1:]:
        raise ValueError(
            f"{op}: {name} must be float32 [B, R, N] with at least one row and column, "
            f"got {matrix.dtype} {shapes(matrix)}.{remedy(name, torch.float32, matrix)}"
        )
    num_images, num_columns = matrix.shape[0], matrix.shape[2]
    if not is_int(k) or not 1 <= k <= num_columns:
        raise ValueError(f"{op}: k must be an int with 1 <= k <= N = {num_columns}, got {k!r}.")
    rows = [num_images, num_columns]
    for given, tensor, dtype, axes, size in (
        ("weight", weight, torch.float32, "[B, N]", rows),
        ("allowed", allowed, torch.bool, "[B, N]", rows),
        ("counts", counts, torch.int64, "[B]", rows[:1]),
    ):
        if tensor is not None and (tensor.dtype != dtype or list(tensor.shape) != size):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{op}: {given} must be {kind} {axes} = {size}, got {tensor.dtype} {shapes(tensor)}."
                f"{remedy(given, dtype, tensor)}"
            )
    check_devices(op, **{name: matrix, "weight": weight, "allowed": allowed, "counts": counts})


def check_counts(op: str, counts: Tensor | None, k: int) -> None:
    """Only on the CPU: on a GPU the check would have to synchronise with the device."""
    if counts is not None and counts.device.type == "cpu" and counts.numel():
        low, high = (int(bound) for bound in counts.aminmax())
        if low < 1 or high > k:
            raise ValueError(f"{op}: counts must lie in [1, k] = [1, {k}], got values from {low} to {high}.")


def fake(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`indices` and `order` without their values."""
    size = matrix.shape[0], k
    return matrix.new_empty(size, dtype=torch.int64), matrix.new_empty(size, dtype=torch.int64)

"""topk: the indices of the largest scores, in ascending order."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.checks import check_devices, is_int, shapes
from vtc.ops.dispatch import implementation, register

ENSEMBLES = ("sum", "mean", "max", "min")


def topk(
    scores: Tensor, k: int, *, ensemble: str = "sum", total: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Indices of the `k` largest scores of each row, ascending; ties go to the lower index, NaN counts as -inf.

    The result is always `k` different indices in [0, N), whatever the scores are. Not differentiable.

    Parameters
    ----------
    scores : Tensor[B, N] or [L, B, N] or [L, B, H, N], floating point
        Any strides. Heads are averaged, then layers are combined. The Triton kernel takes N < 2**21.
    k : int
        1 <= k <= N.
    ensemble : {"sum", "mean", "max", "min"}
        How the L layers are combined. A NaN in a layer makes the combination NaN.
    total : Tensor[B, N], float32 (float64 for float64 scores), optional
        The combined scores are written to it.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, K], int64

    Raises
    ------
    ValueError
        If `scores` is of no accepted shape or dtype, if `k` is not an int in [1, N], for an unknown ensemble or a
        `total` that does not fit, or if the backend cannot run.
    """
    num_images, num_tokens = check_scores("topk", scores, k, ensemble)
    check_devices("topk", scores=scores, total=total)
    dtype = dtype_of_total(scores)
    if total is not None and (total.dtype != dtype or total.shape != (num_images, num_tokens)):
        raise ValueError(
            f"topk: total must be {dtype} [B, N] = [{num_images}, {num_tokens}], got {total.dtype} {shapes(total)}."
        )
    return torch.ops.vtc.topk(scores.detach(), k, ensemble, total, backend)


def check_scores(op: str, scores: Tensor, k: int, ensemble: str) -> tuple[int, int]:
    """Check the arguments of an operation that takes the `k` largest scores; returns B and N."""
    if scores.ndim not in (2, 3, 4) or not scores.is_floating_point():
        raise ValueError(
            f"{op}: scores must be a floating-point [B, N], [L, B, N] or [L, B, H, N], "
            f"got {scores.dtype} {shapes(scores)}."
        )
    num_images, num_tokens = scores.shape[0 if scores.ndim == 2 else 1], scores.shape[-1]
    if not is_int(k) or not 1 <= k <= num_tokens:
        raise ValueError(f"{op}: k must be an int with 1 <= k <= N = {num_tokens} (one score per token), got {k!r}.")
    if ensemble not in ENSEMBLES:
        raise ValueError(f"{op}: ensemble must be one of {', '.join(ENSEMBLES)}, got {ensemble!r}.")
    if scores.ndim > 2 and 0 in (scores.shape[0], *scores.shape[2:-1]):
        raise ValueError(f"{op}: needs at least one layer and one head, got {shapes(scores)}.")
    return num_images, num_tokens


@register(
    "topk(Tensor scores, SymInt k, str ensemble, Tensor(a!)? total, str backend) -> Tensor",
    lambda scores, k, *_: scores.new_empty((scores.shape[scores.ndim > 2], k), dtype=torch.int64),
)
def _topk(scores: Tensor, k: int, ensemble: str, total: Tensor | None, backend: str) -> Tensor:
    return implementation("topk", scores.device, backend)(scores, k, ensemble=ensemble, total=total)


def dtype_of_total(scores: Tensor) -> torch.dtype:
    """That of combined scores."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32

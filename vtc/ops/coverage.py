"""coverage: greedy maximum coverage, as in SCOPE and MMTok."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc import reference
from vtc.ops import greedy, lazy
from vtc.ops.dispatch import implementation, register


def coverage(
    cover: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    allowed: Tensor | None = None,
    counts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Greedy maximum coverage: `k` columns, one after the other, each the one that adds most to what is covered.

    See `vtc.reference.coverage` for the formula. The kernel and, on the CPU, PyTorch evaluate few columns in most steps
    (lazy greedy, which is exact). Not differentiable. All backends choose the same columns in the same
    order. An image's choice does not depend on the other images of the batch.

    Parameters
    ----------
    cover : Tensor[B, R, N], float32
        How much column n covers of row r. The Triton kernel takes N <= 4096. Any strides; the kernel copies it unless
        its columns are contiguous, as `similarity` returns them.
    k : int
        1 <= k <= N.
    weight : Tensor[B, N], float32, optional
        Each column's gain is multiplied by it; 1 when not given.
    allowed : Tensor[B, N], bool, optional
        False at columns that may not be chosen; they are when no other is left, the lowest first.
    counts : Tensor[B], int64, optional
        How many columns an image chooses, 1 to k; k when not given.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    indices : Tensor[B, k], int64
        The chosen columns, ascending. Entries from an image's count on are 0.
    order : Tensor[B, k], int64
        The same in the order in which they are chosen.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a `k` that do not fit, and for a backend that cannot run. On the CPU also for
        counts outside [1, k].
    """
    greedy.check_choices("coverage", "cover", cover, k, weight, allowed, counts)
    weight = None if weight is None else weight.detach()
    return torch.ops.vtc.coverage(cover.detach(), k, weight, allowed, counts, backend)


@register(
    "coverage(Tensor cover, SymInt k, Tensor? weight, Tensor? allowed, Tensor? counts, str backend) -> "
    "(Tensor, Tensor)",
    lambda cover, k, *_: greedy.fake(cover, k),
)
def _coverage(
    cover: Tensor, k: int, weight: Tensor | None, allowed: Tensor | None, counts: Tensor | None, backend: str
) -> Any:
    greedy.check_counts("coverage", counts, k)
    run = implementation("coverage", cover.device, backend)
    if run is reference.coverage and cover.device.type == "cpu":
        run = lazy.coverage
    return run(cover, k, weight=weight, allowed=allowed, counts=counts)

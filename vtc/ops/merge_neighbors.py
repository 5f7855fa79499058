"""merge_neighbors: each target absorbs its most similar tokens, as in PruMerge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops import merging
from vtc.ops.checks import check_range, is_int
from vtc.ops.dispatch import implementation, register


def merge_neighbors(
    x: Tensor,
    key: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    neighbors: int,
    counts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each target absorbs its most similar tokens; the extra token absorbs all non-targets. Differentiable in `x`.

    See `vtc.reference.merge_neighbors` for the formula. An image's result does not depend on the other images of the
    batch, and repeated calls give the same bits.

    Parameters
    ----------
    x : Tensor[B, N, D], float32, float16 or bfloat16
        The tokens to merge; any strides, nothing is copied.
    key : Tensor[B, N, C], float32, float16 or bfloat16
        Compared by cosine similarity; any strides, nothing is copied. No gradient flows into it.
    targets : Tensor[B, K], int64
        The tokens to keep. Each in [0, N), unique in each image, in any order.
    weight : Tensor[B, N], float32
        The factor of a token where it is absorbed. No gradient flows into it.
    neighbors : int
        How many of its most similar tokens a target absorbs, at least 1; all others if there are fewer.
    counts : Tensor[B], int64, optional
        How many of an image's targets are valid, from the left, each in [0, K]; K when not given.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    features : Tensor[B, K + 1, D], the dtype of `x`
        The merged targets and the extra token: the weighted sum of the tokens that are not targets. Contiguous. With
        `counts`, an image's extra token comes right after its targets, and the rest is 0.
    mix : Tensor[B, K + 1, N], float32
        The weights: features = mix · x. Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, `neighbors` below 1, and for a backend that cannot run. On the
        CPU also for a target outside [0, N) and a count outside [0, K]; for a GPU see `compact`: the kernel takes
        zeros for such a target, and the nearest bound for such a count.
    """
    merging.check_tensors("merge_neighbors", x, key, targets, weight, counts)
    if not is_int(neighbors) or neighbors < 1:
        raise ValueError(f"merge_neighbors: neighbors must be an int of at least 1, got {neighbors!r}.")
    features, mix = torch.ops.vtc.merge_neighbors(x, key.detach(), targets, weight.detach(), neighbors, counts, backend)
    return features, mix.detach()


@register(
    "merge_neighbors(Tensor x, Tensor key, Tensor targets, Tensor weight, SymInt neighbors, Tensor? counts,"
    " str backend) -> (Tensor, Tensor)",
    lambda x, key, targets, *_: merging.fake(x, targets.shape[1] + 1),
)
def _merge_neighbors(
    x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, neighbors: int, counts: Tensor | None, backend: str
) -> Any:
    check_range("merge_neighbors", targets, x.shape[1], what="targets", size="N")
    if counts is not None:
        check_range("merge_neighbors", counts, targets.shape[1] + 1, what="counts", size="K + 1")
    function = implementation("merge_neighbors", x.device, backend)
    return function(x, key, targets, weight, neighbors=neighbors, counts=counts)


merging.register_gradient("merge_neighbors")

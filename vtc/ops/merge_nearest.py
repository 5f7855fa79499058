"""merge_nearest: each token joins its nearest target, as in VisionZip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops import merging
from vtc.ops.checks import check_range
from vtc.ops.dispatch import implementation, register


def merge_nearest(
    x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Each token joins its nearest target; a target absorbs the weighted mean of its tokens. Differentiable in `x`.

    See `vtc.reference.merge_nearest` for the formula. An image's result does not depend on the other images of the
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
        The weight of a token in the mean; a token of weight 0 joins no target. No gradient flows into it.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    features : Tensor[B, K, D], the dtype of `x`
        The merged targets. Contiguous.
    mix : Tensor[B, K, N], float32
        The weights: features = mix · x. Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, and for a backend that cannot run. On the CPU also for a target
        outside [0, N); for a GPU see `compact`: the kernel takes zeros for such a target.
    """
    merging.check_tensors("merge_nearest", x, key, targets, weight)
    features, mix = torch.ops.vtc.merge_nearest(x, key.detach(), targets, weight.detach(), backend)
    return features, mix.detach()


@register(
    "merge_nearest(Tensor x, Tensor key, Tensor targets, Tensor weight, str backend) -> (Tensor, Tensor)",
    lambda x, key, targets, *_: merging.fake(x, targets.shape[1]),
)
def _merge_nearest(x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, backend: str) -> Any:
    check_range("merge_nearest", targets, x.shape[1], what="targets", size="N")
    return implementation("merge_nearest", x.device, backend)(x, key, targets, weight)


merging.register_gradient("merge_nearest")

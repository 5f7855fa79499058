"""Every operation of VTC in plain PyTorch: the specification that the Triton kernels are tested against.

Same names and signatures as in `vtc.ops`. Nothing is validated here; `vtc.ops` does that before it calls anything.
Shapes: B images, H heads, N tokens, K kept tokens, D features.
"""

import torch
from torch import Tensor


def row_scores(
    query: Tensor, key: Tensor, *, scale: float | None = None, skip: int = 0, out: Tensor | None = None
) -> Tensor:
    """How much one query row attends to every key: softmax over the keys, averaged over the heads.

    ::

        scores[b, n] = 1/H Σ_h softmax_j(scale · query[b, h] · key[b, h, j])[n + skip],   j over all N keys

    The skipped keys stay in the softmax's denominator: with the [CLS] key at position 0 and ``skip=1`` these are the
    patches' shares of the [CLS] token's whole attention (VTC-CLS, arXiv 2412.05819).

    Parameters
    ----------
    query : Tensor[B, H, D], floating point
        The one row, for example the [CLS] token's.
    key : Tensor[B, H, N, D], same dtype
        Any strides.
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        How many leading columns are left out of the result.
    out : Tensor[B, N - skip], float32, optional
        The scores are added to it in place, which is how several layers are summed.

    Returns
    -------
    Tensor[B, N - skip], float32
        `out` if it was given. Computed in float32 whatever the inputs' dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # A product and a sum, not a matmul: batched matmuls may round an image differently when its batch mates change.
    logits = (query.float().unsqueeze(2) * key.float()).sum(dim=3) * scale  # [B, H, N]
    scores = logits.softmax(dim=2).mean(dim=1)[:, skip:]
    return scores.contiguous() if out is None else out.add_(scores)


def topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest scores of each row, in ascending order of the index.

    Ties go to the lower index (0.0 and -0.0 are a tie). NaN counts as -inf; such columns are taken when nothing better
    is left, so the result is always `k` different indices in [0, N).

    Parameters
    ----------
    scores : Tensor[B, N], floating point
        Any strides.
    k : int
        1 <= k <= N.

    Returns
    -------
    Tensor[B, K], int64
    """
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def compact(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of `x` by index, image by image: ``result[b, k] = x[b, indices[b, k]]``. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, D], any dtype
        Any strides.
    indices : Tensor[B, K], int64
        Each in [0, N). They need be neither sorted nor unique.

    Returns
    -------
    Tensor[B, K, D], the dtype of `x`
        Contiguous.
    """
    images = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x[images, indices].contiguous()

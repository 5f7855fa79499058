"""select: layers' scores combined, the k largest of each row, and the tokens that they belong to, in one launch.

Several programs share an image's tokens. Each finds all indices by itself, from registers, as `topk` does (see
`search`), and copies its own tokens: no program waits for another, and no index is read from memory. What a program
repeats is small beside a second launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import search, tuning
from .compact import as_integers, compact
from .topk import as_layers, combine, dtype_of_total, topk


def select(scores: Tensor, x: Tensor, k: int, *, ensemble: str = "sum") -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel. Rows of more than `tuning.SELECT_TOKENS` take the kernels of `topk` and `compact`."""
    layers = as_layers(scores)
    num_layers, num_images, num_heads, num_tokens = layers.shape
    dtype = dtype_of_total(scores)
    total = torch.empty((num_images, num_tokens), dtype=dtype, device=scores.device)
    if num_tokens > tuning.SELECT_TOKENS:
        indices = topk(scores, k, ensemble=ensemble, total=total)
        return compact(x, indices), indices, total
    indices = torch.empty((num_images, k), dtype=torch.int64, device=scores.device)
    features = torch.empty((num_images, k, *x.shape[2:]), dtype=x.dtype, device=x.device)
    source = as_integers(x).flatten(2)  # [B, N, C]
    num_features = source.shape[2]
    block_n, block_k, block_c, num_warps = tuning.select_blocks(num_tokens, num_features)
    with torch.cuda.device_of(scores):
        _select_kernel[(num_images, tuning.select_parts(num_images, triton.cdiv(k, block_k)))](
            # tensors
            layers,
            source,
            as_integers(features),
            indices,
            total,
            # strides
            *layers.stride(),
            *source.stride(),
            # scalars
            num_tokens,
            k,
            num_features,
            # constexprs
            NUM_LAYERS=num_layers,
            NUM_HEADS=num_heads,
            ENSEMBLE=ensemble,
            BITS=64 if dtype == torch.float64 else 32,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return features, indices, total


@triton.jit
def _select_kernel(
    # tensors
    scores_ptr,
    x_ptr,
    features_ptr,
    indices_ptr,
    total_ptr,
    # strides
    scores_stride_l,
    scores_stride_b,
    scores_stride_h,
    scores_stride_n,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    # scalars
    num_tokens,
    k,
    num_features,
    # constexprs
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ENSEMBLE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combined scores, ascending indices of the k largest, and their tokens; ties to the lower index, NaN as -inf.

    ::

        total[b, n]       = ENSEMBLE_l ( 1/H Σ_h scores[l, b, h, n] )
        indices[b]        = the columns of the k largest total[b], ascending; see `topk`
        features[b, i, c] = x[b, indices[b, i], c]

    Parameters
    ----------
    scores_ptr : fp32 | fp16 | bf16 (BITS = 32) | fp64 (BITS = 64) [L, B, H, N], N <= BLOCK_N
        Strides between layers, images, heads and tokens.
    x_ptr : uint8 | int16 | int32 | int64 [B, N, C]
        Strides between images, tokens and features.
    features_ptr : same dtype [B, k, C], contiguous
        Written, each element once.
    indices_ptr : int64 [B, k], contiguous
        Written, each element once: unique, ascending, in [0, N).
    total_ptr : fp32 (BITS = 32) | fp64 (BITS = 64) [B, N], contiguous
        Written, each element once.

    Program (b, p) of (B, P) finds all indices of image b, and copies the tokens of its blocks p, p + P, p + 2P, ... of
    BLOCK_K of them. Program (b, 0) also writes the image's indices and total. A program reads the L·H·N scores of its
    image, from L2 after the first one. All programs together read and write B·k·C elements of x.
    """
    # offsets
    FLOAT: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    scores_ptr += b * scores_stride_b
    scores_offsets = column.to(tl.int64) * scores_stride_n
    stride_l = tl.cast(scores_stride_l, tl.int64)
    stride_h = tl.cast(scores_stride_h, tl.int64)
    x_ptr += b * x_stride_b
    features_ptr += b * k * num_features

    # load, combine and compute; columns beyond the row's end are masked
    in_row = column < num_tokens
    total = combine(scores_ptr, stride_l, stride_h, scores_offsets, in_row, NUM_LAYERS, NUM_HEADS, ENSEMBLE, FLOAT)
    key = search.ordered(total, in_row, BITS)
    threshold, wanted_ties = search.kth_largest(key, None, 0, num_tokens, None, k, BITS, BLOCK_N, 1)
    kept, _ = search.among_largest(key, threshold, wanted_ties, 0)
    slot = tl.cumsum(kept.to(tl.int32), axis=0) - 1

    # store
    if tl.program_id(1) == 0:
        tl.store(total_ptr + b * num_tokens + column, total, mask=in_row)
        tl.store(indices_ptr + b * k + slot, column.to(tl.int64), mask=kept)
    slot = tl.where(kept, slot, -1)
    start = tl.program_id(1) * BLOCK_K
    while start < k:
        i = start + tl.arange(0, BLOCK_K)
        n = tl.sum(tl.where(slot[None, :] == i[:, None], column[None, :], 0), axis=1).to(tl.int64)
        first = 0
        while first < num_features:
            c = first + tl.arange(0, BLOCK_C)
            mask = (i < k)[:, None] & (c < num_features)[None, :]
            x = tl.load(x_ptr + n[:, None] * x_stride_n + c[None, :].to(tl.int64) * x_stride_c, mask=mask, other=0)
            tl.store(features_ptr + i[:, None].to(tl.int64) * num_features + c[None, :], x, mask=mask)
            first += BLOCK_C
        start += BLOCK_K * tl.num_programs(1)

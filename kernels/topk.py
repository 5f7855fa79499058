"""topk: layers' scores combined, and the indices of each row's k largest in ascending order, without sorting.

See `search` for how the k largest are found. The whole operation is one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import search, tuning


def topk(scores: Tensor, k: int, *, ensemble: str = "sum", total: Tensor | None = None) -> Tensor:
    """Launch the kernel. Takes fewer than 2**21 tokens; float64 scores are combined and compared as float64."""
    scores = as_layers(scores)
    num_layers, num_images, num_heads, num_tokens = scores.shape
    if num_tokens > search.MOST_TOKENS:
        raise ValueError(
            f"topk: the Triton kernel takes at most N = {search.MOST_TOKENS} scores per image, got {num_tokens}. Use "
            "backend='torch'."
        )
    dtype = dtype_of_total(scores)
    block_n, num_warps = tuning.topk_block(num_tokens)
    num_blocks = triton.cdiv(num_tokens, block_n)
    if total is None and num_blocks > 1:
        total = torch.empty((num_images, num_tokens), dtype=dtype, device=scores.device)

    indices = torch.empty((num_images, k), dtype=torch.int64, device=scores.device)
    with torch.cuda.device_of(scores):
        _topk_kernel[(num_images,)](
            # tensors
            scores,
            total,
            indices,
            # strides
            *scores.stride(),
            *((0, 0) if total is None else total.stride()),
            # scalars
            num_tokens,
            k,
            # constexprs
            NUM_LAYERS=num_layers,
            NUM_HEADS=num_heads,
            ENSEMBLE=ensemble,
            BITS=64 if dtype == torch.float64 else 32,
            BLOCK_N=block_n,
            NUM_BLOCKS=num_blocks,
            num_warps=num_warps,
        )
    return indices


def as_layers(scores: Tensor) -> Tensor:
    """Scores `[B, N]`, `[L, B, N]` or `[L, B, H, N]` as a view `[L, B, H, N]`."""
    if scores.ndim == 2:
        scores = scores[None]
    return scores[:, :, None] if scores.ndim == 3 else scores


def dtype_of_total(scores: Tensor) -> torch.dtype:
    """That of combined scores."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


@triton.jit
def combine(
    scores_ptr,
    stride_l,
    stride_h,
    offsets,
    mask,
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ENSEMBLE: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Mean over the heads, then sum, mean, maximum or minimum over the layers; a NaN stays a NaN."""
    combined = tl.zeros(offsets.shape, FLOAT)
    for layer in range(NUM_LAYERS):
        heads = tl.zeros(offsets.shape, FLOAT)
        # Unrolled, so that the loads of all heads are in flight together.
        for h in tl.static_range(NUM_HEADS):
            row_ptr = scores_ptr + layer * stride_l + h * stride_h
            heads += tl.load(row_ptr + offsets, mask=mask, other=0.0).to(FLOAT)
        if NUM_HEADS > 1:  # a division by 1 need not be exact
            heads /= NUM_HEADS
        if ENSEMBLE == "max":
            both = tl.maximum(combined, heads, propagate_nan=tl.PropagateNan.ALL)
            combined = tl.where(layer == 0, heads, both)
        elif ENSEMBLE == "min":
            both = tl.minimum(combined, heads, propagate_nan=tl.PropagateNan.ALL)
            combined = tl.where(layer == 0, heads, both)
        else:
            combined += heads
    return combined / NUM_LAYERS if ENSEMBLE == "mean" else combined


@triton.jit
def _topk_kernel(
    # tensors
    scores_ptr,
    total_ptr,
    indices_ptr,
    # strides
    scores_stride_l,
    scores_stride_b,
    scores_stride_h,
    scores_stride_n,
    total_stride_b,
    total_stride_n,
    # scalars
    num_tokens,
    k,
    # constexprs
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ENSEMBLE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Ascending indices of the k largest combined scores of each image; ties to the lower index, NaN as -inf.

    ::

        total[b, n] = ENSEMBLE_l ( 1/H Σ_h scores[l, b, h, n] )
        threshold   = the largest t with #{n : key[n] >= t} >= k            the k-th largest key, key = ordered(total)
        kept        = the columns with key[n] > threshold, and the first ones with key[n] = threshold: k in all

    Parameters
    ----------
    scores_ptr : fp32 | fp16 | bf16 (BITS = 32) | fp64 (BITS = 64) [L, B, H, N]
        Strides between layers, images, heads and tokens.
    total_ptr : fp32 (BITS = 32) | fp64 (BITS = 64) [B, N], or None
        Strides between images and tokens. Written, each element once. None only where NUM_BLOCKS = 1.
    indices_ptr : int64 [B, k], contiguous
        Written, each element once: k indices, unique, ascending, in [0, N).

    Program b processes one image. It reads L·H·N scores once, and passes BITS / 2 + 2 times over the combined scores.
    These stay in registers if they are one block (NUM_BLOCKS = 1); several blocks are read again from `total`, through
    the L1 cache. It writes 8·k bytes, and `total`.
    """
    # offsets
    FLOAT: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    image_ptr = scores_ptr + b * scores_stride_b
    stride_l = tl.cast(scores_stride_l, tl.int64)
    stride_h = tl.cast(scores_stride_h, tl.int64)
    if total_ptr is not None:
        total_ptr += b * total_stride_b

    # load, combine and store; columns beyond the row's end are masked
    if NUM_BLOCKS == 1:
        mask = column < num_tokens
        offsets = column * scores_stride_n
        total = combine(image_ptr, stride_l, stride_h, offsets, mask, NUM_LAYERS, NUM_HEADS, ENSEMBLE, FLOAT)
        if total_ptr is not None:
            tl.store(total_ptr + column * total_stride_n, total, mask=mask)
        key = search.ordered(total, mask, BITS)
    else:
        for block in range(NUM_BLOCKS):
            n = block * BLOCK_N + column
            mask = n < num_tokens
            offsets = n * scores_stride_n
            total = combine(image_ptr, stride_l, stride_h, offsets, mask, NUM_LAYERS, NUM_HEADS, ENSEMBLE, FLOAT)
            tl.store(total_ptr + n * total_stride_n, total, mask=mask)
        tl.debug_barrier()  # below, threads read what other threads of this program have written (see `tuning`)
        key = None  # loaded block by block

    # compute
    threshold, wanted_ties = search.kth_largest(
        key, total_ptr, total_stride_n, num_tokens, None, k, BITS, BLOCK_N, NUM_BLOCKS
    )

    # store
    seen_ties = 0
    written = 0
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        keys = key if NUM_BLOCKS == 1 else search.load_keys(total_ptr, total_stride_n, n, num_tokens, None, BITS)
        kept, seen_ties = search.among_largest(keys, threshold, wanted_ties, seen_ties)
        slot = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(indices_ptr + b * k + slot, n, mask=kept)
        written += tl.sum(kept.to(tl.int32), axis=0)

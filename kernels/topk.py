"""topk: layers' scores combined, and the indices of each row's k largest in ascending order, without sorting.

The k-th largest score is found by a search over the bits of an order-preserving integer key, two bits a pass. Knowing
it, one pass from left to right emits every larger score and as many equal ones as are still needed. So the indices come
out ascending, and ties go to the lower index, by construction. One launch does it all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc_kernels import tuning

ENSEMBLES = ("sum", "mean", "max", "min")
_MOST_TOKENS = 2**21 - 1  # three counts share an int64


def topk(scores: Tensor, k: int, *, ensemble: str = "sum", total: Tensor | None = None) -> Tensor:
    """Launch the kernel.

    Parameters
    ----------
    scores : Tensor[B, N] or [L, B, N] or [L, B, H, N], float32, float16, bfloat16 or float64
        Any strides; N < 2**21. Heads are averaged, then layers are combined.
    k : int
        1 <= k <= N.
    ensemble : {"sum", "mean", "max", "min"}
        How the L layers are combined.
    total : Tensor[B, N], float32 (float64 for float64 scores), optional
        The combined scores are written to it.

    Returns
    -------
    Tensor[B, K], int64
        Ascending, unique, in [0, N). Ties go to the lower index; NaN counts as -inf.
    """
    if scores.ndim not in (2, 3, 4) or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating-point [B, N], [L, B, N] or [L, B, H, N], got {scores.dtype} {list(scores.shape)}"
        )
    if scores.ndim == 2:
        scores = scores[None]
    if scores.ndim == 3:
        scores = scores[:, :, None]
    num_layers, num_images, num_heads, num_tokens = scores.shape
    if not 1 <= k <= num_tokens <= _MOST_TOKENS:
        raise ValueError(f"k must be in [1, N] = [1, {num_tokens}] and N at most {_MOST_TOKENS}, got {k}")
    if not num_layers or not num_heads or ensemble not in ENSEMBLES:
        raise ValueError(f"needs a layer, a head and one of {ENSEMBLES}, got {list(scores.shape)} and {ensemble!r}")
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    block_n, num_warps = tuning.topk_block(num_tokens)
    num_blocks = triton.cdiv(num_tokens, block_n)
    if total is None and num_blocks > 1:
        total = torch.empty((num_images, num_tokens), dtype=dtype, device=scores.device)
    if total is not None and (total.shape != (num_images, num_tokens) or total.dtype != dtype):
        raise ValueError(f"total must be {dtype} [{num_images}, {num_tokens}], got {total.dtype} {list(total.shape)}")
    if total is not None and total.device != scores.device:
        raise ValueError(f"tensors on different devices: {scores.device}, {total.device}")

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


@triton.jit
def _combine(
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
        # Unrolled, so that the loads of all heads are under way together.
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
def _ordered(score, in_row, BITS: tl.constexpr):
    """Scores as signed integers in the same order: NaN as -inf, -0.0 as the 0.0 it equals, padding below everything.

    The bits of a non-negative float, read as an integer, are ordered as the floats are. Those of a negative one are
    ordered the other way round, which flipping all bits but the sign puts right.
    """
    INT: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))

    score = tl.where(score != score, float("-inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(INT, bitcast=True)
    return tl.where(in_row, tl.where(bits < 0, bits ^ -(LOWEST + 1), bits), LOWEST)


@triton.jit
def _load_key(total_ptr, stride_n, n, num_tokens, BITS: tl.constexpr):
    """Combined scores that were stored before, as `_ordered` integers."""
    return _ordered(tl.load(total_ptr + n * stride_n, mask=n < num_tokens, other=0.0), n < num_tokens, BITS)


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
        threshold   = the largest t with #{n : key[n] >= t} >= k            the k-th largest key, key = _ordered(total)
        kept        = the columns with key[n] > threshold, and the first ones with key[n] = threshold: k in all

    Parameters
    ----------
    scores_ptr : fp32 | fp16 | bf16 (BITS = 32) | fp64 (BITS = 64) [L, B, H, N]
        Strides between layers, images, heads and tokens.
    total_ptr : fp32 (BITS = 32) | fp64 (BITS = 64) [B, N], or None
        Strides between images and tokens. Written, each element once. None only where NUM_BLOCKS = 1.
    indices_ptr : int64 [B, k], contiguous
        Written, each element once: k indices, unique, ascending, in [0, N).

    Program b processes one image. It reads L·H·N scores once, and passes BITS / 2 + 2 times over their combination,
    which stays in registers where it is one block (NUM_BLOCKS = 1) and comes back from `total`, by way of the L1 cache,
    where it is several. It writes 8·k bytes, and `total`.
    """
    # offsets
    FLOAT: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    INT: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    image_ptr = scores_ptr + b * scores_stride_b
    stride_l = tl.cast(scores_stride_l, tl.int64)
    stride_h = tl.cast(scores_stride_h, tl.int64)
    if total_ptr is not None:
        total_ptr += b * total_stride_b

    # load, combine and store; masked is what lies beyond the row's end
    if NUM_BLOCKS == 1:
        mask = column < num_tokens
        offsets = column * scores_stride_n
        total = _combine(image_ptr, stride_l, stride_h, offsets, mask, NUM_LAYERS, NUM_HEADS, ENSEMBLE, FLOAT)
        if total_ptr is not None:
            tl.store(total_ptr + column * total_stride_n, total, mask=mask)
        key = _ordered(total, mask, BITS)
    else:
        for block in range(NUM_BLOCKS):
            n = block * BLOCK_N + column
            mask = n < num_tokens
            offsets = n * scores_stride_n
            total = _combine(image_ptr, stride_l, stride_h, offsets, mask, NUM_LAYERS, NUM_HEADS, ENSEMBLE, FLOAT)
            tl.store(total_ptr + n * total_stride_n, total, mask=mask)
        tl.debug_barrier()  # below, threads read what other threads of this program have written (see `tuning`)

    # compute: the threshold's bits from the highest down, two a pass. A pass counts the keys at or above three
    # candidates, in three fields of one integer, so that the threads need to meet only once.
    threshold = tl.full([], -(2 ** (BITS - 1)), INT)
    for i in range(BITS // 2):
        quarter = tl.full([], 1, INT) << (BITS - 2 - 2 * i)
        reached = tl.zeros([BLOCK_N], tl.int64)
        for block in range(NUM_BLOCKS):
            if NUM_BLOCKS > 1:
                key = _load_key(total_ptr, total_stride_n, block * BLOCK_N + column, num_tokens, BITS)
            reached += (key >= threshold + quarter).to(tl.int64)
            reached += (key >= threshold + 2 * quarter).to(tl.int64) << 21
            reached += (key >= threshold + 3 * quarter).to(tl.int64) << 42
        counts = tl.sum(reached, axis=0)
        steps = ((counts & 0x1FFFFF) >= k).to(INT) + (((counts >> 21) & 0x1FFFFF) >= k).to(INT)
        threshold += (steps + ((counts >> 42) >= k).to(INT)) * quarter

    above = tl.zeros([BLOCK_N], tl.int32)
    for block in range(NUM_BLOCKS):
        if NUM_BLOCKS > 1:
            key = _load_key(total_ptr, total_stride_n, block * BLOCK_N + column, num_tokens, BITS)
        above += (key > threshold).to(tl.int32)
    wanted_ties = k - tl.sum(above, axis=0)

    # store
    seen_ties = 0
    written = 0
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        if NUM_BLOCKS > 1:
            key = _load_key(total_ptr, total_stride_n, n, num_tokens, BITS)
        tie = (key == threshold).to(tl.int32)
        kept = (key > threshold) | ((tie > 0) & (seen_ties + tl.cumsum(tie, axis=0) <= wanted_ties))
        slot = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(indices_ptr + b * k + slot, n, mask=kept)
        seen_ties += tl.sum(tie, axis=0)
        written += tl.sum(kept.to(tl.int32), axis=0)

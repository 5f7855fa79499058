"""topk: the indices of each row's k largest scores, in ascending order, without sorting.

The k-th largest score is found by a binary search over the bits of an order-preserving integer key. Knowing it, one
pass from left to right emits every larger score and as many equal ones as are still needed. So the indices come out
ascending, and ties go to the lower index, by construction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc_kernels import tuning


def topk(scores: Tensor, k: int) -> Tensor:
    """Launch the kernel.

    Parameters
    ----------
    scores : Tensor[B, N], float32, float16, bfloat16 or float64
        Any strides.
    k : int
        1 <= k <= N.

    Returns
    -------
    Tensor[B, K], int64
        Ascending, unique, in [0, N). Ties go to the lower index; NaN counts as -inf.
    """
    num_images, num_tokens = scores.shape
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if not 1 <= k <= num_tokens:
        raise ValueError(f"k must be in [1, N] = [1, {num_tokens}], got {k}")

    indices = torch.empty((num_images, k), dtype=torch.int64, device=scores.device)
    block_n, num_warps = tuning.topk_block(num_tokens)
    with torch.cuda.device_of(scores):
        _topk_kernel[(num_images,)](
            # tensors
            scores,
            indices,
            # strides
            *scores.stride(),
            # scalars
            num_tokens,
            k,
            # constexprs
            BITS=64 if scores.dtype == torch.float64 else 32,
            BLOCK_N=block_n,
            NUM_BLOCKS=triton.cdiv(num_tokens, block_n),
            num_warps=num_warps,
        )
    return indices


@triton.jit
def _load_keys(row_ptr, stride_n, n, num_tokens, BITS: tl.constexpr):
    """Scores as signed integers in the same order: NaN as -inf, -0.0 as the 0.0 it equals, padding below everything.

    The bits of a non-negative float, read as an integer, are ordered as the floats are. Those of a negative one are
    ordered the other way round, which flipping all bits but the sign puts right.
    """
    FLOAT: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    INT: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))

    in_row = n < num_tokens
    score = tl.load(row_ptr + n.to(tl.int64) * stride_n, mask=in_row, other=0.0).to(FLOAT)
    score = tl.where(score != score, float("-inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(INT, bitcast=True)
    return tl.where(in_row, tl.where(bits < 0, bits ^ -(LOWEST + 1), bits), LOWEST)


@triton.jit
def _topk_kernel(
    # tensors
    scores_ptr,
    indices_ptr,
    # strides
    scores_stride_b,
    scores_stride_n,
    # scalars
    num_tokens,
    k,
    # constexprs
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Ascending indices of the k largest scores of each row; ties to the lower index, NaN as -inf.

    ::

        threshold = the largest t with #{n : key[n] >= t} >= k          the k-th largest key
        kept      = the columns with key[n] > threshold, and the first ones with key[n] = threshold: k in all

    Parameters
    ----------
    scores_ptr : fp32 | fp16 | bf16 (BITS = 32) | fp64 (BITS = 64) [B, N]
        Strides between images and tokens.
    indices_ptr : int64 [B, k], contiguous
        Written, each element once: k indices, unique, ascending, in [0, N).

    Program b processes one row, NUM_BLOCKS blocks, and passes over it BITS + 2 times. A row is small (576 fp32 scores
    are 2.3 kB): it comes from memory once, N elements, and then from registers or the L1 cache. It writes 8·k bytes.
    """
    # offsets; the masks are in _load_keys
    INT: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    b = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + b * scores_stride_b
    column = tl.arange(0, BLOCK_N)

    # load and compute: the threshold's bits from the highest down, each one taken if k keys remain at or above it. The
    # search starts at the lowest integer of two's complement, from which 0 is reached by clearing the sign bit: hence
    # the exclusive or. With one block the compiler loads the keys once, ahead of the loop.
    threshold = tl.full([], -(2 ** (BITS - 1)), INT)
    for i in range(BITS):
        candidate = threshold ^ (tl.full([], 1, INT) << (BITS - 1 - i))
        reached = tl.zeros([BLOCK_N], tl.int32)
        for block in range(NUM_BLOCKS):
            key = _load_keys(row_ptr, scores_stride_n, block * BLOCK_N + column, num_tokens, BITS)
            reached += (key >= candidate).to(tl.int32)
        threshold = tl.where(tl.sum(reached, axis=0) >= k, candidate, threshold)

    above = tl.zeros([BLOCK_N], tl.int32)
    for block in range(NUM_BLOCKS):
        key = _load_keys(row_ptr, scores_stride_n, block * BLOCK_N + column, num_tokens, BITS)
        above += (key > threshold).to(tl.int32)
    wanted_ties = k - tl.sum(above, axis=0)

    # load, compute and store
    seen_ties = 0
    written = 0
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        key = _load_keys(row_ptr, scores_stride_n, n, num_tokens, BITS)
        tie = (key == threshold).to(tl.int32)
        kept = (key > threshold) | ((tie > 0) & (seen_ties + tl.cumsum(tie, axis=0) <= wanted_ties))
        slot = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(indices_ptr + b * k + slot, n.to(tl.int64), mask=kept)
        seen_ties += tl.sum(tie, axis=0)
        written += tl.sum(kept.to(tl.int32), axis=0)

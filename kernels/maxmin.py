"""maxmin: greedy max-min distance in one launch, one program per image for all its steps.

A step reads one row of the similarities, that of the token chosen last, and needs all of it. So there is nothing to
leave out: lazy evaluation, which spares `coverage` most of its reads, would spare none here.

Similarities are compared as integers of the same order, which the two highest integers extend: a token that is not
allowed comes after all similarities, a chosen one after everything. So the next token is the minimum of one array, and
with its index in the low bits of a wider integer that takes a single reduction, ties included.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import search, tuning
from .similarity import load_count


def maxmin(
    similarity: Tensor, k: int, *, allowed: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Takes at most 4096 tokens: a program holds a whole row."""
    num_images, num_tokens, _ = similarity.shape
    if num_tokens > tuning.GREEDY_COLUMNS:
        raise ValueError(
            f"maxmin: the Triton kernel takes at most N = {tuning.GREEDY_COLUMNS} tokens per image, got {num_tokens}. "
            "Use backend='torch'."
        )
    indices = torch.empty((num_images, k), dtype=torch.int64, device=similarity.device)
    order = torch.empty((num_images, k), dtype=torch.int64, device=similarity.device)
    block_m, block_n, num_warps = tuning.maxmin_blocks(num_tokens)
    with torch.cuda.device_of(similarity):
        _maxmin_kernel[(num_images,)](
            # tensors
            similarity,
            None if allowed is None else allowed.view(torch.uint8),
            counts,
            indices,
            order,
            # strides
            *similarity.stride(),
            *((0, 0) if allowed is None else allowed.stride()),
            0 if counts is None else counts.stride(0),
            # scalars
            num_tokens,
            k,
            # constexprs
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
    return indices, order


@triton.jit
def _maxmin_kernel(
    # tensors
    similarity_ptr,
    allowed_ptr,
    counts_ptr,
    indices_ptr,
    order_ptr,
    # strides
    similarity_stride_b,
    similarity_stride_m,
    similarity_stride_n,
    allowed_stride_b,
    allowed_stride_n,
    counts_stride_b,
    # scalars
    num_tokens,
    k,
    # constexprs
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The `k` tokens that greedy max-min distance chooses, in order and ascending.

    ::

        order[b, 0] = argmin_n max_{m allowed, m != n} similarity[b, m, n]
        order[b, i] = argmin_n max_{j < i} similarity[b, order[b, j], n]       n allowed and not chosen yet

    Parameters
    ----------
    similarity_ptr : fp32 [B, N, N], N <= BLOCK_N
        Strides between images, rows and columns. NaN counts as -inf, and -0.0 equals 0.0.
    allowed_ptr : uint8 [B, N], or None
        Strides between images and tokens. Tokens where it is 0 are chosen last, the lowest first.
    counts_ptr : int64 [B], or None
        Stride between images. How many tokens an image chooses: k where it is None.
    indices_ptr, order_ptr : int64 [B, k], contiguous
        Written, each element once. Entries from an image's count on are 0.

    Program b processes one image: first all N rows, BLOCK_M at a time, for the first token, then one row for each
    token. A tie goes to the lower index. All programs together read 4·B·N·(N + k) bytes, those of the k steps from L2,
    and write 16·B·k.
    """
    TAKEN: tl.constexpr = 2**31 - 1  # above the integer of every similarity, the highest of which is inf's
    LAST: tl.constexpr = 2**31 - 2

    # offsets
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    similarity_ptr += b * similarity_stride_b
    row_ptrs = similarity_ptr + n.to(tl.int64) * similarity_stride_n
    indices_ptr += b * k
    order_ptr += b * k

    # masks
    in_row = n < num_tokens
    count = load_count(counts_ptr, counts_stride_b, b, k)
    nearest = tl.where(in_row, -(2**31), TAKEN)
    if allowed_ptr is not None:
        allowed = tl.load(allowed_ptr + b * allowed_stride_b + n.to(tl.int64) * allowed_stride_n, mask=in_row, other=1)
        nearest = tl.where(allowed == 0, LAST, nearest)

    # loads and compute: each token's largest similarity to another one
    to_others = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    start = 0
    while start < num_tokens:
        m = start + tl.arange(0, BLOCK_M)
        competes = m < num_tokens
        offsets = m.to(tl.int64)[:, None] * similarity_stride_m
        similarity = tl.load(row_ptrs[None, :] + offsets, mask=competes[:, None] & in_row[None, :], other=0.0)
        if allowed_ptr is not None:
            allowed_ptrs = allowed_ptr + b * allowed_stride_b + m.to(tl.int64) * allowed_stride_n
            competes = tl.load(allowed_ptrs, mask=competes, other=0) != 0
        counted = competes[:, None] & (m[:, None] != n[None, :])  # a maximum ignores NaN
        to_others = tl.maximum(to_others, tl.max(tl.where(counted, similarity, float("-inf")), axis=0))
        start += BLOCK_M
    chosen = _first(tl.maximum(nearest, search.ordered(to_others, in_row, 32)), n)

    # loads, compute and store, one token after the other
    step = 0
    while step < count:
        tl.store(order_ptr + step, chosen)
        similarity = tl.load(row_ptrs + chosen * similarity_stride_m, mask=in_row, other=0.0)
        nearest = tl.maximum(nearest, search.ordered(similarity, in_row, 32))
        nearest = tl.where(n == chosen, TAKEN, nearest)
        chosen = _first(nearest, n)
        step += 1

    # store
    kept = in_row & (nearest == TAKEN)
    slot = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(indices_ptr + slot, n.to(tl.int64), mask=kept)
    left = (n >= count) & (n < k)
    tl.store(indices_ptr + n, tl.zeros((BLOCK_N,), tl.int64), mask=left)
    tl.store(order_ptr + n, tl.zeros((BLOCK_N,), tl.int64), mask=left)


@triton.jit
def _first(key, n):
    """The lowest index of the smallest key."""
    return tl.min((key.to(tl.int64) << 32) | n, axis=0) & 0xFFFFFFFF

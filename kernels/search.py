"""The k largest values of a row without sorting it: shared by `topk`, `select` and `merge_neighbors`.

The k-th largest value is found by a search over the bits of an order-preserving integer key, two bits a pass. A last
pass from left to right takes every larger key and as many equal ones as are still needed. So columns come out in
ascending order, and ties go to the lower column, by construction.

A row of one block stays in registers (`key`). A longer one is read again in every pass, through the L1 cache.
"""

import triton
import triton.language as tl

MOST_TOKENS = 2**21 - 1  # three counts share an int64


@triton.jit
def ordered(value, in_row, BITS: tl.constexpr):
    """Floats as signed integers in the same order: NaN as -inf, -0.0 as the 0.0 it equals, padding below everything.

    The bits of a non-negative float, read as an integer, have the order of the floats. Those of a negative float have
    the reverse order; flipping all bits but the sign corrects it.
    """
    INT: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))

    value = tl.where(value != value, float("-inf"), value)
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(INT, bitcast=True)
    return tl.where(in_row, tl.where(bits < 0, bits ^ -(LOWEST + 1), bits), LOWEST)


@triton.jit
def load_keys(row_ptr, stride_n, n, num_tokens, excluded, BITS: tl.constexpr):
    """The keys of columns n of a row of floats. Padding and the column `excluded`, if it is not None, are lowest."""
    value = tl.load(row_ptr + n * stride_n, mask=n < num_tokens, other=0.0)
    competes = n < num_tokens
    if excluded is not None:
        competes = competes & (n != excluded)
    return ordered(value, competes, BITS)


@triton.jit
def kth_largest(
    key,
    row_ptr,
    stride_n,
    num_tokens,
    excluded,
    k,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """The k-th largest key of a row, and how many of those equal to it belong to the k largest.

    ::

        threshold = the largest t with #{n : key[n] >= t} >= k

    `key` holds the whole row if NUM_BLOCKS = 1. Otherwise it is not used, and the keys are loaded from the row,
    BITS / 2 + 1 times.
    """
    INT: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    column = tl.arange(0, BLOCK_N).to(tl.int64)

    # The threshold's bits from the highest down, two a pass. A pass counts the keys at or above three candidates, in
    # three fields of one integer, so that the threads synchronise only once.
    threshold = tl.full([], -(2 ** (BITS - 1)), INT)
    for i in range(BITS // 2):
        quarter = tl.full([], 1, INT) << (BITS - 2 - 2 * i)
        reached = tl.zeros([BLOCK_N], tl.int64)
        for block in range(NUM_BLOCKS):
            n = block * BLOCK_N + column
            keys = key if NUM_BLOCKS == 1 else load_keys(row_ptr, stride_n, n, num_tokens, excluded, BITS)
            reached += (keys >= threshold + quarter).to(tl.int64)
            reached += (keys >= threshold + 2 * quarter).to(tl.int64) << 21
            reached += (keys >= threshold + 3 * quarter).to(tl.int64) << 42
        counts = tl.sum(reached, axis=0)
        steps = ((counts & 0x1FFFFF) >= k).to(INT) + (((counts >> 21) & 0x1FFFFF) >= k).to(INT)
        threshold += (steps + ((counts >> 42) >= k).to(INT)) * quarter

    above = tl.zeros([BLOCK_N], tl.int32)
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        keys = key if NUM_BLOCKS == 1 else load_keys(row_ptr, stride_n, n, num_tokens, excluded, BITS)
        above += (keys > threshold).to(tl.int32)
    return threshold, k - tl.sum(above, axis=0)


@triton.jit
def among_largest(key, threshold, wanted_ties, seen_ties):
    """Which keys of a block are among the k largest of their row, and the ties seen so far, this block included."""
    tie = (key == threshold).to(tl.int32)
    kept = (key > threshold) | ((tie > 0) & (seen_ties + tl.cumsum(tie, axis=0) <= wanted_ties))
    return kept, seen_ties + tl.sum(tie, axis=0)

"""coverage: greedy maximum coverage. All k steps of all images are one launch.

The evaluation is lazy, and exact. What is covered never falls, so no gain ever rises, in floating point either: a sum
in a fixed order is monotone. The last gain of a column is therefore a bound of its next one. If the column with the
largest bound has been evaluated since the last choice, it is the column with the largest gain, ties included.
Otherwise it is evaluated, and the best columns of 15 other strata with it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .similarity import load_count

# The bound of a column, as an integer. A gain is at least 0, and its bits are ordered as gains are. No gain has these:
_UNKNOWN = tl.constexpr(0x7FFFFFFF)  # above inf: every column is evaluated before the first choice
_NOT_ALLOWED = tl.constexpr(-1)
_CHOSEN = tl.constexpr(-2)
_PADDING = tl.constexpr(-3)


def coverage(
    cover: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    allowed: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Takes at most 4096 columns. Columns that are not contiguous are copied first."""
    num_images, num_rows, num_columns = cover.shape
    if num_columns > tuning.GREEDY_COLUMNS:
        raise ValueError(
            f"coverage: the Triton kernel takes at most N = {tuning.GREEDY_COLUMNS} columns per image, got "
            f"{num_columns}. Use backend='torch'."
        )
    columns = cover.mT if cover.stride(1) == 1 else cover.mT.contiguous()
    block_r, block_l, block_m, block_g, block_w = tuning.coverage_blocks(num_rows, num_columns)
    covered = torch.empty((num_images, num_rows), dtype=torch.float32, device=cover.device)
    indices = torch.empty((num_images, k), dtype=torch.int64, device=cover.device)
    order = torch.empty((num_images, k), dtype=torch.int64, device=cover.device)
    with torch.cuda.device_of(cover):
        _coverage_kernel[(num_images,)](
            # tensors
            columns,
            weight,
            None if allowed is None else allowed.view(torch.uint8),
            counts,
            covered,
            indices,
            order,
            # strides
            *columns.stride()[:2],
            *((0, 0) if weight is None else weight.stride()),
            *((0, 0) if allowed is None else allowed.stride()),
            0 if counts is None else counts.stride(0),
            # scalars
            num_rows,
            num_columns,
            k,
            # constexprs
            NUM_BLOCKS=triton.cdiv(num_rows, block_r),
            BLOCK_R=block_r,
            BLOCK_L=block_l,
            BLOCK_M=block_m,
            BLOCK_G=block_g,
            BLOCK_W=block_w,
            num_warps=8,
        )
    return indices, order


@triton.jit
def _encode(bound, n, fresh):
    """A bound, its column and whether it is a gain as of now, as an integer: the largest has the lowest column."""
    return (bound.to(tl.int64) << 32) | ((4095 - n) << 1) | fresh


@triton.jit
def _decode(key):
    """The bound and the column, and whether no evaluation would change the bound."""
    bound = (key >> 32).to(tl.int32)
    n = 4095 - ((key >> 1) & 4095).to(tl.int32)
    return bound, n, ((key & 1) != 0) | (bound <= 0)


@triton.jit
def _terms(cover_ptrs, stale, covered_ptr, r, num_rows, num_covered):
    """What the rows r of the stale columns add to what is covered; rows from `num_covered` on cover 0."""
    cover = tl.load(cover_ptrs + r, mask=(r < num_rows) & stale, other=0.0)
    covered = tl.load(covered_ptr + r, mask=r < num_covered, other=0.0)
    return tl.where(cover > covered, cover - covered, 0.0)


@triton.jit
def _lane_sums(
    cover_ptrs,
    stale,
    covered_ptr,
    num_rows,
    num_covered,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The sums [BLOCK_L, G] of the rows FIRST, FIRST + STEP, ... and the BLOCK_L - 1 after each, the upper half last.

    The function calls itself for either half: the registers would not hold a tile of all rows.
    """
    if STEP < BLOCK_R:
        lower = _lane_sums(
            cover_ptrs, stale, covered_ptr, num_rows, num_covered, FIRST, 2 * STEP, NUM_BLOCKS, BLOCK_R, BLOCK_L
        )
        upper = _lane_sums(
            cover_ptrs, stale, covered_ptr, num_rows, num_covered, FIRST + STEP, 2 * STEP, NUM_BLOCKS, BLOCK_R, BLOCK_L
        )
        total = lower + upper
    else:
        r = FIRST + tl.arange(0, BLOCK_L)[:, None]
        total = _terms(cover_ptrs, stale, covered_ptr, r, num_rows, num_covered)
        if NUM_BLOCKS > 1:
            start = BLOCK_R
            while start < num_rows:
                total += _terms(cover_ptrs, stale, covered_ptr, start + r, num_rows, num_covered)
                start += BLOCK_R
    return total


@triton.jit
def _coverage_kernel(
    # tensors
    cover_ptr,
    weight_ptr,
    allowed_ptr,
    counts_ptr,
    covered_ptr,
    indices_ptr,
    order_ptr,
    # strides
    cover_stride_b,
    cover_stride_n,
    weight_stride_b,
    weight_stride_n,
    allowed_stride_b,
    allowed_stride_n,
    counts_stride_b,
    # scalars
    num_rows,
    num_columns,
    k,
    # constexprs
    NUM_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Greedy maximum coverage: the columns of each image that add most to what is covered, one after the other.

    ::

        covered[r] = 0
        count times:  gain[n]    = weight[n] · Σ_r max(0, cover[b, r, n] - covered[r])
                      choose     n with the largest gain; a tie goes to the lower index
                      covered[r] = max(covered[r], cover[b, r, n])

    Parameters
    ----------
    cover_ptr : fp32 [B, R, N]
        Strides between images and columns; the rows of a column are contiguous. A term whose entry is NaN is 0. The
        terms r, r + 1024, ... are added one after the other, then the upper half of these sums to the lower half, until
        one is left.
    weight_ptr : fp32 [B, N], or None
        Strides between images and columns. One that is NaN or not above 0 makes the gain 0. None: 1.
    allowed_ptr : uint8 [B, N], or None
        Strides between images and columns. Columns where it is 0 are chosen when no other is left, the lowest first.
    counts_ptr : int64 [B], or None
        Stride between images; count = counts[b], at most k. None: k.
    covered_ptr : fp32 [B, R], contiguous
        Scratch, overwritten.
    indices_ptr, order_ptr : int64 [B, k], contiguous
        Written: the chosen columns, ascending, and as they are chosen; from count on 0.

    Program b processes one image, all N columns and NUM_BLOCKS blocks of BLOCK_R rows. The columns lie in BLOCK_G
    strata of BLOCK_M·BLOCK_W; column n is in stratum n % BLOCK_G. A round finds the best bound of each stratum, chooses
    the best of all if it is a gain as of now, and evaluates those that are not. It reads up to 4·BLOCK_G·R bytes of
    columns, most of them again from L1 or L2. The bounds stay in registers.
    """
    # offsets
    b = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)[:, None, None]
    g = tl.arange(0, BLOCK_G)[None, :, None]
    n = (m * BLOCK_W + tl.arange(0, BLOCK_W)[None, None, :]) * BLOCK_G + g
    cover_ptr += b * cover_stride_b
    if weight_ptr is not None:
        weight_ptr += b * weight_stride_b
    if allowed_ptr is not None:
        allowed_ptr += b * allowed_stride_b
    covered_ptr += b * num_rows
    indices_ptr += b * k
    order_ptr += b * k
    count = load_count(counts_ptr, counts_stride_b, b, k)

    # loads, compute and store, one round after the other
    key = _encode(tl.where(n < num_columns, _UNKNOWN, _PADDING), n, 0)
    step = 0
    while step < count:
        top = tl.max(tl.max(key, axis=0), axis=1)  # [BLOCK_G]
        top_bound, top_n, top_final = _decode(top)
        _, best_n, final = _decode(tl.max(top, axis=0))
        if final:  # choose it; every other gain becomes a bound
            tl.store(order_ptr + step, best_n.to(tl.int64))
            tl.debug_barrier()  # other threads of this program have read what is covered (see `tuning`)
            for block in range(NUM_BLOCKS):
                r = block * BLOCK_R + tl.arange(0, BLOCK_R)
                covered = tl.load(covered_ptr + r, mask=r < tl.where(step > 0, num_rows, 0), other=0.0)
                offsets = best_n.to(tl.int64) * cover_stride_n + r
                best = tl.load(cover_ptr + offsets, mask=r < num_rows, other=0.0)
                tl.store(covered_ptr + r, tl.where(best > covered, best, covered), mask=r < num_rows)
            tl.debug_barrier()
            key = tl.where(n == best_n, _encode(tl.full(n.shape, _CHOSEN, tl.int32), n, 0), key & -2)
            stale = (top_bound > 0) & (top_n != best_n)
            step += 1
        else:
            stale = ~top_final

        cover_ptrs = (cover_ptr + top_n.to(tl.int64) * cover_stride_n)[None, :]
        num_covered = tl.where(step > 0, num_rows, 0)
        total = _lane_sums(
            cover_ptrs, stale[None, :], covered_ptr, num_rows, num_covered, 0, BLOCK_L, NUM_BLOCKS, BLOCK_R, BLOCK_L
        )
        for _ in tl.static_range(10):
            if total.shape[0] > 1:  # a sum of two is the same in either order
                total = tl.sum(tl.reshape(total, [2, total.shape[0] // 2, BLOCK_G]), axis=0)
        gain = tl.reshape(total, [BLOCK_G])
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + top_n.to(tl.int64) * weight_stride_n, mask=stale, other=0.0)
            gain = tl.where((weight > 0) & (gain > 0), weight * gain, 0.0)
        bound = gain.to(tl.int32, bitcast=True)
        if allowed_ptr is not None:
            allowed = tl.load(allowed_ptr + top_n.to(tl.int64) * allowed_stride_n, mask=stale, other=0)
            bound = tl.where(allowed != 0, bound, _NOT_ALLOWED)
        evaluated = _encode(bound, top_n, 1)
        key = tl.where((n == top_n[None, :, None]) & stale[None, :, None], evaluated[None, :, None], key)

    # store: the columns in their order, and zeros after them
    flag = (key >> 32 == _CHOSEN).to(tl.int32)
    flag = tl.reshape(tl.permute(flag, (0, 2, 1)), [BLOCK_M * BLOCK_W * BLOCK_G])
    column = tl.arange(0, BLOCK_M * BLOCK_W * BLOCK_G)
    tl.store(indices_ptr + tl.cumsum(flag, axis=0) - 1, column.to(tl.int64), mask=flag > 0)
    unused = (column >= count) & (column < k)
    tl.store(indices_ptr + column, tl.zeros(column.shape, tl.int64), mask=unused)
    tl.store(order_ptr + column, tl.zeros(column.shape, tl.int64), mask=unused)

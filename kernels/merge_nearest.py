"""merge_nearest: each token joins its nearest target; a target absorbs the weighted mean of its tokens. VisionZip."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .similarity import cosine_similarity, weighted_sum


def merge_nearest(x: Tensor, key: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Launch four kernels. A target outside [0, N) has a key and features of zeros."""
    num_images, num_tokens, _ = x.shape
    num_targets = targets.shape[1]
    similarity = cosine_similarity(key, targets)
    nearest = torch.empty((num_images, num_tokens), dtype=torch.int32, device=x.device)
    mix = torch.empty((num_images, num_targets, num_tokens), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        block_k, block_n = tuning.nearest_blocks()
        _nearest_kernel[(num_images * triton.cdiv(num_tokens, block_n),)](
            # tensors
            similarity,
            targets,
            weight,
            nearest,
            # strides
            *targets.stride(),
            *weight.stride(),
            # scalars
            num_tokens,
            num_targets,
            # constexprs
            BLOCK_K=block_k,
            BLOCK_N=block_n,
        )
        block_n, num_warps = tuning.mix_block(num_tokens)
        _members_kernel[(num_images * num_targets,)](
            # tensors
            nearest,
            targets,
            weight,
            mix,
            # strides
            *targets.stride(),
            *weight.stride(),
            # scalars
            num_tokens,
            num_targets,
            # constexprs
            NUM_BLOCKS=triton.cdiv(num_tokens, block_n),
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
    return weighted_sum(mix, x), mix


@triton.jit
def _nearest_kernel(
    # tensors
    similarity_ptr,
    targets_ptr,
    weight_ptr,
    nearest_ptr,
    # strides
    targets_stride_b,
    targets_stride_k,
    weight_stride_b,
    weight_stride_n,
    # scalars
    num_tokens,
    num_targets,
    # constexprs
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The target that each token joins, if it joins one.

    ::

        nearest[b, n] = argmax_k similarity[b, k, n];  -1 where n is a target or weight[b, n] = 0

    Parameters
    ----------
    similarity_ptr : fp32 [B, K, N], contiguous
        NaN counts as -inf. Ties go to the lower k.
    targets_ptr : int64 [B, K]
        Strides between images and targets.
    weight_ptr : fp32 [B, N]
        Strides between images and tokens.
    nearest_ptr : int32 [B, N], contiguous
        Written.

    Program b·ceil(N / BLOCK_N) + j processes BLOCK_N tokens of one image, BLOCK_K targets at a time. All programs
    together read 4·B·K·N bytes and write 4·B·N.
    """
    # offsets
    token_blocks = tl.cdiv(num_tokens, BLOCK_N)
    b = (tl.program_id(0) // token_blocks).to(tl.int64)
    n = (tl.program_id(0) % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)

    # masks
    in_row = n < num_tokens

    # loads and compute, one block of targets after the other: ties go to the first
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    nearest = tl.full((BLOCK_N,), -1, tl.int32)
    excluded = tl.load(weight_ptr + b * weight_stride_b + n * weight_stride_n, mask=in_row, other=0.0) == 0.0
    start = 0
    while start < num_targets:
        k = start + tl.arange(0, BLOCK_K)
        is_target = (k < num_targets)[:, None]
        similarity_offsets = (b * num_targets + k[:, None]) * num_tokens + n[None, :]
        similarity = tl.load(similarity_ptr + similarity_offsets, mask=is_target & in_row[None, :], other=float("-inf"))
        similarity = tl.where(similarity != similarity, float("-inf"), similarity)
        highest = tl.max(similarity, axis=0)
        found = tl.where((similarity == highest[None, :]) & is_target, k[:, None], num_targets)
        better = (highest > best) | (nearest < 0)
        nearest = tl.where(better, tl.min(found, axis=0), nearest)
        best = tl.where(better, highest, best)
        t = tl.load(
            targets_ptr + b * targets_stride_b + k.to(tl.int64) * targets_stride_k, mask=k < num_targets, other=-1
        )
        excluded = excluded | (tl.max((t[:, None] == n[None, :]).to(tl.int32), axis=0) > 0)
        start += BLOCK_K

    # store
    tl.store(nearest_ptr + b * num_tokens + n, tl.where(excluded, -1, nearest), mask=in_row)


@triton.jit
def _members_kernel(
    # tensors
    nearest_ptr,
    targets_ptr,
    weight_ptr,
    mix_ptr,
    # strides
    targets_stride_b,
    targets_stride_k,
    weight_stride_b,
    weight_stride_n,
    # scalars
    num_tokens,
    num_targets,
    # constexprs
    NUM_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weights of the tokens that join a target: those of their weighted mean.

    ::

        mix[b, k, n] = 1                                                    n = targets[b, k]
                     = weight[b, n] / Σ_m [nearest[b, m] = k] weight[b, m]  nearest[b, n] = k
                     = 0                                                    otherwise

    Parameters
    ----------
    nearest_ptr : int32 [B, N], contiguous
        From `_nearest_kernel`.
    targets_ptr : int64 [B, K]
        Strides between images and targets.
    weight_ptr : fp32 [B, N]
        Strides between images and tokens.
    mix_ptr : fp32 [B, K, N], contiguous
        Written.

    Program b·K + k processes one row of mix. It reads 8·N bytes twice and writes 4·N bytes.
    """
    # offsets
    b = (tl.program_id(0) // num_targets).to(tl.int64)
    k = (tl.program_id(0) % num_targets).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    nearest_ptr += b * num_tokens
    weight_ptr += b * weight_stride_b
    mix_ptr += (b * num_targets + k) * num_tokens
    t = tl.load(targets_ptr + b * targets_stride_b + k * targets_stride_k)

    # loads, compute and store
    sums = tl.zeros([BLOCK_N], tl.float32)
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        member = tl.load(nearest_ptr + n, mask=n < num_tokens, other=-1) == k
        sums += tl.load(weight_ptr + n * weight_stride_n, mask=member, other=0.0)
    total = tl.sum(sums, axis=0)
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        member = tl.load(nearest_ptr + n, mask=n < num_tokens, other=-1) == k
        share = tl.load(weight_ptr + n * weight_stride_n, mask=member, other=0.0) / total
        tl.store(mix_ptr + n, tl.where(n == t, 1.0, tl.where(member, share, 0.0)), mask=n < num_tokens)

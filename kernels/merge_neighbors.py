"""merge_neighbors: each target absorbs its most similar tokens; the extra token absorbs all non-targets. PruMerge."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import search, tuning
from .similarity import cosine_similarity, load_count, weighted_sum


def merge_neighbors(
    x: Tensor,
    key: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    neighbors: int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch three kernels. A target outside [0, N) has a key and features of zeros; counts above K count as K.

    Takes fewer than 2**21 tokens.
    """
    num_images, num_tokens, _ = x.shape
    num_targets = targets.shape[1]
    if num_tokens > search.MOST_TOKENS:
        raise ValueError(
            f"merge_neighbors: the Triton kernel takes at most N = {search.MOST_TOKENS} tokens per image, got "
            f"{num_tokens}. Use backend='torch'."
        )
    similarity = cosine_similarity(key, targets, counts)
    mix = torch.empty((num_images, num_targets + 1, num_tokens), dtype=torch.float32, device=x.device)
    block_n, num_warps = tuning.mix_block(num_tokens)
    with torch.cuda.device_of(x):
        _neighbors_kernel[(num_images * (num_targets + 1),)](
            # tensors
            similarity,
            targets,
            weight,
            counts,
            mix,
            # strides
            *targets.stride(),
            *weight.stride(),
            0 if counts is None else counts.stride(0),
            # scalars
            num_tokens,
            num_targets,
            min(neighbors, num_tokens - 1),
            # constexprs
            NUM_BLOCKS=triton.cdiv(num_tokens, block_n),
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
    return weighted_sum(mix, x, counts), mix


@triton.jit
def _neighbors_kernel(
    # tensors
    similarity_ptr,
    targets_ptr,
    weight_ptr,
    counts_ptr,
    mix_ptr,
    # strides
    targets_stride_b,
    targets_stride_k,
    weight_stride_b,
    weight_stride_n,
    counts_stride_b,
    # scalars
    num_tokens,
    num_targets,
    neighbors,
    # constexprs
    NUM_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weights of each target's most similar other tokens, and those of the extra token: all non-targets.

    ::

        mix[b, k, n] = 1            n = t                                                   k < count, t = targets[b, k]
                     = weight[b, n] n one of the `neighbors` most similar to t, n ≠ t
                     = 0            otherwise
        mix[b, count, n] = weight[b, n] where n is no target, 0 where it is
        mix[b, k, n] = 0            k > count

    Parameters
    ----------
    similarity_ptr : fp32 [B, K, N], contiguous
        NaN counts as -inf. Ties go to the lower index.
    targets_ptr : int64 [B, K]
        Strides between images and targets.
    weight_ptr : fp32 [B, N]
        Strides between images and tokens.
    counts_ptr : int64 [B], or None
        Stride between images; count = counts[b], or K.
    mix_ptr : fp32 [B, K + 1, N], contiguous
        Written.

    Program b·(K + 1) + k processes one row of mix. It finds the similarity of the last neighbor as `search` does: 18
    passes over N similarities, in registers if they are one block, else from L1.
    """
    # offsets
    b = (tl.program_id(0) // (num_targets + 1)).to(tl.int64)
    k = (tl.program_id(0) % (num_targets + 1)).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    similarity_ptr += (b * num_targets + k) * num_tokens
    targets_ptr += b * targets_stride_b
    weight_ptr += b * weight_stride_b
    mix_ptr += (b * (num_targets + 1) + k) * num_tokens
    count = load_count(counts_ptr, counts_stride_b, b, num_targets)

    if k < count:
        # The target itself ranks below everything, so it never is its own neighbor.
        t = tl.load(targets_ptr + k * targets_stride_k)
        key = search.load_keys(similarity_ptr, 1, column, num_tokens, t, 32)  # the row, if it is one block
        threshold, wanted_ties = search.kth_largest(
            key, similarity_ptr, 1, num_tokens, t, neighbors, 32, BLOCK_N, NUM_BLOCKS
        )
        seen_ties = 0
        for block in range(NUM_BLOCKS):
            n = block * BLOCK_N + column
            keys = key if NUM_BLOCKS == 1 else search.load_keys(similarity_ptr, 1, n, num_tokens, t, 32)
            member, seen_ties = search.among_largest(keys, threshold, wanted_ties, seen_ties)
            weight = tl.load(weight_ptr + n * weight_stride_n, mask=n < num_tokens, other=0.0)
            tl.store(mix_ptr + n, tl.where(n == t, 1.0, tl.where(member, weight, 0.0)), mask=n < num_tokens)
    else:
        for block in range(NUM_BLOCKS):
            n = block * BLOCK_N + column
            weight = tl.load(weight_ptr + n * weight_stride_n, mask=n < num_tokens, other=0.0)
            tl.store(mix_ptr + n, tl.where(k == count, weight, 0.0), mask=n < num_tokens)
        # Another thread may have stored the weight of a target: that store must be done before this one (see `tuning`).
        tl.debug_barrier()
        start = 0
        while start < count:
            j = start + column
            t = tl.load(targets_ptr + j * targets_stride_k, mask=j < count, other=-1)
            tl.store(mix_ptr + t, tl.zeros([BLOCK_N], tl.float32), mask=(t >= 0) & (t < num_tokens))
            start += BLOCK_N

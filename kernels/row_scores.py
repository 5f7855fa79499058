"""row_scores: one query row's attention probabilities over all keys, averaged over the heads.

The softmax is split over blocks of keys, as in flash-decoding, so that a single image keeps a GPU busy. A first kernel
writes the logits together with each block's maximum and sum; a second one combines the blocks of every head and
averages the heads. There are no atomics: the order of every sum is fixed, and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning


def row_scores(
    query: Tensor, key: Tensor, *, scale: float | None = None, skip: int = 0, mask: Tensor | None = None
) -> Tensor:
    """Launch the two kernels."""
    return _head_mean(*_logits(query, key, mask, scale), skip)


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the first kernel: logits ``[B, H, N]``, and the maxima and sums of their blocks ``[B, H, S]``."""
    num_images, num_key_heads, num_tokens, num_features = key.shape
    num_heads = query.shape[1]
    block_n, block_d = tuning.score_blocks(num_features)
    num_blocks = triton.cdiv(num_tokens, block_n)
    logits = torch.empty((num_images, num_heads, num_tokens), dtype=torch.float32, device=key.device)
    block_max = torch.empty((num_images, num_heads, num_blocks), dtype=torch.float32, device=key.device)
    block_sum = torch.empty((num_images, num_heads, num_blocks), dtype=torch.float32, device=key.device)
    with torch.cuda.device_of(key):
        _logits_kernel[(num_images * num_key_heads * num_blocks,)](
            # tensors
            query,
            key,
            None if mask is None else mask.view(torch.uint8),
            logits,
            block_max,
            block_sum,
            # strides
            *query.stride(),
            *key.stride(),
            *((0, 0) if mask is None else mask.stride()),
            # scalars
            num_key_heads,
            num_tokens,
            num_features,
            num_features**-0.5 if scale is None else float(scale),
            # constexprs
            GROUP=num_heads // max(1, num_key_heads),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
    return logits, block_max, block_sum


def _head_mean(logits: Tensor, block_max: Tensor, block_sum: Tensor, skip: int) -> Tensor:
    """Launch the second kernel: the heads' mean ``[B, N - skip]``."""
    num_images, num_heads, num_tokens = logits.shape
    num_blocks = block_max.shape[2]
    scores = torch.empty((num_images, num_tokens - skip), dtype=torch.float32, device=logits.device)
    block_h, block_n, block_s = tuning.head_mean_blocks(num_heads, num_blocks)
    with torch.cuda.device_of(logits):
        _head_mean_kernel[(num_images * triton.cdiv(num_tokens - skip, block_n),)](
            # tensors
            logits,
            block_max,
            block_sum,
            scores,
            # scalars
            num_heads,
            num_tokens,
            num_blocks,
            skip,
            # constexprs
            BLOCK_H=block_h,
            BLOCK_N=block_n,
            BLOCK_S=block_s,
        )
    return scores


@triton.jit
def _logits_kernel(
    # tensors
    query_ptr,
    key_ptr,
    mask_ptr,
    logits_ptr,
    block_max_ptr,
    block_sum_ptr,
    # strides
    query_stride_b,
    query_stride_h,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    mask_stride_b,
    mask_stride_n,
    # scalars
    num_key_heads,
    num_tokens,
    num_features,
    scale,
    # constexprs
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of one query row, and the two numbers that a softmax needs for each block of keys.

    ::

        logits[b, h, n]    = scale · Σ_d query[b, h, d] · key[b, h // GROUP, n, d]      -inf where n is masked
        block_max[b, h, s] = max_n logits[b, h, n]                                      n in block s
        block_sum[b, h, s] = Σ_n exp(logits[b, h, n] - block_max[b, h, s])              n in block s

    Parameters
    ----------
    query_ptr : fp32 | fp16 | bf16 [B, H, D]
        Strides between images, heads and features. GROUP query heads share a key head: H = Hkv · GROUP.
    key_ptr : same dtype [B, Hkv, N, D]
        Strides between images, heads, tokens and features.
    mask_ptr : uint8 [B, N], or None
        Strides between images and tokens. Where it is 0, the key is masked.
    logits_ptr : fp32 [B, H, N], contiguous
        Written.
    block_max_ptr, block_sum_ptr : fp32 [B, H, S], contiguous, S = ceil(N / BLOCK_N)
        Written. A block whose logits are all -inf has the sum 0. A NaN logit makes its block's sum NaN.

    Program (b·Hkv + h)·S + s processes block s of the keys of one key head of one image, for all GROUP query heads. All
    programs together read every key once, B·Hkv·N·D elements, and write 4·B·H·(N + 2S) bytes.
    """
    # offsets
    num_blocks = tl.cdiv(num_tokens, BLOCK_N)
    key_head = (tl.program_id(0) // num_blocks).to(tl.int64)  # which [b, h]
    block = tl.program_id(0) % num_blocks
    b = key_head // num_key_heads
    h = key_head % num_key_heads
    n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    key_offsets = b * key_stride_b + h * key_stride_h + n[:, None] * key_stride_n + d[None, :] * key_stride_d

    # masks
    in_row = n < num_tokens
    in_head = d < num_features
    seen = in_row
    if mask_ptr is not None:
        seen = seen & (tl.load(mask_ptr + b * mask_stride_b + n * mask_stride_n, mask=in_row, other=0) != 0)

    # loads, widened: padded features add 0 to a dot product
    key = tl.load(key_ptr + key_offsets, mask=in_row[:, None] & in_head[None, :], other=0.0).to(tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member  # which [b, query head]
        query_offsets = b * query_stride_b + (h * GROUP + member) * query_stride_h + d * query_stride_d
        query = tl.load(query_ptr + query_offsets, mask=in_head, other=0.0).to(tl.float32)

        # compute and store: masked and padded keys weigh exp(-inf) = 0
        logits = tl.sum(query[None, :] * key, axis=1) * scale
        logits = tl.where(seen, logits, float("-inf"))
        highest = tl.max(logits, axis=0)
        # Subtracting -inf from -inf would make a block of -inf NaN; it has to weigh 0.
        total = tl.sum(tl.exp(logits - tl.where(highest == float("-inf"), 0.0, highest)), axis=0)
        stat = head * num_blocks + block
        tl.store(logits_ptr + head * num_tokens + n, logits, mask=in_row)
        tl.store(block_max_ptr + stat, highest)
        tl.store(block_sum_ptr + stat, total)


@triton.jit
def _head_mean_kernel(
    # tensors
    logits_ptr,
    block_max_ptr,
    block_sum_ptr,
    scores_ptr,
    # scalars
    num_heads,
    num_tokens,
    num_blocks,
    skip,
    # constexprs
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Softmax from the blocks' maxima and sums, then the mean over the heads.

    ::

        row_max[h] = max_s block_max[b, h, s]
        row_sum[h] = Σ_s block_sum[b, h, s] · exp(block_max[b, h, s] - row_max[h])
        scores[b, n] = 1/H Σ_h exp(logits[b, h, n + skip] - row_max[h]) / row_sum[h]

    Parameters
    ----------
    logits_ptr : fp32 [B, H, N], contiguous
    block_max_ptr, block_sum_ptr : fp32 [B, H, S], contiguous
        Of all N keys: the skipped ones stay in the denominator.
    scores_ptr : fp32 [B, N - skip], contiguous
        Written. The whole row is NaN if a head has a NaN logit or only logits of -inf, as in `torch.softmax`.

    Program b·ceil((N - skip) / BLOCK_N) + i processes BLOCK_N columns of one image, all heads at once (BLOCK_H >= H),
    and the statistics of all key blocks, BLOCK_S of them at a time, with a running maximum and a running sum. All
    programs together read 4·B·H·N bytes of logits, write 4·B·(N - skip) bytes, and read 8·B·H·S bytes of statistics
    ceil((N - skip) / BLOCK_N) times, after the first time from L2.
    """
    # offsets
    column_blocks = tl.cdiv(num_tokens - skip, BLOCK_N)
    b = (tl.program_id(0) // column_blocks).to(tl.int64)
    column = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    s = tl.arange(0, BLOCK_S)
    head = b * num_heads + h
    stat_offsets = head[:, None] * num_blocks + s[None, :]
    logit_offsets = head[:, None] * num_tokens + skip + column[None, :]

    # masks
    in_heads = (h < num_heads)[:, None]
    in_row = column < num_tokens - skip

    # loads and compute, one block of statistics after the other
    row_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_H,), tl.float32)
    start = 0
    while start < num_blocks:
        in_stats = in_heads & (start + s < num_blocks)[None, :]
        block_max = tl.load(block_max_ptr + stat_offsets, mask=in_stats, other=float("-inf"))
        block_sum = tl.load(block_sum_ptr + stat_offsets, mask=in_stats, other=0.0)
        highest = tl.maximum(row_max, tl.max(block_max, axis=1))
        # Subtracting -inf from -inf would make blocks of -inf NaN; they have to weigh 0.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        row_sum = row_sum * tl.exp(row_max - shift) + tl.sum(block_sum * tl.exp(block_max - shift[:, None]), axis=1)
        row_max = highest
        start += BLOCK_S
        block_max_ptr += BLOCK_S
        block_sum_ptr += BLOCK_S

    # store: a padded head's maximum is -inf and would give NaN, so its probabilities are masked
    logits = tl.load(logits_ptr + logit_offsets, mask=in_heads & in_row[None, :], other=float("-inf"))
    probabilities = tl.exp(logits - row_max[:, None]) / row_sum[:, None]
    scores = tl.sum(tl.where(in_heads, probabilities, 0.0), axis=0) / num_heads
    tl.store(scores_ptr + b * (num_tokens - skip) + column, scores, mask=in_row)

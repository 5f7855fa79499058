"""cls_probs: the [CLS] token's attention probabilities in all scored layers, head by head, in one launch.

A program reads one head's keys once and writes the logits as it goes. Each column of a block of keys has a running
maximum and a running sum of its own, so that the loop reduces over features only. These are combined at the end, and
the same program turns its logits into probabilities in place. There are no atomics: the order of every sum is fixed,
and the same inputs give the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

_LOG2_E = 1.4426950408889634


def cls_probs(
    queries: Sequence[Tensor], keys: Sequence[Tensor], *, scale: float | None = None, skip: int = 0
) -> Tensor:
    """Launch the kernel once; once for each run of layers with other strides than the layer before."""
    num_images, num_heads, num_tokens, num_features = keys[0].shape
    scale = num_features**-0.5 if scale is None else float(scale)
    block_n, block_d, num_warps, num_stages = tuning.cls_probs_blocks(num_features, keys[0].element_size())
    probs = torch.empty(
        (len(keys), num_images, num_heads, num_tokens - skip), dtype=torch.float32, device=keys[0].device
    )
    strides_of = [(*query.stride(), *key.stride()) for query, key in zip(queries, keys, strict=True)]
    last = 0
    with torch.cuda.device_of(keys[0]):
        while last < len(keys):
            first, strides = last, strides_of[last]
            while last < len(keys) and strides_of[last] == strides:
                last += 1
            _cls_probs_kernel[(num_images * num_heads, last - first)](
                # tensors
                tuple(queries[first:last]),
                tuple(keys[first:last]),
                probs[first:last],
                # strides
                *strides,
                # scalars
                num_heads,
                num_tokens,
                skip,
                scale * _LOG2_E,
                # constexprs
                WIDE=block_n * strides[5] + block_d * strides[6] >= 2**31,
                NUM_FEATURES=num_features,
                NUM_BLOCKS=triton.cdiv(num_tokens, block_n),
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                num_warps=num_warps,
                NUM_STAGES=num_stages,
            )
    return probs


@triton.jit
def _cls_probs_kernel(
    # tensors
    query_ptrs,
    key_ptrs,
    probs_ptr,
    # strides
    query_stride_b,
    query_stride_h,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    # scalars
    num_heads,
    num_tokens,
    skip,
    scale,
    # constexprs
    WIDE: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Probabilities of one query row, the [CLS] token's, over all keys of its head, for several layers l.

    ::

        logits[l, b, h, n]       = scale · Σ_d query_l[b, h, d] · key_l[b, h, n, d]       `scale` includes log2 e
        probs[l, b, h, n - skip] = 2^(logits[n] - max_j logits[j]) / Σ_j 2^(logits[j] - max logits)     for n >= skip

    Parameters
    ----------
    query_ptrs : tuple of fp64 | fp32 | fp16 | bf16 [B, H, D], one per layer
        Strides between images, heads and features, the same in every layer. Widened to fp32.
    key_ptrs : tuple of the same dtype [B, H, N, D], one per layer
        Strides between images, heads, tokens and features, the same in every layer. With WIDE, elements of one block of
        keys can lie 2^31 or more elements apart.
    probs_ptr : fp32 [L, B, H, N - skip], contiguous
        Written: first logits, then probabilities. As in `torch.softmax`, a logit of -inf has the probability 0; a row
        with a NaN or inf logit is NaN, and so is a row whose logits are all -inf.

    Program (b·H + h, l) processes one head of one image in one layer, NUM_BLOCKS = ceil(N / BLOCK_N) blocks of keys.
    All programs together read every key once, L·B·H·N·D elements, and write 4·L·B·H·N bytes twice; they read the
    logits again through the L1 cache.
    """
    # offsets
    layer = tl.program_id(1)
    query_ptr = query_ptrs[0]
    key_ptr = key_ptrs[0]
    for t in tl.static_range(1, len(key_ptrs)):
        query_ptr = tl.where(layer == t, query_ptrs[t], query_ptr)
        key_ptr = tl.where(layer == t, key_ptrs[t], key_ptr)
    head = tl.program_id(0)  # which [b, h]
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    num_columns = num_tokens - skip
    probs_ptr += (layer.to(tl.int64) * tl.num_programs(0) + head) * num_columns
    INT: tl.constexpr = tl.int64 if WIDE else tl.int32
    j = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    key_offsets = j[:, None].to(INT) * key_stride_n + d[None, :].to(INT) * key_stride_d
    key_step = tl.cast(key_stride_n, tl.int64) * BLOCK_N

    # masks
    in_head = d < NUM_FEATURES  # known at compile time, so that loads stay wide if D is not a multiple of 16

    # loads and compute, one block of keys after the other: padded features add 0 to a dot product
    query = tl.load(query_ptr + d.to(tl.int64) * query_stride_d, mask=in_head, other=0.0).to(tl.float32)
    column_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    column_sum = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(NUM_BLOCKS, num_stages=NUM_STAGES):
        key_offset = tl.cast(i, tl.int64) * key_step
        in_row = j < num_tokens - i * BLOCK_N
        mask = in_row[:, None] & in_head[None, :]
        key = tl.load(key_ptr + key_offset + key_offsets, mask=mask, other=0.0).to(tl.float32)
        logits = tl.where(in_row, tl.sum(query[None, :] * key, axis=1) * scale, float("-inf"))
        column = i * BLOCK_N - skip + j
        tl.store(probs_ptr + column, logits, mask=in_row & (column >= 0))
        highest = tl.maximum(column_max, logits)
        # Subtracting -inf from -inf would make a column that starts with -inf NaN; such keys have to weigh 0.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        column_sum = column_sum * tl.exp2(column_max - shift) + tl.exp2(logits - shift)
        column_max = highest
    row_max = tl.max(column_max, axis=0)
    row_sum = tl.sum(column_sum * tl.exp2(column_max - tl.where(row_max == float("-inf"), 0.0, row_max)), axis=0)

    # store: a thread may load what another thread of this program has stored, so those stores must be done (`tuning`)
    tl.debug_barrier()
    start = 0
    while start < num_columns:  # a `range` of a known length would be unrolled
        column = start + j
        logits = tl.load(probs_ptr + column, mask=column < num_columns, other=0.0)
        tl.store(probs_ptr + column, tl.exp2(logits - row_max) / row_sum, mask=column < num_columns)
        start += BLOCK_N

"""cls_attention: a vision layer's attention that also gives the [CLS] row's probabilities, in the same pass.

Streaming softmax, as in flash attention: a program holds a block of query rows and walks over the blocks of keys with a
running maximum and a running sum. The [CLS] query has a program of its own: its probabilities need every logit in fp32,
and the other N - 1 queries, the patches, often fill whole blocks without it: 577 tokens are 1 + 9 · 64. That program
writes the logits as it goes. Their maximum and sum are known at the end, so it turns them into probabilities in place: no
N x N matrix, no second read of the keys, no atomics, and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc_kernels import tuning

_LOG2_E = 1.4426950408889634


def cls_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Launch the kernel. D <= 256, because a program holds whole queries."""
    num_images, num_heads, num_tokens, num_features = query.shape
    scale = num_features**-0.5 if scale is None else float(scale)
    out = torch.empty((num_images, num_tokens, num_heads, num_features), dtype=value.dtype, device=value.device)
    cls_probs = torch.empty((num_images, num_heads, num_tokens), dtype=torch.float32, device=query.device)
    block_m, block_n, block_d, num_warps, num_stages = tuning.attention_blocks(num_features, query.element_size())
    farthest = max((num_tokens - 1) * x.stride(2) + (num_features - 1) * x.stride(3) for x in (query, key, value))
    programs = 1 + triton.cdiv(num_tokens - 1, block_m)  # of a head
    with torch.cuda.device_of(query):
        _cls_attention_kernel[(num_images * num_heads * programs,)](
            # tensors
            query,
            key,
            value,
            out,
            cls_probs,
            # strides
            *query.stride(),
            *key.stride(),
            *value.stride(),
            # scalars
            num_heads,
            num_tokens,
            abs(scale) * _LOG2_E,
            # constexprs
            WIDEN=tuning.INTERPRETED and query.dtype == torch.bfloat16,
            NEGATIVE=scale < 0,
            FAR=farthest >= 2**31,
            NUM_FEATURES=num_features,
            FULL_BLOCKS=num_tokens // block_n,
            REST=num_tokens % block_n and max(16, triton.next_power_of_2(num_tokens % block_n)),
            EVEN=(num_tokens - 1) % block_m == 0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out, cls_probs


@triton.jit
def _cls_attention_kernel(
    # tensors
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    cls_probs_ptr,
    # strides
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n: tl.constexpr,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n: tl.constexpr,
    value_stride_d,
    # scalars
    num_heads,
    num_tokens,
    scale,
    # constexprs
    WIDEN: tl.constexpr,
    NEGATIVE: tl.constexpr,
    FAR: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    FULL_BLOCKS: tl.constexpr,
    REST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # offsets
    programs = 1 + tl.cdiv(num_tokens - 1, BLOCK_M)  # of a head
    head = tl.program_id(0) // programs  # which [b, h]
    block = tl.program_id(0) % programs
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    out_ptr += (b * num_tokens * num_heads + h) * NUM_FEATURES
    cls_probs_ptr += head.to(tl.int64) * num_tokens
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    if FAR:
        d = d.to(tl.int64)
        n = n.to(tl.int64)

    if block == 0:
        _cls_query(
            query_ptr, key_ptr, value_ptr, out_ptr, cls_probs_ptr,
            query_stride_d, key_stride_n, key_stride_d, value_stride_n, value_stride_d,
            n, d, num_tokens, -scale if NEGATIVE else scale, NUM_FEATURES, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        in_head = d < NUM_FEATURES  # known at compile time, so that loads stay wide if D is not a multiple of 16
        m = (block - 1) * BLOCK_M + 1 + tl.arange(0, BLOCK_M)
        if FAR:
            m = m.to(tl.int64)
        in_queries = in_head[None, :] if EVEN else (m < num_tokens)[:, None] & in_head[None, :]
        query = tl.load(query_ptr + (m[:, None] * query_stride_n + d[None, :] * query_stride_d), mask=in_queries, other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
        if NEGATIVE:
            query = -query
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        keys = key_ptr + (d[:, None] * key_stride_d + n[None, :] * key_stride_n)
        values = value_ptr + (n[:, None] * value_stride_n + d[None, :] * value_stride_d)
        for i in range(FULL_BLOCKS):
            key = tl.load(keys, mask=in_head[:, None], other=0.0)
            value = tl.load(values, mask=in_head[None, :], other=0.0)
            row_max, row_sum, summed = _attend(query, key, value, None, row_max, row_sum, summed, scale, WIDEN)
            keys += BLOCK_N * key_stride_n
            values += BLOCK_N * value_stride_n
        if REST > 0:
            r = FULL_BLOCKS * BLOCK_N + tl.arange(0, REST)
            if FAR:
                r = r.to(tl.int64)
            in_rest = r < num_tokens
            rest_key = tl.load(
                key_ptr + (d[:, None] * key_stride_d + r[None, :] * key_stride_n),
                mask=in_head[:, None] & in_rest[None, :], other=0.0,
            )
            rest_value = tl.load(
                value_ptr + (r[:, None] * value_stride_n + d[None, :] * value_stride_d),
                mask=in_rest[:, None] & in_head[None, :], other=0.0,
            )
            row_max, row_sum, summed = _attend(query, rest_key, rest_value, in_rest, row_max, row_sum, summed, scale, WIDEN)
        out_offsets = m[:, None] * (num_heads * NUM_FEATURES) + d[None, :]
        tl.store(out_ptr + out_offsets, summed / row_sum[:, None], mask=in_queries)


@triton.jit
def _attend(query, key, value, seen, row_max, row_sum, summed, scale, WIDEN: tl.constexpr):
    if WIDEN:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    logits = tl.dot(query, key, input_precision="ieee")
    candidates = logits if seen is None else tl.where(seen[None, :], logits, float("-inf"))
    highest = tl.maximum(row_max, tl.max(candidates, axis=1) * scale)
    # Subtracting -inf from -inf would make a row that starts with -inf NaN; such keys have to weigh 0.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(logits * scale - shift[:, None])
    if seen is not None:
        weights = tl.where(seen[None, :], weights, 0.0)
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, axis=1)
    summed = tl.dot(weights.to(value.dtype), value, summed * rescale[:, None], input_precision="ieee")
    return highest, row_sum, summed


@triton.jit
def _cls_query(
    query_ptr, key_ptr, value_ptr, out_ptr, cls_probs_ptr,
    query_stride_d, key_stride_n, key_stride_d, value_stride_n, value_stride_d,
    n, d, num_tokens, scale, NUM_FEATURES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    in_head = d < NUM_FEATURES
    query = tl.load(query_ptr + d * query_stride_d, mask=in_head, other=0.0).to(tl.float32)
    lane = tl.arange(0, BLOCK_N)
    lane_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK_N,), tl.float32)
    ahead = _load_rows(key_ptr, n, num_tokens, key_stride_n, d, key_stride_d, in_head)
    start = 0
    while start < num_tokens:
        key = ahead.to(tl.float32)
        ahead = _load_rows(key_ptr, start + BLOCK_N + n, num_tokens, key_stride_n, d, key_stride_d, in_head)
        in_row = start + lane < num_tokens
        logits = tl.where(in_row, tl.sum(query[None, :] * key, axis=1) * scale, float("-inf"))
        tl.store(cls_probs_ptr + start + lane, logits, mask=in_row)
        highest = tl.maximum(lane_max, logits)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        lane_sum = lane_sum * tl.exp2(lane_max - shift) + tl.exp2(logits - shift)
        lane_max = highest
        start += BLOCK_N
    ahead = _load_rows(value_ptr, n, num_tokens, value_stride_n, d, value_stride_d, in_head)
    row_max = tl.max(lane_max, axis=0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(lane_sum * tl.exp2(lane_max - row_max), axis=0)

    # A thread may load what another thread of this program has stored: those stores must be done (see `tuning`).
    tl.debug_barrier()
    summed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start = 0
    while start < num_tokens:
        value = ahead.to(tl.float32)
        ahead = _load_rows(value_ptr, start + BLOCK_N + n, num_tokens, value_stride_n, d, value_stride_d, in_head)
        in_row = start + lane < num_tokens
        logits = tl.load(cls_probs_ptr + start + lane, mask=in_row, other=float("-inf"))
        probs = tl.exp2(logits - row_max) / row_sum
        tl.store(cls_probs_ptr + start + lane, probs, mask=in_row)
        summed += probs[:, None] * value
        start += BLOCK_N
    tl.store(out_ptr + d, tl.sum(summed, axis=0), mask=in_head)


@triton.jit
def _load_rows(ptr, n, num_tokens, stride_n, d, stride_d, in_head):
    mask = (n < num_tokens)[:, None] & in_head[None, :]
    return tl.load(ptr + (n[:, None] * stride_n + d[None, :] * stride_d), mask=mask, other=0.0)

"""cls_attention: a vision layer's attention that also gives the [CLS] row's probabilities, in the same pass.

Streaming softmax, as in flash attention: a program holds a block of query rows and walks over the blocks of keys with a
running maximum and a running sum. The [CLS] query has a program of its own, in fp32 and off the tensor cores. The other
N - 1 queries are the patches', and N - 1 is often a multiple of the block: 577 = 1 + 9 · 64, so that no row is padding.
Likewise for the keys: whole blocks need no mask, and one small block holds the rest.

The [CLS] program writes the logits as it goes. When it knows their maximum and sum, it turns them into probabilities in
place and sums the values with them: no N x N matrix, no atomics, and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

_LOG2_E = 1.4426950408889634


def cls_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Launch the kernel. D <= 256, because a program holds whole queries."""
    num_images, num_heads, num_tokens, num_features = query.shape
    scale = num_features**-0.5 if scale is None else float(scale)
    out = torch.empty((num_images, num_tokens, num_heads, num_features), dtype=value.dtype, device=value.device)
    cls_probs = torch.empty((num_images, num_heads, num_tokens), dtype=torch.float32, device=query.device)
    inputs = query, key, value
    dense = all(tuning.is_dense(x) for x in inputs)
    block_m, block_n, block_d, num_warps, num_stages, peel = tuning.attention_blocks(
        num_features, query.element_size(), tuning.capability(query.device), strided=not dense
    )
    farthest = [(num_tokens - 1) * x.stride(2) + (num_features - 1) * x.stride(3) for x in inputs]
    with torch.cuda.device_of(query):
        _cls_attention_kernel[(num_images * num_heads * (1 + triton.cdiv(num_tokens - 1, block_m)),)](
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
            DENSE=dense,
            FAR=max(*farthest, num_tokens * num_heads * num_features) >= 2**31,
            NUM_FEATURES=num_features,
            **tuning.attention_split(num_tokens, block_m, block_n, peel),
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
    DENSE: tl.constexpr,
    FAR: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    REST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of the [CLS] query or of one block of patch queries, and the probabilities of the [CLS] query, row 0.

    ::

        p[b, h, m, n]      = softmax_n(s · Σ_d query[b, h, m, d] · key[b, h, n, d])      scale = |s| · log2(e)
        out[b, m, h, d]    = Σ_n p[b, h, m, n] · value[b, h, n, d]                       NEGATIVE: s < 0
        cls_probs[b, h, n] = p[b, h, 0, n]

    Parameters
    ----------
    query_ptr, key_ptr, value_ptr : fp32 | fp16 | bf16 [B, H, N, D]
        Strides between images, heads, tokens and features. DENSE: the last of them is 1, the others are multiples of 8,
        and the pointers are 16-byte aligned. The tokens' strides of keys and values are constants, which saves address
        arithmetic. FAR: an offset within an image needs 64 bits.
        Logits, maxima and sums are fp32. For the patches, probabilities before their division by the sum are rounded to
        the values' dtype, and the products of 16-bit operands are summed in fp32 by the tensor cores; those of fp32
        operands are IEEE. For [CLS], all is fp32. With WIDEN, 16-bit operands become fp32, too: Triton's interpreter
        has no bfloat16 arithmetic.
    out_ptr : same dtype [B, N, H, D], contiguous
        Written, each element once.
    cls_probs_ptr : fp32 [B, H, N], contiguous
        Written: first logits, in units of log2, then probabilities. As in `torch.softmax`, a logit of -inf has the
        probability 0; a row with a NaN or inf logit is NaN, and so is a row whose logits are all -inf. The same holds
        for the rows of probabilities that `out` is computed with.

    A head has 1 + ceil((N - 1) / BLOCK_M) programs, one after another: its keys and values come from DRAM once, then
    from L2. The first processes the [CLS] query: all keys, then all values, BLOCK_N at a time. The i-th of the others
    processes BLOCK_M patch queries from 1 + i·BLOCK_M on, all of them patches if EVEN, against NUM_BLOCKS blocks of
    keys and values and then against one of REST keys, which is the only one with padding. If MASKED there is no such
    block, and the last of the others may have padding. All programs together read and write 4·B·H·N·D elements, plus
    12·B·H·N bytes for `cls_probs`. Head dims are padded to a power of two: padding is 44 % of the tensor cores' work
    for D = 72 and 38 % for D = 80.
    """
    # offsets: within an image and head they have 32 bits where that suffices
    programs = 1 + tl.cdiv(num_tokens - 1, BLOCK_M)  # of a head
    head = tl.program_id(0) // programs  # which [b, h]
    block = tl.program_id(0) % programs
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    query_start = b * query_stride_b + h * query_stride_h
    key_start = b * key_stride_b + h * key_stride_h
    value_start = b * value_stride_b + h * value_stride_h
    if DENSE:  # else head dims such as 72 would be loaded element by element
        query_start = tl.multiple_of(query_start, 8)
        key_start = tl.multiple_of(key_start, 8)
        value_start = tl.multiple_of(value_start, 8)
    query_ptr += query_start
    key_ptr += key_start
    value_ptr += value_start
    out_ptr += (b * num_tokens * num_heads + h) * NUM_FEATURES
    cls_probs_ptr += head.to(tl.int64) * num_tokens
    m = (block - 1) * BLOCK_M + 1 + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    if FAR:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
        d = d.to(tl.int64)

    if block == 0:
        _cls_query(
            query_ptr,
            key_ptr,
            value_ptr,
            out_ptr,
            cls_probs_ptr,
            query_stride_d,
            key_stride_n,
            key_stride_d,
            value_stride_n,
            value_stride_d,
            num_tokens,
            -scale if NEGATIVE else scale,
            n,
            d,
            NUM_FEATURES,
            BLOCK_N,
            BLOCK_D,
        )
    else:
        # masks
        in_head = d < NUM_FEATURES  # known at compile time, so that loads stay wide if D is not a multiple of 16
        in_queries = in_head[None, :] if EVEN else (m < num_tokens)[:, None] & in_head[None, :]

        # loads and compute, one block of keys after the other: padded features add 0 to a dot product
        query_offsets = m[:, None] * query_stride_n + d[None, :] * query_stride_d
        query = tl.load(query_ptr + query_offsets, mask=in_queries, other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
        if NEGATIVE:
            query = -query
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        key_ptrs = key_ptr + (d[:, None] * key_stride_d + n[None, :] * key_stride_n)
        value_ptrs = value_ptr + (n[:, None] * value_stride_n + d[None, :] * value_stride_d)
        for i in range(NUM_BLOCKS):
            in_row = i * BLOCK_N + tl.arange(0, BLOCK_N) < num_tokens if MASKED else None
            in_keys = in_head[:, None] & in_row[None, :] if MASKED else in_head[:, None]
            in_values = in_row[:, None] & in_head[None, :] if MASKED else in_head[None, :]
            key = tl.load(key_ptrs, mask=in_keys, other=0.0)
            value = tl.load(value_ptrs, mask=in_values, other=0.0)
            row_max, row_sum, summed = _attend(query, key, value, in_row, row_max, row_sum, summed, scale, WIDEN)
            key_ptrs += BLOCK_N * key_stride_n
            value_ptrs += BLOCK_N * value_stride_n
        if REST > 0:
            r = NUM_BLOCKS * BLOCK_N + tl.arange(0, REST)
            in_row = r < num_tokens
            if FAR:
                r = r.to(tl.int64)
            key_ptrs = key_ptr + (d[:, None] * key_stride_d + r[None, :] * key_stride_n)
            value_ptrs = value_ptr + (r[:, None] * value_stride_n + d[None, :] * value_stride_d)
            key = tl.load(key_ptrs, mask=in_head[:, None] & in_row[None, :], other=0.0)
            value = tl.load(value_ptrs, mask=in_row[:, None] & in_head[None, :], other=0.0)
            row_max, row_sum, summed = _attend(query, key, value, in_row, row_max, row_sum, summed, scale, WIDEN)

        # store
        out_offsets = m[:, None] * (num_heads * NUM_FEATURES) + d[None, :]
        tl.store(out_ptr + out_offsets, summed / row_sum[:, None], mask=in_queries)


@triton.jit
def _attend(query, key, value, in_row, row_max, row_sum, summed, scale, WIDEN: tl.constexpr):
    """Add a block of keys and values to the running softmax; `in_row` is None, or false where a key is padding.

    `row_max` is that of the scaled logits. The scale costs no instruction where the compiler fuses its multiplication
    with the subtraction, which is the default of Triton 3.6 to 3.9; later versions may need an option for it.
    """
    if WIDEN:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    logits = tl.dot(query, key, input_precision="ieee")
    in_block = logits if in_row is None else tl.where(in_row[None, :], logits, float("-inf"))
    highest = tl.maximum(row_max, tl.max(in_block, axis=1) * scale)
    # Subtracting -inf from -inf would make a row that starts with -inf NaN; such keys have to weigh 0.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(logits * scale - shift[:, None])
    if in_row is not None:
        weights = tl.where(in_row[None, :], weights, 0.0)
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, axis=1)
    summed = tl.dot(weights.to(value.dtype), value, summed * rescale[:, None], input_precision="ieee")
    return highest, row_sum, summed


@triton.jit
def _cls_query(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    cls_probs_ptr,
    query_stride_d,
    key_stride_n,
    key_stride_d,
    value_stride_n,
    value_stride_d,
    num_tokens,
    scale,
    n,
    d,
    NUM_FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The [CLS] query of one head: its probabilities, then the sum of the values. Each lane has its own keys.

    The next block is loaded before this one is used: one row has too little work to hide a load behind.
    """
    lane = tl.arange(0, BLOCK_N)
    in_head = d < NUM_FEATURES
    query = tl.load(query_ptr + d * query_stride_d, mask=in_head, other=0.0).to(tl.float32)
    lane_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK_N,), tl.float32)
    ahead = _load_rows(key_ptr, key_stride_n, key_stride_d, n, d, num_tokens, NUM_FEATURES)
    start = 0
    while start < num_tokens:
        key = ahead.to(tl.float32)
        ahead = _load_rows(key_ptr, key_stride_n, key_stride_d, start + BLOCK_N + n, d, num_tokens, NUM_FEATURES)
        in_row = start + lane < num_tokens
        logits = tl.where(in_row, tl.sum(query[None, :] * key, axis=1) * scale, float("-inf"))
        tl.store(cls_probs_ptr + start + lane, logits, mask=in_row)
        highest = tl.maximum(lane_max, logits)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        lane_sum = lane_sum * tl.exp2(lane_max - shift) + tl.exp2(logits - shift)
        lane_max = highest
        start += BLOCK_N
    ahead = _load_rows(value_ptr, value_stride_n, value_stride_d, n, d, num_tokens, NUM_FEATURES)
    row_max = tl.max(lane_max, axis=0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(lane_sum * tl.exp2(lane_max - row_max), axis=0)

    # A thread may load what another thread of this program has stored: those stores must be done (see `tuning`).
    tl.debug_barrier()
    summed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start = 0
    while start < num_tokens:
        value = ahead.to(tl.float32)
        ahead = _load_rows(value_ptr, value_stride_n, value_stride_d, start + BLOCK_N + n, d, num_tokens, NUM_FEATURES)
        in_row = start + lane < num_tokens
        logits = tl.load(cls_probs_ptr + start + lane, mask=in_row, other=float("-inf"))
        cls_probs = tl.exp2(logits - row_max) / row_sum
        tl.store(cls_probs_ptr + start + lane, cls_probs, mask=in_row)
        summed += cls_probs[:, None] * value
        start += BLOCK_N
    tl.store(out_ptr + d, tl.sum(summed, axis=0), mask=in_head)


@triton.jit
def _load_rows(ptr, stride_n, stride_d, n, d, num_tokens, NUM_FEATURES: tl.constexpr):
    """Keys or values [n, d], 0 where they are padding."""
    in_rows = (n < num_tokens)[:, None] & (d < NUM_FEATURES)[None, :]
    return tl.load(ptr + (n[:, None] * stride_n + d[None, :] * stride_d), mask=in_rows, other=0.0)

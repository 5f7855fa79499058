"""received: the attention that each token receives, as column sums of the probabilities, without an N x N matrix.

A program of the second kernel owns a block of keys of one head. It walks over the queries, and what normalizes each
query, its log-sum-exp from a forward pass or what the first kernel computes, turns a product into a probability at
once. A third kernel averages the heads. There are no atomics: the order of every sum is fixed, and the same inputs give
the same bits.

Of packed images, a block walks over the segments that it overlaps, and over nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

_LOG2_E = 1.4426950408889634


def received(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    skip: int = 0,
    lse: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Launch the three kernels, or two of them where `lse` is given."""
    num_images, num_heads, num_tokens, num_features = query.shape
    sums = torch.empty((num_images, num_heads, num_tokens), dtype=torch.float32, device=query.device)
    result = torch.empty((num_images, num_tokens - skip), dtype=torch.float32, device=query.device)
    spans = None if cu_seqlens is None else _spans(cu_seqlens, num_tokens)
    dense = all(tuning.is_dense(x) for x in (query, key))
    block_m, block_n, block_d, num_warps, num_stages = tuning.received_blocks(
        num_features, query.element_size(), strided=not dense
    )
    scale = num_features**-0.5 if scale is None else float(scale)
    arguments = (
        # strides
        *query.stride(),
        *key.stride(),
        # scalars
        num_heads,
        num_tokens,
        scale * _LOG2_E,
    )
    farthest = [(num_tokens - 1) * x.stride(2) + (num_features - 1) * x.stride(3) for x in (query, key)]
    constexprs = {
        "WIDEN": tuning.INTERPRETED and query.dtype == torch.bfloat16,
        "DENSE": dense,
        "FAR": max(farthest) >= 2**31,
        "NUM_FEATURES": num_features,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    heads = num_images * num_heads
    shift, shift_scale, inverse = lse, _LOG2_E, None
    with torch.cuda.device_of(query):
        if lse is None:
            shift_scale = 1.0  # the maximum is one of the logits, whose scale has the base already
            shape = 2, num_images, num_heads, num_tokens
            shift, inverse = torch.empty(shape, dtype=torch.float32, device=query.device)
            _normalizers_kernel[(heads * triton.cdiv(num_tokens, block_m),)](
                query,
                key,
                spans,
                shift,
                inverse,
                *arguments,
                NUM_BLOCKS=0 if spans is not None else triton.cdiv(num_tokens, block_n),
                **constexprs,
            )
        _sums_kernel[(heads * triton.cdiv(num_tokens, block_n),)](
            query,
            key,
            spans,
            shift,
            inverse,
            sums,
            *shift.stride(),
            *arguments,
            shift_scale,
            NUM_BLOCKS=0 if spans is not None else triton.cdiv(num_tokens, block_m),
            **constexprs,
        )
        block_h, block_c = tuning.mean_blocks(num_heads)
        _mean_kernel[(num_images * triton.cdiv(num_tokens - skip, block_c),)](
            sums, spans, result, num_heads, num_tokens, skip, BLOCK_H=block_h, BLOCK_C=block_c
        )
    return result


def _spans(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Where each token's segment begins and ends: int32 [2, N]. Nothing is read by the host."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens.contiguous(), tokens, right=True)
    bounds = torch.nn.functional.pad(cu_seqlens, (1, 0), value=0)  # for the tokens before the first one
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=num_tokens)  # and after the last one
    return torch.stack([bounds[segment], bounds[segment + 1]]).int()


@triton.jit
def _normalizers_kernel(
    # tensors
    query_ptr,
    key_ptr,
    spans_ptr,
    shift_ptr,
    inverse_ptr,
    # strides
    query_stride_b,
    query_stride_h,
    query_stride_n: tl.constexpr,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n: tl.constexpr,
    key_stride_d,
    # scalars
    num_heads,
    num_tokens,
    scale,
    # constexprs
    WIDEN: tl.constexpr,
    DENSE: tl.constexpr,
    FAR: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the logits of each query are shifted by, and what their exponentials are multiplied by: a softmax to base 2.

    ::

        logits[b, h, m, n] = scale · Σ_d query[b, h, m, d] · key[b, h, n, d]
        shift[b, h, m]     = max_n logits[b, h, m, n]                                n in the segment of m
        inverse[b, h, m]   = 1 / Σ_n exp2(logits[b, h, m, n] - shift[b, h, m])

    One number, the logarithm of the sum, would do, but its rounding would be in all weights of its query.

    Parameters
    ----------
    query_ptr, key_ptr : fp32 | fp16 | bf16 [B, H, N, D]
        Strides between images, heads, tokens and features. DENSE: the last of them is 1, the others are multiples of 8,
        and the pointers are 16-byte aligned. The tokens' strides are constants, so that their multiples are known. FAR:
        an offset within an image needs 64 bits. Products of 16-bit operands are summed in fp32; those of fp32 operands
        are IEEE. With WIDEN, 16-bit operands become fp32, too: Triton's interpreter has no bfloat16 arithmetic.
    spans_ptr : int32 [2, N], contiguous, or None
        Where each token's segment begins and ends. All tokens are one segment where it is None.
    shift_ptr, inverse_ptr : fp32 [B, H, N], contiguous
        Written. As in `torch.softmax`, the weights are NaN where all logits are -inf, or one is inf or NaN.

    Program (b·H + h)·ceil(N / BLOCK_M) + i processes BLOCK_M queries of one head, BLOCK_N keys at a time: those of
    NUM_BLOCKS blocks, or of the segments that its queries belong to. All programs together read B·H·N·D queries once,
    as many keys ceil(N / BLOCK_M) times, after the first time from L2, and write 8·B·H·N bytes.
    """
    # offsets
    query_blocks = tl.cdiv(num_tokens, BLOCK_M)
    head = tl.program_id(0) // query_blocks  # which [b, h]
    m = (tl.program_id(0) % query_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ptr += _head_start(head, num_heads, query_stride_b, query_stride_h, DENSE)
    key_ptr += _head_start(head, num_heads, key_stride_b, key_stride_h, DENSE)
    shift_ptr += head.to(tl.int64) * num_tokens
    inverse_ptr += head.to(tl.int64) * num_tokens
    begin, end = _load_spans(spans_ptr, m, num_tokens)

    # loads and compute, one block of keys after the other
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if spans_ptr is None:
        for i in range(NUM_BLOCKS):
            n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            logits = _logits(
                query_ptr, key_ptr, query_stride_n, query_stride_d, key_stride_n, key_stride_d,
                m, n, num_tokens, scale, WIDEN, FAR, NUM_FEATURES, BLOCK_D,
            )  # fmt: skip
            row_max, row_sum = _add_exponentials(logits, (n < num_tokens)[None, :], row_max, row_sum)
    else:
        start = tl.min(tl.where(m < num_tokens, begin, num_tokens), axis=0)
        last = tl.max(end, axis=0)
        while start < last:
            n = start + tl.arange(0, BLOCK_N)
            logits = _logits(
                query_ptr, key_ptr, query_stride_n, query_stride_d, key_stride_n, key_stride_d,
                m, n, num_tokens, scale, WIDEN, FAR, NUM_FEATURES, BLOCK_D,
            )  # fmt: skip
            seen = (n[None, :] >= begin[:, None]) & (n[None, :] < end[:, None])
            row_max, row_sum = _add_exponentials(logits, seen, row_max, row_sum)
            start += BLOCK_N

    # store
    tl.store(shift_ptr + m, row_max, mask=m < num_tokens)
    tl.store(inverse_ptr + m, 1 / row_sum, mask=m < num_tokens)


@triton.jit
def _sums_kernel(
    # tensors
    query_ptr,
    key_ptr,
    spans_ptr,
    shift_ptr,
    inverse_ptr,
    sums_ptr,
    # strides
    shift_stride_b,
    shift_stride_h,
    shift_stride_n,
    query_stride_b,
    query_stride_h,
    query_stride_n: tl.constexpr,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n: tl.constexpr,
    key_stride_d,
    # scalars
    num_heads,
    num_tokens,
    scale,
    shift_scale,
    # constexprs
    WIDEN: tl.constexpr,
    DENSE: tl.constexpr,
    FAR: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Column sums of each head's attention probabilities.

    ::

        sums[b, h, n] = Σ_m inverse[b, h, m] · exp2(logits[b, h, m, n] - shift_scale · shift[b, h, m])

    over the queries m in the segment of n, with the logits of `_normalizers_kernel`.

    Parameters
    ----------
    query_ptr, key_ptr, spans_ptr
        As in `_normalizers_kernel`.
    shift_ptr, inverse_ptr : fp32 [B, H, N]
        One set of strides between images, heads and tokens. As of `_normalizers_kernel`; or the natural logarithm of
        each query's sum of exponentials, and None: `shift_scale` turns it into one to base 2, and the factor is 1.
    sums_ptr : fp32 [B, H, N], contiguous
        Written. NaN or inf in a key or query has the consequences that the formula gives it.

    Program (b·H + h)·ceil(N / BLOCK_N) + j processes BLOCK_N keys of one head, BLOCK_M queries at a time: those of
    NUM_BLOCKS blocks, or of the segments that its keys belong to. Each place in a block has a sum of its own until
    the end, so that no thread waits for another. All programs together read B·H·N·D keys once, as many queries and
    4 or 8·B·H·N bytes of normalizers ceil(N / BLOCK_N) times, after the first time from L2, and write 4·B·H·N bytes.
    """
    # offsets
    key_blocks = tl.cdiv(num_tokens, BLOCK_N)
    head = tl.program_id(0) // key_blocks  # which [b, h]
    n = (tl.program_id(0) % key_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    query_ptr += _head_start(head, num_heads, query_stride_b, query_stride_h, DENSE)
    key_ptr += _head_start(head, num_heads, key_stride_b, key_stride_h, DENSE)
    normalizers = _head_start(head, num_heads, shift_stride_b, shift_stride_h, False)
    shift_ptr += normalizers
    if inverse_ptr is not None:
        inverse_ptr += normalizers
    sums_ptr += head.to(tl.int64) * num_tokens
    begin, end = _load_spans(spans_ptr, n, num_tokens)

    # loads and compute, one block of queries after the other: a probability is 0 where a query is padding
    summed = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if spans_ptr is None:
        for i in range(NUM_BLOCKS):
            m = i * BLOCK_M + tl.arange(0, BLOCK_M)
            logits = _logits(
                query_ptr, key_ptr, query_stride_n, query_stride_d, key_stride_n, key_stride_d,
                m, n, num_tokens, scale, WIDEN, FAR, NUM_FEATURES, BLOCK_D,
            )  # fmt: skip
            weights = _weights(logits, shift_ptr, inverse_ptr, shift_stride_n, shift_scale, m, num_tokens)
            summed += tl.where((m < num_tokens)[:, None], weights, 0.0)
    else:
        start = tl.min(tl.where(n < num_tokens, begin, num_tokens), axis=0)
        last = tl.max(end, axis=0)
        while start < last:
            m = start + tl.arange(0, BLOCK_M)
            logits = _logits(
                query_ptr, key_ptr, query_stride_n, query_stride_d, key_stride_n, key_stride_d,
                m, n, num_tokens, scale, WIDEN, FAR, NUM_FEATURES, BLOCK_D,
            )  # fmt: skip
            seen = (m[:, None] >= begin[None, :]) & (m[:, None] < end[None, :])
            weights = _weights(logits, shift_ptr, inverse_ptr, shift_stride_n, shift_scale, m, num_tokens)
            summed += tl.where(seen, weights, 0.0)
            start += BLOCK_M

    # store
    tl.store(sums_ptr + n, tl.sum(summed, axis=0), mask=n < num_tokens)


@triton.jit
def _mean_kernel(
    # tensors
    sums_ptr,
    spans_ptr,
    result_ptr,
    # scalars
    num_heads,
    num_tokens,
    skip,
    # constexprs
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean over the heads and over the queries.

    ::

        result[b, c] = 1/H Σ_h sums[b, h, n] / (number of queries in the segment of n)     n = c + skip

    Parameters
    ----------
    sums_ptr : fp32 [B, H, N], contiguous
    spans_ptr : int32 [2, N], contiguous, or None
        Where each token's segment begins and ends. All N tokens are one segment where it is None.
    result_ptr : fp32 [B, N - skip], contiguous
        Written.

    Program b·ceil((N - skip) / BLOCK_C) + i processes BLOCK_C columns of one image, BLOCK_H heads at a time. All
    programs together read 4·B·H·N bytes and write 4·B·(N - skip).
    """
    # offsets
    column_blocks = tl.cdiv(num_tokens - skip, BLOCK_C)
    b = (tl.program_id(0) // column_blocks).to(tl.int64)
    c = (tl.program_id(0) % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.arange(0, BLOCK_H)
    sums_ptr += b * num_heads * num_tokens

    # masks
    in_row = c < num_tokens - skip

    # loads, compute and store
    total = tl.zeros((BLOCK_C,), tl.float32)
    start = 0
    while start < num_heads:
        offsets = (start + h).to(tl.int64)[:, None] * num_tokens + skip + c[None, :]
        sums = tl.load(sums_ptr + offsets, mask=(start + h < num_heads)[:, None] & in_row[None, :], other=0.0)
        total += tl.sum(sums, axis=0)
        start += BLOCK_H
    begin, end = _load_spans(spans_ptr, skip + c, num_tokens)
    tl.store(result_ptr + b * (num_tokens - skip) + c, total / (num_heads * (end - begin).to(tl.float32)), mask=in_row)


@triton.jit
def _head_start(head, num_heads, stride_b, stride_h, DENSE: tl.constexpr):
    """The offset of a head. DENSE: a multiple of 8, or head dims such as 72 would be loaded element by element."""
    start = (head // num_heads).to(tl.int64) * stride_b + (head % num_heads).to(tl.int64) * stride_h
    return tl.multiple_of(start, 8) if DENSE else start


@triton.jit
def _load_spans(spans_ptr, token, num_tokens):
    """Where the tokens' segments begin and end. Padding's are empty."""
    if spans_ptr is None:
        return token * 0, token * 0 + num_tokens
    else:
        in_row = token < num_tokens
        begin = tl.load(spans_ptr + token, mask=in_row, other=0)
        end = tl.load(spans_ptr + num_tokens + token, mask=in_row, other=0)
        return begin, end


@triton.jit
def _logits(
    query_ptr,
    key_ptr,
    query_stride_n: tl.constexpr,
    query_stride_d,
    key_stride_n: tl.constexpr,
    key_stride_d,
    m,
    n,
    num_tokens,
    scale,
    WIDEN: tl.constexpr,
    FAR: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of queries m and keys n of one head, BLOCK_D features at a time. Padding is 0, and adds 0."""
    in_queries = (m < num_tokens)[:, None]
    in_keys = (n < num_tokens)[None, :]
    if FAR:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    product = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for block in range(tl.cdiv(NUM_FEATURES, BLOCK_D)):
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        in_head = d < NUM_FEATURES  # known at compile time if there is one block, so that loads stay wide
        if FAR:
            d = d.to(tl.int64)
        query_offsets = m[:, None] * query_stride_n + d[None, :] * query_stride_d
        key_offsets = d[:, None] * key_stride_d + n[None, :] * key_stride_n
        query = tl.load(query_ptr + query_offsets, mask=in_queries & in_head[None, :], other=0.0)
        key = tl.load(key_ptr + key_offsets, mask=in_head[:, None] & in_keys, other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
            key = key.to(tl.float32)
        product = tl.dot(query, key, product, input_precision="ieee")
    return product * scale


@triton.jit
def _weights(logits, shift_ptr, inverse_ptr, stride, shift_scale, m, num_tokens):
    """The attention probabilities of queries m. Those of padding mean nothing."""
    offsets = m.to(tl.int64) * stride
    shift = tl.load(shift_ptr + offsets, mask=m < num_tokens, other=0.0)
    weights = tl.exp2(logits - (shift * shift_scale)[:, None])
    if inverse_ptr is not None:
        weights *= tl.load(inverse_ptr + offsets, mask=m < num_tokens, other=0.0)[:, None]
    return weights


@triton.jit
def _add_exponentials(logits, seen, row_max, row_sum):
    """Add a block of keys to the running sums of exponentials, each relative to the running maximum.

    A maximum of -inf is not subtracted: these keys have to weigh 0 beside a finite one, and the difference of the two
    infinities is NaN.
    """
    logits = tl.where(seen, logits, float("-inf"))
    highest = tl.maximum(row_max, tl.max(logits, axis=1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
    return highest, row_sum

"""cls_attention: a vision layer's attention that also gives the [CLS] row's probabilities, in the same pass.

Streaming softmax, as in flash attention: a program holds a block of query rows and walks over the blocks of keys with a
running maximum and a running sum. The program with the [CLS] query in its block writes that row's logits as it goes.
Their maximum and sum are known at the end, so the same program turns them into probabilities in place: no N x N matrix,
no second read of the keys, no atomics, and the same inputs give the same bits.

In fp32 the probabilities come from the kernel of `cls_probs`, which is more exact there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .cls_probs import cls_probs as cls_probs_of


def cls_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Launch the kernel; in fp32 that of `cls_probs`, too. D <= 256, because a program holds whole queries."""
    num_images, num_heads, num_tokens, num_features = query.shape
    scale = num_features**-0.5 if scale is None else float(scale)
    out = torch.empty((num_images, num_tokens, num_heads, num_features), dtype=value.dtype, device=value.device)
    cls_probs = torch.empty((num_images, num_heads, num_tokens), dtype=torch.float32, device=query.device)
    block_m, block_n, block_d, num_warps, num_stages = tuning.attention_blocks(num_features, query.element_size())
    with torch.cuda.device_of(query):
        _cls_attention_kernel[(num_images * num_heads * triton.cdiv(num_tokens, block_m),)](
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
            *cls_probs.stride(),
            # scalars
            num_heads,
            num_tokens,
            scale,
            # constexprs
            WIDEN=tuning.INTERPRETED and query.dtype == torch.bfloat16,
            NUM_FEATURES=num_features,
            NUM_BLOCKS=triton.cdiv(num_tokens, block_n),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    if query.dtype == torch.float32:
        # Off the tensor cores a dot product is one chain of D additions, with twice the error of a sum in a tree.
        cls_probs = cls_probs_of((query[:, :, 0],), (key,), scale=scale)[0]
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
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    cls_probs_stride_b,
    cls_probs_stride_h,
    cls_probs_stride_n,
    # scalars
    num_heads,
    num_tokens,
    scale,
    # constexprs
    WIDEN: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of one block of query rows, and the probabilities of query row 0, the [CLS] token's.

    ::

        p[b, h, m, n]      = softmax_n(scale · Σ_d query[b, h, m, d] · key[b, h, n, d])
        out[b, m, h, d]    = Σ_n p[b, h, m, n] · value[b, h, n, d]
        cls_probs[b, h, n] = p[b, h, 0, n]

    Parameters
    ----------
    query_ptr, key_ptr, value_ptr : fp32 | fp16 | bf16 [B, H, N, D]
        Strides between images, heads, tokens and features. Logits, maxima and sums are fp32. Probabilities are rounded
        to the values' dtype before their product with the values. Products of 16-bit operands are summed in fp32; those
        of fp32 operands are IEEE. With WIDEN, 16-bit operands become fp32, too: Triton's interpreter has no bfloat16
        arithmetic.
    out_ptr : same dtype [B, N, H, D], contiguous
        Written, each element once.
    cls_probs_ptr : fp32 [B, H, N]
        Strides between images, heads and tokens. Written: first logits, then probabilities. As in `torch.softmax`, a
        logit of -inf has the probability 0; a row with a NaN or inf logit is NaN, and so is a row whose logits are all
        -inf. The same holds for the rows of probabilities that `out` is computed with.

    Program (b·H + h)·ceil(N / BLOCK_M) + i processes BLOCK_M query rows of one head of one image, from i·BLOCK_M on,
    against all its keys and values, NUM_BLOCKS = ceil(N / BLOCK_N) blocks of them. The programs of a head follow one
    another: its keys and values come from DRAM once, then from L2. All programs together read and write 4·B·H·N·D
    elements, plus 12·B·H·N bytes for `cls_probs`. Head dims are padded to a power of two: padding is 44 % of the tensor
    cores' work for D = 72 and 38 % for D = 80.
    """
    # offsets
    query_blocks = tl.cdiv(num_tokens, BLOCK_M)
    head = tl.program_id(0) // query_blocks  # which [b, h]
    block = tl.program_id(0) % query_blocks
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    cls_probs_ptr += b * cls_probs_stride_b + h * cls_probs_stride_h
    query_offsets = m[:, None].to(tl.int64) * query_stride_n + d[None, :] * query_stride_d

    # masks
    is_cls = m == 0
    in_head = d < NUM_FEATURES  # known at compile time, so that loads stay wide if D is not a multiple of 16
    in_queries = (m < num_tokens)[:, None] & in_head[None, :]

    # loads and compute, one block of keys after the other: padded features add 0 to a dot product
    query = tl.load(query_ptr + query_offsets, mask=in_queries, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(NUM_BLOCKS):
        in_row = i * BLOCK_N + tl.arange(0, BLOCK_N) < num_tokens
        n = i * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        key_offsets = d[:, None] * key_stride_d + n[None, :] * key_stride_n
        value_offsets = n[:, None] * value_stride_n + d[None, :] * value_stride_d
        key = tl.load(key_ptr + key_offsets, mask=in_head[:, None] & in_row[None, :], other=0.0)
        if WIDEN:
            key = key.to(tl.float32)

        # Padded keys weigh exp(-inf) = 0. The addition costs no instruction where the compiler fuses it with the
        # multiplication, which is the default of Triton 3.6 to 3.9; later versions may need an option for it.
        logits = tl.dot(query, key, input_precision="ieee") * scale + tl.where(in_row, 0.0, float("-inf"))[None, :]
        if block == 0:
            cls_logits = tl.sum(tl.where(is_cls[:, None], logits, 0.0), axis=0)
            tl.store(cls_probs_ptr + n * cls_probs_stride_n, cls_logits, mask=in_row)
        highest = tl.maximum(row_max, tl.max(logits, axis=1))
        # Subtracting -inf from -inf would make a row that starts with -inf NaN; such keys have to weigh 0.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(logits - shift[:, None])
        rescale = tl.exp(row_max - shift)
        row_max = highest
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        value = tl.load(value_ptr + value_offsets, mask=in_row[:, None] & in_head[None, :], other=0.0)
        if WIDEN:
            value = value.to(tl.float32)
        summed = tl.dot(weights.to(value.dtype), value, summed * rescale[:, None], input_precision="ieee")

    # store
    out_ptr += (b * num_tokens * num_heads + h) * NUM_FEATURES
    out_offsets = m[:, None].to(tl.int64) * num_heads * NUM_FEATURES + d[None, :]
    tl.store(out_ptr + out_offsets, summed / row_sum[:, None], mask=in_queries)
    if block == 0:
        cls_max = tl.sum(tl.where(is_cls, row_max, 0.0), axis=0)
        cls_sum = tl.sum(tl.where(is_cls, row_sum, 0.0), axis=0)
        # A thread may load what another thread of this program has stored: those stores must be done (see `tuning`).
        tl.debug_barrier()
        start = 0
        while start < num_tokens:  # a `range` of a known length would be unrolled
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            offsets = n * cls_probs_stride_n
            in_row = n < num_tokens
            cls_logits = tl.load(cls_probs_ptr + offsets, mask=in_row, other=0.0)
            tl.store(cls_probs_ptr + offsets, tl.exp(cls_logits - cls_max) / cls_sum, mask=in_row)
            start += BLOCK_N

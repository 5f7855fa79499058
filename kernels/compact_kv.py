"""compact_kv: gather the kept tokens of the KV caches of many layers. Bytes are copied, whatever the dtype."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .compact import as_integers


def compact_kv(
    keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Launch the kernel once for all tensors with the same shape, dtype and strides; usually these are all tensors.

    An index outside [0, N) reads nothing and gives zeros.
    """
    tensors = (*keys, *values)
    num_images, _, num_tokens, _ = tensors[0].shape
    num_kept = indices.shape[1]
    alike: dict[object, list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.stride(), tensor.dtype), []).append(number)
    results = {}
    for numbers in alike.values():
        sources = [tensors[number] for number in numbers]
        _, num_heads, _, num_features = sources[0].shape
        shape = (num_images, num_heads, num_kept, num_features)
        out = [torch.empty(shape, dtype=source.dtype, device=source.device) for source in sources]
        results.update(zip(numbers, out, strict=True))
        block_k, block_d, num_warps = tuning.compact_kv_blocks(num_features)
        with torch.cuda.device_of(indices):
            _compact_kv_kernel[(num_images * num_heads, len(sources), triton.cdiv(num_features, block_d))](
                # tensors
                tuple(as_integers(source) for source in sources),
                indices,
                tuple(as_integers(tensor) for tensor in out),
                # strides
                *sources[0].stride(),
                *indices.stride(),
                *out[0].stride(),
                # scalars
                num_heads,
                num_tokens,
                num_kept,
                num_features,
                # constexprs
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                num_warps=num_warps,
            )
    kept = tuple(results[number] for number in range(len(tensors)))
    return kept[: len(keys)], kept[len(keys) :]


@triton.jit
def _compact_kv_kernel(
    # tensors
    x_ptrs,
    indices_ptr,
    out_ptrs,
    # strides
    x_stride_b,
    x_stride_h,
    x_stride_n,
    x_stride_d,
    indices_stride_b,
    indices_stride_k,
    out_stride_b,
    out_stride_h,
    out_stride_k,
    out_stride_d,
    # scalars
    num_heads,
    num_tokens,
    num_kept,
    num_features,
    # constexprs
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy tokens of several caches x_t of one layout by index: ``out_t[b, h, k, d] = x_t[b, h, indices[b, k], d]``.

    Parameters
    ----------
    x_ptrs : tuple of uint8 | int16 | int32 | int64 [B, H, N, D]
        All have the same strides between images, heads, tokens and features.
    indices_ptr : int64 [B, K]
        Strides between images and kept tokens. An index outside [0, N) reads nothing and gives zeros.
    out_ptrs : tuple of the same dtype [B, H, K, D]
        All have the same strides. Written, each element once.

    Program (b·H + h, t, j) copies BLOCK_D features of all kept tokens of one head, BLOCK_K tokens at a time. All
    programs together read and write T·B·H·K·D elements.
    """
    # offsets
    tensor = tl.program_id(1)
    x_ptr, out_ptr = x_ptrs[0], out_ptrs[0]
    for t in tl.static_range(1, len(x_ptrs)):
        x_ptr = tl.where(tensor == t, x_ptrs[t], x_ptr)
        out_ptr = tl.where(tensor == t, out_ptrs[t], out_ptr)
    b = tl.program_id(0).to(tl.int64) // num_heads
    h = tl.program_id(0).to(tl.int64) % num_heads
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_head = (d < num_features)[None, :]
    d = d.to(tl.int64)
    x_ptr += b * x_stride_b + h * x_stride_h
    out_ptr += b * out_stride_b + h * out_stride_h

    start = 0
    while start < num_kept:
        k = start + tl.arange(0, BLOCK_K)

        # masks
        in_kept = k < num_kept
        k = k.to(tl.int64)
        write = in_kept[:, None] & in_head

        # loads and store
        n = tl.load(indices_ptr + b * indices_stride_b + k * indices_stride_k, mask=in_kept, other=-1)
        read = write & ((n >= 0) & (n < num_tokens))[:, None]
        x = tl.load(x_ptr + n[:, None] * x_stride_n + d[None, :] * x_stride_d, mask=read, other=0)
        tl.store(out_ptr + k[:, None] * out_stride_k + d[None, :] * out_stride_d, x, mask=write)
        start += BLOCK_K

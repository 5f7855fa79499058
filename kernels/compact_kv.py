"""compact and compact_kv: gather the kept rows of hidden states and of KV caches. Copies of bytes, of any meaning."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc_kernels import tuning

# Elements are copied as integers of their size: no arithmetic can touch a NaN's payload or round a bfloat16.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(x: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Launch the kernel, once for all tensors: ``result[b, k] = x[b, indices[b, k]]``.

    Parameters
    ----------
    x : Tensor[B, N, ...] or a sequence of such tensors, any dtypes
        Any strides; only trailing axes that no view can flatten are copied beforehand.
    indices : Tensor[B, K], int64
        Any strides. An index outside [0, N) reads nothing and gives a row of zeros.

    Returns
    -------
    Tensor[B, K, ...] or a tuple of them, the dtypes of `x`
        Contiguous.
    """
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    if not tensors or any(tensor.ndim < 2 or tensor.shape[:2] != tensors[0].shape[:2] for tensor in tensors):
        raise ValueError(f"x must be [B, N, ...], all with one B and N, got {[list(t.shape) for t in tensors]}")
    num_images, num_tokens = tensors[0].shape[:2]
    _check_indices(indices, num_images, tensors)

    num_kept = indices.shape[1]
    out = tuple(
        torch.empty((num_images, num_kept, *tensor.shape[2:]), dtype=tensor.dtype, device=tensor.device)
        for tensor in tensors
    )
    sources = tuple(_as_integers(tensor).flatten(2) for tensor in tensors)  # [B, N, D]
    num_features = tuple(source.shape[2] for source in sources)
    block_k, block_d = tuning.compact_blocks(max(num_features))
    grid = (num_images * triton.cdiv(num_kept, block_k), triton.cdiv(max(num_features), block_d), len(tensors))
    with torch.cuda.device_of(indices):
        _compact_kernel[grid](
            # tensors
            sources,
            indices,
            tuple(_as_integers(tensor) for tensor in out),
            # strides
            tuple(source.stride() for source in sources),
            *indices.stride(),
            # scalars
            num_tokens,
            num_kept,
            num_features,
            # constexprs
            BLOCK_K=block_k,
            BLOCK_D=block_d,
        )
    return out[0] if isinstance(x, Tensor) else out


def compact_kv(
    keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, *, in_place: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Launch the kernel, once for the keys and values of all layers: ``result[b, h, k] = x[b, h, indices[b, k]]``.

    Parameters
    ----------
    keys, values : sequences of Tensor[B, H, N, D], any dtype of 1, 2, 4 or 8 bytes
        One per layer. Any strides; a launch covers the tensors with equal shape, dtype and strides, usually all.
    indices : Tensor[B, K], int64
        In place: ascending and unique in each row. An index outside [0, N) reads nothing and gives a row of zeros.
    in_place : bool
        Move the kept rows to the front of the tensors themselves, for a preallocated cache. Rows from K on are left as
        they are. No two elements may share memory: their rows would be moved twice. This is not checked here.

    Returns
    -------
    keys, values : tuples of Tensor[B, H, K, D], the dtypes given
        New tensors, or views of the given ones.
    """
    tensors = (*keys, *values)
    if not tensors or len(keys) != len(values) or any(tensor.ndim != 4 for tensor in tensors):
        raise ValueError(f"keys and values must be [B, H, N, D], one each per layer, got {len(keys)} and {len(values)}")
    num_images, num_tokens = tensors[0].shape[0], tensors[0].shape[2]
    if any((tensor.shape[0], tensor.shape[2]) != (num_images, num_tokens) for tensor in tensors):
        raise ValueError(f"keys and values must have one B and N, got {[list(tensor.shape) for tensor in tensors]}")
    _check_indices(indices, num_images, tensors)
    if any(tensor.element_size() not in _INTEGER for tensor in tensors):
        raise ValueError(f"elements of 1, 2, 4 or 8 bytes can be copied, got {[t.dtype for t in tensors]}")
    num_kept = indices.shape[1]
    if in_place and num_kept > num_tokens:
        raise ValueError(f"in place at most N = {num_tokens} rows fit, got {num_kept} indices")

    alike: dict[object, list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.stride(), tensor.dtype), []).append(number)
    results = {}
    for numbers in alike.values():
        sources = [tensors[number] for number in numbers]
        _, num_heads, _, num_features = sources[0].shape
        if in_place:
            targets = [source[:, :, :num_kept] for source in sources]
        else:
            shape = (num_images, num_heads, num_kept, num_features)
            targets = [torch.empty(shape, dtype=source.dtype, device=source.device) for source in sources]
        results.update(zip(numbers, targets, strict=True))
        block_k, block_d, num_warps = tuning.compact_kv_blocks(num_features)
        with torch.cuda.device_of(indices):
            _compact_kv_kernel[(num_images * num_heads, len(sources), triton.cdiv(num_features, block_d))](
                # tensors
                tuple(_as_integers(source) for source in sources),
                indices,
                tuple(_as_integers(target) for target in targets),
                # strides
                *sources[0].stride(),
                *indices.stride(),
                *targets[0].stride(),
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
    moved = tuple(results[number] for number in range(len(tensors)))
    return moved[: len(keys)], moved[len(keys) :]


def _check_indices(indices: Tensor, num_images: int, tensors: Sequence[Tensor]) -> None:
    if indices.ndim != 2 or len(indices) != num_images or indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64 [{num_images}, K], got {indices.dtype} {list(indices.shape)}")
    devices = {tensor.device for tensor in (indices, *tensors)}
    if len(devices) > 1:
        raise ValueError(f"tensors on different devices: {', '.join(map(str, devices))}")


def _as_integers(x: Tensor) -> Tensor:
    """The same bytes as integers, `[B, N, ..., D]` with at least three axes."""
    x = x.resolve_conj().resolve_neg()  # bytes must mean what they say
    if x.is_complex() and x.element_size() not in _INTEGER:
        x = torch.view_as_real(x)
    if x.ndim == 2:
        x = x.unsqueeze(2)
    return x.view(_INTEGER[x.element_size()])


@triton.jit
def _compact_kernel(
    # tensors
    x_ptrs,
    indices_ptr,
    out_ptrs,
    # strides
    x_strides,
    indices_stride_b,
    indices_stride_k,
    # scalars
    num_tokens,
    num_kept,
    num_features,
    # constexprs
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy rows of several tensors x_t by index: ``out_t[b, k, d] = x_t[b, indices[b, k], d]``.

    Parameters
    ----------
    x_ptrs : tuple of uint8 | int16 | int32 | int64 [B, N, D_t]
        `x_strides` is a tuple of their strides between images, tokens and features, `num_features` of their D_t.
    indices_ptr : int64 [B, K]
        Strides between images and kept tokens. Neither order nor uniqueness is needed; an index outside [0, N) reads
        nothing and gives zeros.
    out_ptrs : tuple of the same dtypes [B, K, D_t], contiguous
        Written, each element once.

    Program (b·ceil(K / BLOCK_K) + i, j, t) copies BLOCK_D features of BLOCK_K rows of image b of tensor t. All programs
    together read and write B·K·ΣD_t elements.
    """
    # offsets
    blocks = tl.cdiv(num_kept, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    k = (program % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)

    # masks
    in_kept = k < num_kept

    # loads and store
    n = tl.load(indices_ptr + b * indices_stride_b + k * indices_stride_k, mask=in_kept, other=-1)
    for t in tl.static_range(len(x_ptrs)):
        if tl.program_id(2) == t:
            write = in_kept[:, None] & (d < num_features[t])[None, :]
            read = write & ((n >= 0) & (n < num_tokens))[:, None]
            x_offsets = b * x_strides[t][0] + n[:, None] * x_strides[t][1] + d[None, :] * x_strides[t][2]
            x = tl.load(x_ptrs[t] + x_offsets, mask=read, other=0)
            tl.store(out_ptrs[t] + (b * num_kept + k)[:, None] * num_features[t] + d[None, :], x, mask=write)


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
    """Copy rows of several caches x_t of one layout by index: ``out_t[b, h, k, d] = x_t[b, h, indices[b, k], d]``.

    Parameters
    ----------
    x_ptrs : tuple of uint8 | int16 | int32 | int64 [B, H, N, D]
        The same strides for all, between images, heads, tokens and features.
    indices_ptr : int64 [B, K]
        Strides between images and kept tokens. An index outside [0, N) reads nothing and gives zeros.
    out_ptrs : tuple of the same dtype [B, H, K, D]
        The same strides for all. Written, each element once. May be x_t itself if the indices of each row ascend and no
        two elements share memory.

    Program (b·H + h, t, j) copies BLOCK_D features of all rows of one head, BLOCK_K rows at a time, from the front.
    Ascending unique indices are never below their own place: indices[k] >= k. So what a block reads lies at or behind
    the rows it writes, never before, and no later block needs the rows that it overwrites. All programs together read
    and write T·B·H·K·D elements.
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
        tl.debug_barrier()  # in place, a row may be read by one thread and written by another (see `tuning`)
        tl.store(out_ptr + k[:, None] * out_stride_k + d[None, :] * out_stride_d, x, mask=write)
        start += BLOCK_K

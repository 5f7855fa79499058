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
) -> tuple[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor]:
    """Launch the kernel once for all tensors with the same shape, dtype and strides; usually these are all tensors.

    Then the results are two tensors [L, B, H, K, D]. An index outside [0, N) reads nothing and gives zeros.
    """
    tensors = (*keys, *values)
    if len({tensor.dtype for tensor in tensors}) == len(set(map(Tensor.size, tensors))) == 1 and (
        len(set(map(Tensor.stride, tensors))) == 1
    ):
        same = _gather(tensors, indices)
        return same[: len(keys)], same[len(keys) :]
    alike: dict[object, list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.stride(), tensor.dtype), []).append(number)
    results = {}
    for numbers in alike.values():
        results.update(zip(numbers, _gather([tensors[number] for number in numbers], indices), strict=True))
    kept = tuple(results[number] for number in range(len(tensors)))
    return kept[: len(keys)], kept[len(keys) :]


def _gather(tensors: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The kept tokens [T, B, H, K, D] of T tensors that have one shape, dtype, and strides."""
    first = tensors[0]
    if first.dtype.is_complex or any(map(Tensor.is_neg, tensors)):  # other bytes than values, or other strides
        integers = [as_integers(tensor) for tensor in tensors]
        if len(set(map(Tensor.stride, integers))) > 1:
            integers = [tensor.contiguous() for tensor in integers]
        tensors = integers
    num_images, num_heads, num_tokens, num_features = first.shape
    num_kept = indices.shape[1]
    out = torch.empty(
        (len(tensors), num_images, num_heads, num_kept, num_features), dtype=first.dtype, device=first.device
    )
    addresses = list(map(Tensor.data_ptr, tensors))
    block_k, block_d, num_warps = tuning.compact_kv_blocks(num_features)
    with torch.cuda.device_of(indices):
        _compact_kv_kernel[(num_images * num_heads, len(tensors), triton.cdiv(num_features, block_d))](
            # tensors
            _table(tensors, addresses),
            indices,
            as_integers(out),
            # strides
            *tensors[0].stride(),
            *indices.stride(),
            *out.stride(),
            # scalars
            num_heads,
            num_tokens,
            num_kept,
            num_features,
            # constexprs
            ALIGNED={address % 16 for address in addresses} == {0},
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return out


def _table(tensors: Sequence[Tensor], addresses: list[int]) -> Tensor:
    """The addresses of `tensors` as a tensor [T] int64 on their device. The host does not wait for the copy."""
    device = tensors[0].device
    if device.type != "cuda":
        return torch.tensor(addresses)
    if tuning.INTERPRETED:
        raise ValueError("compact_kv: Triton's interpreter reads the memory of the CPU, got tensors on a GPU.")
    if torch.cuda.is_current_stream_capturing():
        return _table_of_arguments(tensors)
    return torch.tensor(addresses, pin_memory=True).to(device, non_blocking=True)


def _table_of_arguments(tensors: Sequence[Tensor]) -> Tensor:
    """The same without a copy from the host, which a captured graph would repeat at every replay."""
    table = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    _table_kernel[(1,)](tuple(tensors), table, num_warps=1)
    return table


@triton.jit
def _table_kernel(x_ptrs, addresses_ptr):
    """Write the address of each tensor `x_ptrs[t]`, of any dtype, to `addresses_ptr` int64 [T]: one program."""
    for t in tl.static_range(len(x_ptrs)):
        tl.store(addresses_ptr + t, x_ptrs[t].to(tl.int64))


@triton.jit
def _compact_kv_kernel(
    # tensors
    addresses_ptr,
    indices_ptr,
    out_ptr,
    # strides
    x_stride_b,
    x_stride_h,
    x_stride_n,
    x_stride_d,
    indices_stride_b,
    indices_stride_k,
    out_stride_t,
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
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy tokens of several caches x_t of one layout by index: ``out_t[b, h, k, d] = x_t[b, h, indices[b, k], d]``.

    Parameters
    ----------
    addresses_ptr : int64 [T]
        The address of each x_t, uint8 | int16 | int32 | int64 [B, H, N, D]; ALIGNED if all are multiples of 16 bytes.
        All have the same strides between images, heads, tokens and features.
    indices_ptr : int64 [B, K]
        Strides between images and kept tokens. An index outside [0, N) reads nothing and gives zeros.
    out_ptr : the same dtype [T, B, H, K, D]
        Written, each element once.

    Program (b·H + h, t, j) copies BLOCK_D features of all kept tokens of one head, BLOCK_K tokens at a time. All
    programs together read and write T·B·H·K·D elements.
    """
    # offsets
    t = tl.program_id(1).to(tl.int64)
    x_ptr = tl.load(addresses_ptr + t).to(out_ptr.dtype)
    if ALIGNED:  # which the compiler sees of a pointer argument, but not of a table
        x_ptr = tl.multiple_of(x_ptr, 16)
    b = tl.program_id(0).to(tl.int64) // num_heads
    h = tl.program_id(0).to(tl.int64) % num_heads
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_head = (d < num_features)[None, :]
    d = d.to(tl.int64)
    x_ptr += b * x_stride_b + h * x_stride_h
    out_ptr += t * out_stride_t + b * out_stride_b + h * out_stride_h

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

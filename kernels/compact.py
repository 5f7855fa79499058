"""compact: gather the kept rows of each image. A copy of bytes, whatever they stand for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc_kernels import tuning

# Elements are copied as integers of their size: no arithmetic can touch a NaN's payload or round a bfloat16.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(x: Tensor, indices: Tensor) -> Tensor:
    """Launch the kernel: ``result[b, k] = x[b, indices[b, k]]``.

    Parameters
    ----------
    x : Tensor[B, N, D], any dtype of 1, 2, 4 or 8 bytes
        Any strides.
    indices : Tensor[B, K], int64
        Any strides. An index outside [0, N) reads nothing and gives a row of zeros.

    Returns
    -------
    Tensor[B, K, D], the dtype of `x`
        Contiguous.
    """
    num_images, num_tokens, num_features = x.shape
    if indices.ndim != 2 or len(indices) != num_images or indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64 [{num_images}, K], got {indices.dtype} {list(indices.shape)}")
    if x.device != indices.device:
        raise ValueError(f"tensors on different devices: {x.device}, {indices.device}")
    if x.element_size() not in _INTEGER:
        raise ValueError(f"elements of 1, 2, 4 or 8 bytes can be copied, got {x.dtype} with {x.element_size()}")

    integer = _INTEGER[x.element_size()]
    x = x.resolve_conj().resolve_neg()  # bytes must mean what they say
    num_kept = indices.shape[1]
    out = torch.empty((num_images, num_kept, num_features), dtype=x.dtype, device=x.device)
    block_k, block_d = tuning.compact_blocks(num_features)
    with torch.cuda.device_of(x):
        _compact_kernel[(num_images * triton.cdiv(num_kept, block_k), triton.cdiv(num_features, block_d))](
            # tensors
            x.view(integer),
            indices,
            out.view(integer),
            # strides
            *x.stride(),
            *indices.stride(),
            # scalars
            num_tokens,
            num_kept,
            num_features,
            # constexprs
            BLOCK_K=block_k,
            BLOCK_D=block_d,
        )
    return out


@triton.jit
def _compact_kernel(
    # tensors
    x_ptr,
    indices_ptr,
    out_ptr,
    # strides
    x_stride_b,
    x_stride_n,
    x_stride_d,
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
    """Copy rows by index: ``out[b, k, d] = x[b, indices[b, k], d]``.

    Parameters
    ----------
    x_ptr : uint8 | int16 | int32 | int64 [B, N, D]
        Strides between images, tokens and features.
    indices_ptr : int64 [B, K]
        Strides between images and kept tokens. Neither order nor uniqueness is needed; an index outside [0, N) reads
        nothing and gives zeros.
    out_ptr : same dtype [B, K, D], contiguous
        Written, each element once.

    Program (b·ceil(K / BLOCK_K) + i, j) copies BLOCK_D features of BLOCK_K rows of image b. All programs together read
    and write B·K·D elements.
    """
    # offsets
    blocks = tl.cdiv(num_kept, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    k = (program % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)

    # masks
    in_kept = k < num_kept
    in_features = d < num_features
    write = in_kept[:, None] & in_features[None, :]

    # loads
    n = tl.load(indices_ptr + b * indices_stride_b + k * indices_stride_k, mask=in_kept, other=-1)
    read = write & ((n >= 0) & (n < num_tokens))[:, None]
    x = tl.load(x_ptr + b * x_stride_b + n[:, None] * x_stride_n + d[None, :] * x_stride_d, mask=read, other=0)

    # store
    tl.store(out_ptr + (b * num_kept + k)[:, None] * num_features + d[None, :], x, mask=write)

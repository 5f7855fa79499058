"""compact: gather the kept tokens of hidden states, positions and masks. Bytes are copied, whatever the dtype."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

# Elements are copied as integers of their size: no arithmetic can touch a NaN's payload or round a bfloat16.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(x: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Launch the kernel, once for all tensors. An index outside [0, N) reads nothing and gives zeros.

    Any strides. A tensor is copied first only if no view can flatten its trailing axes.
    """
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    num_images, num_tokens = tensors[0].shape[:2]
    num_kept = indices.shape[1]
    out = tuple(
        torch.empty((num_images, num_kept, *tensor.shape[2:]), dtype=tensor.dtype, device=tensor.device)
        for tensor in tensors
    )
    sources = tuple(as_integers(tensor).flatten(2) for tensor in tensors)  # [B, N, D]
    num_features = tuple(source.shape[2] for source in sources)
    block_k, block_d = tuning.compact_blocks(max(num_features))
    grid = (num_images * triton.cdiv(num_kept, block_k), triton.cdiv(max(num_features), block_d), len(tensors))
    with torch.cuda.device_of(indices):
        _compact_kernel[grid](
            # tensors
            sources,
            indices,
            tuple(as_integers(tensor) for tensor in out),
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


def as_integers(x: Tensor) -> Tensor:
    """The same bytes as integers, `[B, N, ..., D]` with at least three axes."""
    x = x.resolve_conj().resolve_neg()  # these views have other bytes than values
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
    """Copy tokens of several tensors x_t by index: ``out_t[b, k, d] = x_t[b, indices[b, k], d]``.

    Parameters
    ----------
    x_ptrs : tuple of uint8 | int16 | int32 | int64 [B, N, D_t]
        `x_strides` is a tuple of their strides between images, tokens and features, `num_features` of their D_t.
    indices_ptr : int64 [B, K]
        Strides between images and kept tokens. Neither order nor uniqueness is needed; an index outside [0, N) reads
        nothing and gives zeros.
    out_ptrs : tuple of the same dtypes [B, K, D_t], contiguous
        Written, each element once.

    Program (b·ceil(K / BLOCK_K) + i, j, t) copies BLOCK_D features of BLOCK_K tokens of image b of tensor t. All
    programs together read and write B·K·ΣD_t elements.
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

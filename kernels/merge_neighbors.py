"""merge: rows that take up the tokens like them. PruMerge's 32 most similar, VisionZip's nearest target.

Every result row is a weighted sum of the rows of x, so the work is in three steps: the cosine similarity of each target
to every token [B, K, N], from it the weights [B, R, N], and their product with x. Nothing has a feature axis and a
token axis and a target axis at once. Membership is decided by one program for each row or column, without atomics: the
order of every sum is fixed, and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc_kernels import tuning
from vtc_kernels.topk import _ordered

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def merge(
    x: Tensor,
    key: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    neighbors: int | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch three kernels with `neighbors`, four without.

    Parameters
    ----------
    x : Tensor[B, N, D], float32, float16 or bfloat16
        Any strides.
    key : Tensor[B, N, C], float32, float16 or bfloat16
        Any strides.
    targets : Tensor[B, K], int64
        Any strides. An index outside [0, N) reads nothing: its key and its row are zeros.
    weight : Tensor[B, N], float32
        Any strides.
    neighbors : int, optional
        How many others a target takes up, at least 1; all N - 1 where there are fewer. When not given, each token joins
        the nearest target.
    counts : Tensor[B], int64, optional
        How many targets each image has, at most K; K when not given.

    Returns
    -------
    rows : Tensor[B, R, D], the dtype of `x`
        Contiguous; R = K + 1 with `neighbors`, otherwise R = K.
    mix : Tensor[B, R, N], float32
        Contiguous; rows = mix · x.
    """
    if x.ndim != 3 or key.ndim != 3 or x.shape[:2] != key.shape[:2] or 0 in (x.shape[1], key.shape[2]):
        raise ValueError(
            f"x must be [B, N, D] and key [B, N, C] with a token and a feature, got {list(x.shape)} and "
            f"{list(key.shape)}"
        )
    if x.dtype not in _DTYPES or key.dtype not in _DTYPES:
        raise ValueError(f"x and key must be float32, float16 or bfloat16, got {x.dtype} and {key.dtype}")
    num_images, num_tokens, num_outputs = x.shape
    if targets.ndim != 2 or len(targets) != num_images or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{num_images}, K], got {targets.dtype} {list(targets.shape)}")
    if weight.shape != (num_images, num_tokens) or weight.dtype != torch.float32:
        raise ValueError(f"weight must be float32 [{num_images}, {num_tokens}], got {weight.dtype} {[*weight.shape]}")
    if counts is not None and (counts.shape != (num_images,) or counts.dtype != torch.int64):
        raise ValueError(f"counts must be int64 [{num_images}], got {counts.dtype} {list(counts.shape)}")
    if neighbors is not None and neighbors < 1:
        raise ValueError(f"neighbors must be at least 1, or None for the nearest target, got {neighbors}")
    devices = {tensor.device for tensor in (x, key, targets, weight, counts) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors on different devices: {', '.join(map(str, devices))}")

    num_targets = targets.shape[1]
    num_rows = num_targets if neighbors is None else num_targets + 1
    rows = torch.empty((num_images, num_rows, num_outputs), dtype=x.dtype, device=x.device)
    mix = torch.empty((num_images, num_rows, num_tokens), dtype=torch.float32, device=x.device)
    similarity = torch.empty((num_images, num_targets, num_tokens), dtype=torch.float32, device=x.device)
    counts_stride = 0 if counts is None else counts.stride(0)
    with torch.cuda.device_of(x):
        block_k, block_n, block_c, num_warps = tuning.similarity_blocks(key.element_size())
        _similarity_kernel[(num_images * triton.cdiv(num_targets, block_k) * triton.cdiv(num_tokens, block_n),)](
            # tensors
            key,
            targets,
            counts,
            similarity,
            # strides
            *key.stride(),
            *targets.stride(),
            counts_stride,
            # scalars
            num_tokens,
            num_targets,
            # constexprs
            WIDEN=tuning.INTERPRETED and key.dtype == torch.bfloat16,
            BLOCK_K=block_k,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            NUM_FEATURES=key.shape[2],
            num_warps=num_warps,
            num_stages=2,
        )
        block_n, num_warps = tuning.mix_row_block(num_tokens)
        if neighbors is None:
            nearest = torch.empty((num_images, num_tokens), dtype=torch.int32, device=x.device)
            tile_k, tile_n = tuning.nearest_blocks()
            _nearest_kernel[(num_images * triton.cdiv(num_tokens, tile_n),)](
                # tensors
                similarity,
                targets,
                weight,
                counts,
                nearest,
                # strides
                *targets.stride(),
                *weight.stride(),
                counts_stride,
                # scalars
                num_tokens,
                num_targets,
                # constexprs
                BLOCK_K=tile_k,
                BLOCK_N=tile_n,
            )
            _members_kernel[(num_images * num_rows,)](
                # tensors
                nearest,
                targets,
                weight,
                counts,
                mix,
                # strides
                *targets.stride(),
                *weight.stride(),
                counts_stride,
                # scalars
                num_tokens,
                num_targets,
                # constexprs
                NUM_BLOCKS=triton.cdiv(num_tokens, block_n),
                BLOCK_N=block_n,
                num_warps=num_warps,
            )
        else:
            _neighbors_kernel[(num_images * num_rows,)](
                # tensors
                similarity,
                targets,
                weight,
                counts,
                mix,
                # strides
                *targets.stride(),
                *weight.stride(),
                counts_stride,
                # scalars
                num_tokens,
                num_targets,
                min(neighbors, num_tokens - 1),
                # constexprs
                NUM_BLOCKS=triton.cdiv(num_tokens, block_n),
                BLOCK_N=block_n,
                num_warps=num_warps,
            )
        block_r, block_n, block_d = tuning.mix_blocks()
        _mix_kernel[(num_images * triton.cdiv(num_rows, block_r), triton.cdiv(num_outputs, block_d))](
            # tensors
            mix,
            x,
            counts,
            rows,
            # strides
            *x.stride(),
            counts_stride,
            # scalars
            num_tokens,
            num_targets,
            num_rows,
            num_outputs,
            # constexprs
            ROUND=tuning.INTERPRETED and x.dtype == torch.bfloat16,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_stages=1,
        )
    return rows, mix


@triton.jit
def _count(counts_ptr, counts_stride_b, b, num_targets):
    """How many of an image's targets count; more than there are would read beyond them."""
    count = num_targets
    if counts_ptr is not None:
        count = tl.minimum(tl.load(counts_ptr + b * counts_stride_b), num_targets).to(tl.int32)
    return count


@triton.jit
def _similarity_kernel(
    # tensors
    key_ptr,
    targets_ptr,
    counts_ptr,
    similarity_ptr,
    # strides
    key_stride_b,
    key_stride_n,
    key_stride_c,
    targets_stride_b,
    targets_stride_k,
    counts_stride_b,
    # scalars
    num_tokens,
    num_targets,
    # constexprs
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
):
    """Cosine similarity of the targets' keys to all keys.

    ::

        similarity[b, k, n] = key[b, t] · key[b, n] / (max(|key[b, t]|, ε) · max(|key[b, n]|, ε))
        t = targets[b, k],  ε = 1e-12

    Parameters
    ----------
    key_ptr : fp32 | fp16 | bf16 [B, N, C]
        Strides between images, tokens and features. Products of 16-bit keys are summed in fp32; those of fp32 keys are
        IEEE. With WIDEN, 16-bit keys become fp32, too: Triton's interpreter has no bfloat16 arithmetic.
    targets_ptr : int64 [B, K]
        Strides between images and targets. One outside [0, N) has a key of zeros.
    counts_ptr : int64 [B], or None
        Stride between images. Rows of blocks that lie beyond it wholly are not written.
    similarity_ptr : fp32 [B, K, N], contiguous
        Written. NaN where a key holds NaN or inf.

    Program (b·ceil(K / BLOCK_K) + i)·ceil(N / BLOCK_N) + j processes BLOCK_K targets and BLOCK_N tokens of one image,
    BLOCK_C of the C = NUM_FEATURES features at a time, with both squared norms beside the product. All programs read
    B·K·N·C·(1/BLOCK_K + 1/BLOCK_N) keys, which come from L2 but for the first time, and write 4·B·K·N bytes.
    """
    # offsets
    target_blocks = tl.cdiv(num_targets, BLOCK_K)
    token_blocks = tl.cdiv(num_tokens, BLOCK_N)
    row = tl.program_id(0) // token_blocks  # which [b, block of targets]
    b = (row // target_blocks).to(tl.int64)
    first = (row % target_blocks) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    n = (tl.program_id(0) % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    target_ptrs = targets_ptr + b * targets_stride_b + k.to(tl.int64) * targets_stride_k
    t = tl.load(target_ptrs, mask=k < num_targets, other=-1)
    key_ptr += b * key_stride_b

    # masks
    is_target = ((t >= 0) & (t < num_tokens))[:, None]
    in_row = (n < num_tokens)[None, :]

    if first < _count(counts_ptr, counts_stride_b, b, num_targets):
        # loads and compute, one block of features after the other: padded features add 0
        product = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        target_square = tl.zeros((BLOCK_K,), tl.float32)
        token_square = tl.zeros((BLOCK_N,), tl.float32)
        for block in range(tl.cdiv(NUM_FEATURES, BLOCK_C)):
            c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            in_key = c < NUM_FEATURES
            c = c.to(tl.int64)
            target_offsets = t[:, None] * key_stride_n + c[None, :] * key_stride_c
            token_offsets = n[None, :] * key_stride_n + c[:, None] * key_stride_c
            target = tl.load(key_ptr + target_offsets, mask=is_target & in_key[None, :], other=0.0)
            token = tl.load(key_ptr + token_offsets, mask=in_key[:, None] & in_row, other=0.0)
            if WIDEN:
                target = target.to(tl.float32)
                token = token.to(tl.float32)
            wide_target = target.to(tl.float32)
            wide_token = token.to(tl.float32)
            target_square += tl.sum(wide_target * wide_target, axis=1)
            token_square += tl.sum(wide_token * wide_token, axis=0)
            product = tl.dot(target, token, product, input_precision="ieee")
        norms = tl.maximum(tl.sqrt(target_square), 1e-12)[:, None] * tl.maximum(tl.sqrt(token_square), 1e-12)[None, :]

        # store
        similarity_ptr += b * num_targets * num_tokens
        out_offsets = k[:, None].to(tl.int64) * num_tokens + n[None, :]
        tl.store(similarity_ptr + out_offsets, product / norms, mask=(k < num_targets)[:, None] & in_row)


@triton.jit
def _neighbors_kernel(
    # tensors
    similarity_ptr,
    targets_ptr,
    weight_ptr,
    counts_ptr,
    mix_ptr,
    # strides
    targets_stride_b,
    targets_stride_k,
    weight_stride_b,
    weight_stride_n,
    counts_stride_b,
    # scalars
    num_tokens,
    num_targets,
    neighbors,
    # constexprs
    NUM_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weights with which a target takes up its most similar others, and the row of all that is dropped.

    ::

        mix[b, k, n] = 1            n = t                                                   k < count, t = targets[b, k]
                     = weight[b, n] n one of the `neighbors` most similar to t, n ≠ t
                     = 0            otherwise
        mix[b, count, n] = weight[b, n] where n is no target, 0 where it is
        mix[b, k, n] = 0            k > count

    Parameters
    ----------
    similarity_ptr : fp32 [B, K, N], contiguous
        NaN counts as -inf. Ties go to the lower index.
    targets_ptr : int64 [B, K]
        Strides between images and targets.
    weight_ptr : fp32 [B, N]
        Strides between images and tokens.
    counts_ptr : int64 [B], or None
        Stride between images; count = counts[b], or K.
    mix_ptr : fp32 [B, K + 1, N], contiguous
        Written.

    Program b·(K + 1) + k processes one row. It finds the similarity of the last neighbor by a search over the bits of
    an order-preserving integer, two bits a pass, as `topk` does: 18 passes over N similarities, in registers or from L1
    where they are several blocks.
    """
    # offsets
    b = (tl.program_id(0) // (num_targets + 1)).to(tl.int64)
    k = (tl.program_id(0) % (num_targets + 1)).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    similarity_ptr += (b * num_targets + k) * num_tokens
    targets_ptr += b * targets_stride_b
    weight_ptr += b * weight_stride_b
    mix_ptr += (b * (num_targets + 1) + k) * num_tokens
    count = _count(counts_ptr, counts_stride_b, b, num_targets)

    if k < count:
        # The target itself ranks below everything: it is not its own neighbor, however the others compare.
        t = tl.load(targets_ptr + k * targets_stride_k)
        rank = _rank(similarity_ptr, column, t, num_tokens)  # stays in registers where it is one block
        threshold = tl.full([], -(2**31), tl.int32)
        for i in range(16):
            quarter = tl.full([], 1, tl.int32) << (30 - 2 * i)
            reached = tl.zeros([BLOCK_N], tl.int64)
            for block in range(NUM_BLOCKS):
                if NUM_BLOCKS > 1:
                    rank = _rank(similarity_ptr, block * BLOCK_N + column, t, num_tokens)
                reached += (rank >= threshold + quarter).to(tl.int64)
                reached += (rank >= threshold + 2 * quarter).to(tl.int64) << 21
                reached += (rank >= threshold + 3 * quarter).to(tl.int64) << 42
            reach = tl.sum(reached, axis=0)
            steps = ((reach & 0x1FFFFF) >= neighbors).to(tl.int32)
            steps += (((reach >> 21) & 0x1FFFFF) >= neighbors).to(tl.int32)
            steps += ((reach >> 42) >= neighbors).to(tl.int32)
            threshold += steps * quarter

        above = tl.zeros([BLOCK_N], tl.int32)
        for block in range(NUM_BLOCKS):
            if NUM_BLOCKS > 1:
                rank = _rank(similarity_ptr, block * BLOCK_N + column, t, num_tokens)
            above += (rank > threshold).to(tl.int32)
        wanted_ties = neighbors - tl.sum(above, axis=0)

        seen_ties = 0
        for block in range(NUM_BLOCKS):
            n = block * BLOCK_N + column
            if NUM_BLOCKS > 1:
                rank = _rank(similarity_ptr, n, t, num_tokens)
            tie = (rank == threshold).to(tl.int32)
            member = (rank > threshold) | ((tie > 0) & (seen_ties + tl.cumsum(tie, axis=0) <= wanted_ties))
            seen_ties += tl.sum(tie, axis=0)
            weight = tl.load(weight_ptr + n * weight_stride_n, mask=n < num_tokens, other=0.0)
            tl.store(mix_ptr + n, tl.where(n == t, 1.0, tl.where(member, weight, 0.0)), mask=n < num_tokens)
    else:
        for block in range(NUM_BLOCKS):
            n = block * BLOCK_N + column
            weight = tl.load(weight_ptr + n * weight_stride_n, mask=n < num_tokens, other=0.0)
            tl.store(mix_ptr + n, tl.where(k == count, weight, 0.0), mask=n < num_tokens)
        # Another thread may have stored the weight of a target: that store must land before this one (see `tuning`).
        tl.debug_barrier()
        start = 0
        while start < count:
            j = start + column
            t = tl.load(targets_ptr + j * targets_stride_k, mask=j < count, other=-1)
            tl.store(mix_ptr + t, tl.zeros([BLOCK_N], tl.float32), mask=(t >= 0) & (t < num_tokens))
            start += BLOCK_N


@triton.jit
def _rank(similarity_ptr, n, t, num_tokens):
    """Similarities of tokens `n` to target `t` as integers in the same order; `t` itself, and padding, lowest."""
    similarity = tl.load(similarity_ptr + n, mask=n < num_tokens, other=0.0)
    return _ordered(similarity, (n < num_tokens) & (n != t), 32)


@triton.jit
def _nearest_kernel(
    # tensors
    similarity_ptr,
    targets_ptr,
    weight_ptr,
    counts_ptr,
    nearest_ptr,
    # strides
    targets_stride_b,
    targets_stride_k,
    weight_stride_b,
    weight_stride_n,
    counts_stride_b,
    # scalars
    num_tokens,
    num_targets,
    # constexprs
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The target that each token joins.

    ::

        nearest[b, n] = argmax_k similarity[b, k, n],  k < count;  -1 where n is a target or weight[b, n] = 0

    Parameters
    ----------
    similarity_ptr : fp32 [B, K, N], contiguous
        NaN counts as -inf. Ties go to the lower k.
    targets_ptr : int64 [B, K]
        Strides between images and targets.
    weight_ptr : fp32 [B, N]
        Strides between images and tokens.
    counts_ptr : int64 [B], or None
        Stride between images; count = counts[b], or K. With a count of 0 every token gets -1.
    nearest_ptr : int32 [B, N], contiguous
        Written.

    Program b·ceil(N / BLOCK_N) + j processes BLOCK_N tokens of one image, BLOCK_K targets at a time. All programs
    together read 4·B·K·N bytes and write 4·B·N.
    """
    # offsets
    token_blocks = tl.cdiv(num_tokens, BLOCK_N)
    b = (tl.program_id(0) // token_blocks).to(tl.int64)
    n = (tl.program_id(0) % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    count = _count(counts_ptr, counts_stride_b, b, num_targets)

    # masks
    in_row = n < num_tokens

    # loads and compute: the first of the best, block after block
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    nearest = tl.full((BLOCK_N,), -1, tl.int32)
    excluded = tl.load(weight_ptr + b * weight_stride_b + n * weight_stride_n, mask=in_row, other=0.0) == 0.0
    start = 0
    while start < count:
        k = start + tl.arange(0, BLOCK_K)
        is_target = (k < count)[:, None]
        similarity_offsets = (b * num_targets + k[:, None]) * num_tokens + n[None, :]
        similarity = tl.load(similarity_ptr + similarity_offsets, mask=is_target & in_row[None, :], other=float("-inf"))
        similarity = tl.where(similarity != similarity, float("-inf"), similarity)
        highest = tl.max(similarity, axis=0)
        found = tl.where((similarity == highest[None, :]) & is_target, k[:, None], num_targets)
        better = (highest > best) | (nearest < 0)
        nearest = tl.where(better, tl.min(found, axis=0), nearest)
        best = tl.where(better, highest, best)
        t = tl.load(targets_ptr + b * targets_stride_b + k.to(tl.int64) * targets_stride_k, mask=k < count, other=-1)
        excluded = excluded | (tl.max((t[:, None] == n[None, :]).to(tl.int32), axis=0) > 0)
        start += BLOCK_K

    # store
    tl.store(nearest_ptr + b * num_tokens + n, tl.where(excluded, -1, nearest), mask=in_row)


@triton.jit
def _members_kernel(
    # tensors
    nearest_ptr,
    targets_ptr,
    weight_ptr,
    counts_ptr,
    mix_ptr,
    # strides
    targets_stride_b,
    targets_stride_k,
    weight_stride_b,
    weight_stride_n,
    counts_stride_b,
    # scalars
    num_tokens,
    num_targets,
    # constexprs
    NUM_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weights with which a target takes up its members: their weighted mean.

    ::

        mix[b, k, n] = 1                                                    n = targets[b, k], k < count
                     = weight[b, n] / Σ_m [nearest[b, m] = k] weight[b, m]  nearest[b, n] = k
                     = 0                                                    otherwise

    Parameters
    ----------
    nearest_ptr : int32 [B, N], contiguous
        From `_nearest_kernel`.
    targets_ptr : int64 [B, K]
        Strides between images and targets.
    weight_ptr : fp32 [B, N]
        Strides between images and tokens.
    counts_ptr : int64 [B], or None
        Stride between images; count = counts[b], or K.
    mix_ptr : fp32 [B, K, N], contiguous
        Written.

    Program b·K + k processes one row: twice over 8·N bytes, and 4·N bytes written.
    """
    # offsets
    b = (tl.program_id(0) // num_targets).to(tl.int64)
    k = (tl.program_id(0) % num_targets).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    nearest_ptr += b * num_tokens
    weight_ptr += b * weight_stride_b
    mix_ptr += (b * num_targets + k) * num_tokens
    t = tl.load(targets_ptr + b * targets_stride_b + k * targets_stride_k)
    t = tl.where(k < _count(counts_ptr, counts_stride_b, b, num_targets), t, -1)

    # loads, compute and store
    sums = tl.zeros([BLOCK_N], tl.float32)
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        member = tl.load(nearest_ptr + n, mask=n < num_tokens, other=-1) == k
        sums += tl.load(weight_ptr + n * weight_stride_n, mask=member, other=0.0)
    total = tl.sum(sums, axis=0)
    for block in range(NUM_BLOCKS):
        n = block * BLOCK_N + column
        member = tl.load(nearest_ptr + n, mask=n < num_tokens, other=-1) == k
        share = tl.load(weight_ptr + n * weight_stride_n, mask=member, other=0.0) / total
        tl.store(mix_ptr + n, tl.where(n == t, 1.0, tl.where(member, share, 0.0)), mask=n < num_tokens)


@triton.jit
def _mix_kernel(
    # tensors
    mix_ptr,
    x_ptr,
    counts_ptr,
    rows_ptr,
    # strides
    x_stride_b,
    x_stride_n,
    x_stride_d,
    counts_stride_b,
    # scalars
    num_tokens,
    num_targets,
    num_rows,
    num_outputs,
    # constexprs
    ROUND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of x, mixed.

    ::

        rows[b, r, d] = Σ_n mix[b, r, n] · x[b, n, d]

    Parameters
    ----------
    mix_ptr : fp32 [B, R, N], contiguous
    x_ptr : fp32 | fp16 | bf16 [B, N, D]
        Strides between images, tokens and features. Widened on load: products and sums are IEEE fp32. NaN or inf in a
        token makes its feature NaN or inf in every row of the image, as 0 times it is NaN.
    counts_ptr : int64 [B], or None
        Stride between images. Rows after the count and the one more row (R = K + 1) are 0, and x is not read for them.
    rows_ptr : same dtype as x [B, R, D], contiguous
        Written, narrowed to the nearest. Triton's interpreter cuts off what a bfloat16 has no bits for: with ROUND, the
        sums are rounded to the nearest bfloat16 before.

    Program (b·ceil(R / BLOCK_R) + i, j) processes BLOCK_R rows and BLOCK_D features of one image, BLOCK_N tokens at a
    time. All programs together read 4·B·R·N·ceil(D / BLOCK_D) bytes of weights and B·N·D·ceil(R / BLOCK_R) elements of
    x, which come from L2 but for the first time, and write B·R·D elements.
    """
    # offsets
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    first = (tl.program_id(0) % row_blocks) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mix_offsets = r[:, None] * num_tokens + n[None, :]
    x_offsets = n[:, None] * x_stride_n + d[None, :] * x_stride_d
    mix_ptr += b * num_rows * num_tokens
    x_ptr += b * x_stride_b
    rows_ptr += b * num_rows * num_outputs

    # masks
    in_rows = (r < num_rows)[:, None]
    in_outputs = (d < num_outputs)[None, :]

    # loads and compute, one block of tokens after the other
    used = _count(counts_ptr, counts_stride_b, b, num_targets) + num_rows - num_targets
    end = tl.where(first < used, num_tokens, 0)
    mixed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    start = 0
    while start < end:
        # Two blocks are summed on their own: the error of one chain of N additions would be several times as large. Of
        # a single block the compiler would make that chain.
        pair = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for _ in tl.static_range(2):
            in_row = start + tl.arange(0, BLOCK_N) < num_tokens
            mix = tl.load(mix_ptr + mix_offsets, mask=in_rows & in_row[None, :], other=0.0)
            x = tl.load(x_ptr + x_offsets, mask=in_row[:, None] & in_outputs, other=0.0)
            pair = tl.dot(mix, x.to(tl.float32), pair, input_precision="ieee")
            start += BLOCK_N
            mix_ptr += BLOCK_N
            x_ptr += BLOCK_N * tl.cast(x_stride_n, tl.int64)
        mixed += pair

    if ROUND:
        bits = mixed.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even; would make some NaN a number
        mixed = tl.where(mixed == mixed, bits.to(tl.float32, bitcast=True), mixed)

    # store: rows after the used ones are 0 in a block with used ones, too
    mixed = tl.where((r < used)[:, None], mixed, 0.0)
    tl.store(rows_ptr + r[:, None] * num_outputs + d[None, :], mixed, mask=in_rows & in_outputs)

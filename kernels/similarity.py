"""similarity: cosine similarity of tokens, or its softmax. And what both merges share with it.

Every merged token is a weighted sum of the tokens of x, so merging takes three steps: the cosine similarity of each
target to every token [B, K, N], from it the weights [B, R, N], and their product with x. No tensor has a feature axis,
a token axis and a target axis at once. One program for each row or column decides which token is merged into which,
without atomics: the order of every sum is fixed, and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning


def similarity(x: Tensor, y: Tensor, *, temperature: float | None = None) -> Tensor:
    """Launch one kernel, or two with a temperature: float32 [B, R, N] whose columns are contiguous."""
    columns = _cosines(y, x)
    num_images, num_columns, num_rows = columns.shape
    if temperature is not None:
        block_n, block_r = tuning.softmax_blocks()
        with torch.cuda.device_of(x):
            _softmax_kernel[(num_images * triton.cdiv(num_rows, block_r),)](
                # tensors
                columns,
                # scalars
                num_columns,
                num_rows,
                1 / temperature,
                # constexprs
                BLOCK_N=block_n,
                BLOCK_R=block_r,
            )
    return columns.mT


def cosine_similarity(key: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Launch the kernel: float32 [B, K, N]. Blocks of targets that lie beyond the counts are not written."""
    return _cosines(key, key, targets, counts)


def _cosines(left: Tensor, right: Tensor, targets: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """The cosine similarity of the tokens of `left`, or of its targets, to those of `right`."""
    num_images, num_tokens, num_features = right.shape
    num_targets = left.shape[1] if targets is None else targets.shape[1]
    similarity = torch.empty((num_images, num_targets, num_tokens), dtype=torch.float32, device=right.device)
    block_k, block_n, block_c, num_warps = tuning.similarity_blocks(right.element_size())
    grid = (num_images * triton.cdiv(num_targets, block_k) * triton.cdiv(num_tokens, block_n),)
    with torch.cuda.device_of(right):
        _similarity_kernel[grid](
            # tensors
            left,
            right,
            targets,
            counts,
            similarity,
            # strides
            *left.stride(),
            *right.stride(),
            *((0, 0) if targets is None else targets.stride()),
            0 if counts is None else counts.stride(0),
            # scalars
            left.shape[1],
            num_tokens,
            num_targets,
            # constexprs
            WIDEN=tuning.INTERPRETED and right.dtype == torch.bfloat16,
            BLOCK_K=block_k,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            NUM_FEATURES=num_features,
            num_warps=num_warps,
            num_stages=2,
        )
    return similarity


def weighted_sum(mix: Tensor, x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Launch the kernel: ``mix · x`` [B, R, D] in the dtype of `x`. Sums r > counts[b] of image b are 0."""
    num_images, num_outputs, num_tokens = mix.shape
    num_features = x.shape[2]
    features = torch.empty((num_images, num_outputs, num_features), dtype=x.dtype, device=x.device)
    block_r, block_n, block_d = tuning.weighted_sum_blocks()
    with torch.cuda.device_of(x):
        _weighted_sum_kernel[(num_images * triton.cdiv(num_outputs, block_r), triton.cdiv(num_features, block_d))](
            # tensors
            mix,
            x,
            counts,
            features,
            # strides
            *x.stride(),
            0 if counts is None else counts.stride(0),
            # scalars
            num_tokens,
            num_outputs,
            num_features,
            # constexprs
            ROUND=tuning.INTERPRETED and x.dtype == torch.bfloat16,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_stages=1,
        )
    return features


@triton.jit
def load_count(counts_ptr, counts_stride_b, b, num_targets):
    """How many of an image's targets are valid: all if there are no counts, and at most `num_targets`."""
    count = num_targets
    if counts_ptr is not None:
        count = tl.minimum(tl.load(counts_ptr + b * counts_stride_b), num_targets).to(tl.int32)
    return count


@triton.jit
def _similarity_kernel(
    # tensors
    left_ptr,
    right_ptr,
    targets_ptr,
    counts_ptr,
    similarity_ptr,
    # strides
    left_stride_b,
    left_stride_n,
    left_stride_c,
    right_stride_b,
    right_stride_n,
    right_stride_c,
    targets_stride_b,
    targets_stride_k,
    counts_stride_b,
    # scalars
    num_left,
    num_tokens,
    num_targets,
    # constexprs
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
):
    """Cosine similarity of the targets among the left tokens to all right ones.

    ::

        similarity[b, k, n] = left[b, t] · right[b, n] / (max(|left[b, t]|, ε) · max(|right[b, n]|, ε))
        t = targets[b, k],  ε = 1e-12

    Parameters
    ----------
    left_ptr, right_ptr : fp32 | fp16 | bf16 [B, M, C], [B, N, C]
        Strides between images, tokens and features. Products in 16 bit are summed in fp32; those in fp32 are IEEE. With
        WIDEN, 16 bit become fp32, too: Triton's interpreter has no bfloat16 arithmetic.
    targets_ptr : int64 [B, K], or None
        Strides between images and targets. One outside [0, M) is a token of zeros. None: t = k.
    counts_ptr : int64 [B], or None
        Stride between images. Blocks of rows that lie wholly beyond it are not written.
    similarity_ptr : fp32 [B, K, N], contiguous
        Written. NaN where a token holds NaN or inf.

    Program (b·ceil(K / BLOCK_K) + i)·ceil(N / BLOCK_N) + j processes BLOCK_K targets and BLOCK_N tokens of one image,
    BLOCK_C of the C = NUM_FEATURES features at a time. It sums both squared norms together with the product. All
    programs read B·K·N·C·(1/BLOCK_K + 1/BLOCK_N) elements, after the first time from L2, and write 4·B·K·N bytes.
    """
    # offsets
    target_blocks = tl.cdiv(num_targets, BLOCK_K)
    token_blocks = tl.cdiv(num_tokens, BLOCK_N)
    target_block = tl.program_id(0) // token_blocks  # which [b, block of targets]
    b = (target_block // target_blocks).to(tl.int64)
    first = (target_block % target_blocks) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    n = (tl.program_id(0) % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    t = k.to(tl.int64)
    if targets_ptr is not None:
        t = tl.load(targets_ptr + b * targets_stride_b + t * targets_stride_k, mask=k < num_targets, other=-1)
    left_ptr += b * left_stride_b
    right_ptr += b * right_stride_b

    # masks
    is_target = ((t >= 0) & (t < num_left))[:, None]
    in_row = (n < num_tokens)[None, :]

    if first < load_count(counts_ptr, counts_stride_b, b, num_targets):
        # loads and compute, one block of features after the other: padded features add 0
        product = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        target_square = tl.zeros((BLOCK_K,), tl.float32)
        token_square = tl.zeros((BLOCK_N,), tl.float32)
        for block in range(tl.cdiv(NUM_FEATURES, BLOCK_C)):
            c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            in_key = c < NUM_FEATURES
            c = c.to(tl.int64)
            target_offsets = t[:, None] * left_stride_n + c[None, :] * left_stride_c
            token_offsets = n[None, :] * right_stride_n + c[:, None] * right_stride_c
            target = tl.load(left_ptr + target_offsets, mask=is_target & in_key[None, :], other=0.0)
            token = tl.load(right_ptr + token_offsets, mask=in_key[:, None] & in_row, other=0.0)
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
def _softmax_kernel(
    # tensors
    similarity_ptr,
    # scalars
    num_columns,
    num_rows,
    scale,
    # constexprs
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Softmax over the columns, in place.

    ::

        similarity[b, n, r] = softmax_n(scale · similarity[b, n, r])

    Parameters
    ----------
    similarity_ptr : fp32 [B, N, R], contiguous
        Overwritten. A row r that holds NaN becomes NaN.

    Program b·ceil(R / BLOCK_R) + i processes BLOCK_R rows of one image, BLOCK_N columns at a time. All programs
    together read 8·B·N·R bytes, half of them from L2, and write 4·B·N·R.
    """
    # offsets
    LOG2_E: tl.constexpr = 1.4426950408889634
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    r = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_N)
    row_ptrs = similarity_ptr + b * num_columns * num_rows + r[None, :]

    # masks
    in_rows = (r < num_rows)[None, :]

    # loads and compute: the maximum and the sum of each row in each of BLOCK_N lanes
    lane_max = tl.full((BLOCK_N, BLOCK_R), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    start = 0
    while start < num_columns:
        n = (start + column).to(tl.int64)[:, None]
        mask = (n < num_columns) & in_rows
        logits = tl.load(row_ptrs + n * num_rows, mask=mask, other=float("-inf")) * scale
        highest = tl.maximum(lane_max, logits)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        lane_sum = lane_sum * tl.exp2((lane_max - shift) * LOG2_E) + tl.exp2((logits - shift) * LOG2_E)
        lane_max = highest
        start += BLOCK_N
    row_max = tl.max(lane_max, axis=0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(lane_sum * tl.exp2((lane_max - row_max[None, :]) * LOG2_E), axis=0)

    # store
    start = 0
    while start < num_columns:
        n = (start + column).to(tl.int64)[:, None]
        mask = (n < num_columns) & in_rows
        logits = tl.load(row_ptrs + n * num_rows, mask=mask, other=0.0) * scale
        share = tl.exp2((logits - row_max[None, :]) * LOG2_E) / row_sum[None, :]
        tl.store(row_ptrs + n * num_rows, share, mask=mask)
        start += BLOCK_N


@triton.jit
def _weighted_sum_kernel(
    # tensors
    mix_ptr,
    x_ptr,
    counts_ptr,
    features_ptr,
    # strides
    x_stride_b,
    x_stride_n,
    x_stride_d,
    counts_stride_b,
    # scalars
    num_tokens,
    num_outputs,
    num_features,
    # constexprs
    ROUND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weighted sums of the tokens of x.

    ::

        features[b, r, d] = Σ_n mix[b, r, n] · x[b, n, d]

    Parameters
    ----------
    mix_ptr : fp32 [B, R, N], contiguous
    x_ptr : fp32 | fp16 | bf16 [B, N, D]
        Strides between images, tokens and features. Widened on load: products and sums are IEEE fp32. NaN or inf in a
        token makes its feature NaN or inf in every sum of the image, as 0 times it is NaN.
    counts_ptr : int64 [B], or None
        Stride between images. Sums r > counts[b] are 0, and x is not read for them.
    features_ptr : same dtype as x [B, R, D], contiguous
        Written, rounded to the nearest. Triton's interpreter truncates to bfloat16; with ROUND, the sums are rounded to
        the nearest bfloat16 first.

    Program (b·ceil(R / BLOCK_R) + i, j) processes BLOCK_R sums and BLOCK_D features of one image, BLOCK_N tokens at a
    time. All programs together read 4·B·R·N·ceil(D / BLOCK_D) bytes of weights and B·N·D·ceil(R / BLOCK_R) elements of
    x, after the first time from L2, and write B·R·D elements.
    """
    # offsets
    output_blocks = tl.cdiv(num_outputs, BLOCK_R)
    b = (tl.program_id(0) // output_blocks).to(tl.int64)
    first = (tl.program_id(0) % output_blocks) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mix_offsets = r[:, None] * num_tokens + n[None, :]
    x_offsets = n[:, None] * x_stride_n + d[None, :] * x_stride_d
    mix_ptr += b * num_outputs * num_tokens
    x_ptr += b * x_stride_b
    features_ptr += b * num_outputs * num_features

    # masks
    in_outputs = (r < num_outputs)[:, None]
    in_features = (d < num_features)[None, :]

    # loads and compute, one block of tokens after the other
    used = num_outputs
    if counts_ptr is not None:
        used = load_count(counts_ptr, counts_stride_b, b, num_outputs - 1) + 1
    end = tl.where(first < used, num_tokens, 0)
    mixed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    start = 0
    while start < end:
        # Two blocks are summed separately: the error of one chain of N additions would be several times as large. From
        # a single block the compiler would build that chain.
        pair = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for _ in tl.static_range(2):
            in_row = start + tl.arange(0, BLOCK_N) < num_tokens
            mix = tl.load(mix_ptr + mix_offsets, mask=in_outputs & in_row[None, :], other=0.0)
            x = tl.load(x_ptr + x_offsets, mask=in_row[:, None] & in_features, other=0.0)
            pair = tl.dot(mix, x.to(tl.float32), pair, input_precision="ieee")
            start += BLOCK_N
            mix_ptr += BLOCK_N
            x_ptr += BLOCK_N * tl.cast(x_stride_n, tl.int64)
        mixed += pair

    if ROUND:
        bits = mixed.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even; this would turn some NaN into a number
        mixed = tl.where(mixed == mixed, bits.to(tl.float32, bitcast=True), mixed)

    # store: sums after the used ones are 0 in a block with used ones, too
    mixed = tl.where((r < used)[:, None], mixed, 0.0)
    tl.store(features_ptr + r[:, None] * num_features + d[None, :], mixed, mask=in_outputs & in_features)

"""topk: indices exactly those of a sort in pure Python."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.kernels import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_pytorch,
    guarded_empty,
    in_layout,
    property_test,
    reserves,
)

from vtc import ops

INF, NAN = float("inf"), float("nan")


def oracle(scores, k):
    rows = [[-INF if math.isnan(score) else score for score in row] for row in scores.tolist()]
    best_first = [sorted(range(len(row)), key=lambda n, row=row: (-row[n], n)) for row in rows]
    return torch.tensor([sorted(order[:k]) for order in best_first])


def check(scores, k, backend):
    with guarded_empty():
        actual = ops.topk(scores, k, backend=backend)
    assert actual.dtype == torch.int64
    assert actual.is_contiguous()
    assert torch.equal(actual.cpu(), oracle(scores, k))


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 49, 576, 577, 729, 2880])
def test_shapes_that_hurt(num_tokens, backend):
    scores = randn(2, num_tokens)
    for k in sorted({1, max(1, num_tokens // 9), max(1, num_tokens - 1), num_tokens}):
        check(scores, k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtypes(dtype, backend):
    check(randn(2, 577, dtype=dtype), 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_compared_as_float64(backend):
    """Scores that float32 could not tell apart."""
    steps = torch.arange(49, dtype=torch.float64, device=DEVICE)
    check((1 + steps * 2.0**-40)[None], 7, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [4095, 4096, 4097, 16384, 20001])
def test_rows_of_several_blocks(num_tokens, backend):
    scores = randn(2, num_tokens)
    scores[1] = (scores[1] * 2).round()  # ties in every block
    for k in (64, num_tokens - 1):
        check(scores, k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    check(in_layout(randn(3, 90, dtype=torch.float16), layout), 11, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([7.0, 7.0, 7.0, 7.0], 2, [0, 1]),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, [0, 1, 3]),
        ([0.0, -0.0, 0.0, -0.0], 2, [0, 1]),
        ([-0.0, 0.0, -1.0], 1, [0]),
        ([NAN, 1.0, NAN, 0.0], 2, [1, 3]),
        ([NAN, 1.0, -INF, 0.0], 3, [0, 1, 3]),
        ([-INF, 1.0, NAN, 0.0], 3, [0, 1, 3]),
        ([NAN, NAN, NAN], 2, [0, 1]),
        ([-INF, -INF, -INF], 1, [0]),
        ([INF, NAN, INF, 3.0], 2, [0, 2]),
        ([-3.0, -1.0, -2.0, -4.0], 2, [1, 2]),
        ([-1.0, 1.0, -2.0, 2.0], 3, [0, 1, 3]),
        ([0.0, 1e-45, -1e-45, 1e-7], 2, [1, 3]),
    ],
)
def test_ties_zeros_nan_and_infinities(row, k, expected, dtype, backend):
    if 1e-45 in row and dtype != torch.float64:
        row = [torch.finfo(dtype).smallest_normal * score / 1e-45 for score in row]
    scores = torch.tensor([row], dtype=dtype, device=DEVICE)
    assert ops.topk(scores, k, backend=backend).tolist() == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_either_sign_and_any_payload(backend):
    bits = torch.tensor([[0x7FC00000, -0x400000, 0x7F800001, -1, 0xBF, -0x800000]], dtype=torch.int32, device=DEVICE)
    scores = bits.view(torch.float32)  # four NaN, a subnormal, -inf
    assert ops.topk(scores, 1, backend=backend).tolist() == [[4]]
    assert ops.topk(scores, 3, backend=backend).tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_indices_alone_in_a_batch_and_again(backend):
    scores = (randn(3, 300) * 4).round()
    batch = ops.topk(scores, 40, backend=backend)
    assert torch.equal(batch, ops.topk(scores, 40, backend=backend))
    for b in range(3):
        assert torch.equal(batch[b : b + 1], ops.topk(scores[b : b + 1], 40, backend=backend))


@reserves(5)
@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_int32(axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    memory = torch.empty(4 * step + 64, dtype=torch.float16, device=DEVICE)
    values = randn(5, 5, dtype=torch.float16)
    scores = memory.as_strided((5, 5), (step, 1) if axis == 0 else (1, step))
    scores.copy_(values)
    assert torch.equal(ops.topk(scores, 2, backend="triton").cpu(), oracle(values, 2))


scores_that_tie = st.sampled_from([-INF, -2.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 2.5, INF, NAN])


@property_test
@given(data=st.data(), dtype=st.sampled_from([*DTYPES, torch.float64]), layout=st.sampled_from(LAYOUTS))
def test_any_row(data, dtype, layout):
    num_tokens = data.draw(st.integers(1, 40))
    element = scores_that_tie | st.floats(-65504, 65504)
    rows = data.draw(st.lists(st.lists(element, min_size=num_tokens, max_size=num_tokens), min_size=1, max_size=2))
    k = data.draw(st.integers(1, num_tokens))
    scores = in_layout(torch.tensor(rows, dtype=torch.float64).to(DEVICE, dtype), layout)
    for backend in BACKENDS:
        check(scores, k, backend)


@property_test
@given(num_tokens=st.integers(1, 9000), share=st.floats(0, 1), levels=st.sampled_from([1, 3, 1000]))
@example(8192, 1.0, 1)
@example(4097, 0.0, 1)
def test_any_length(num_tokens, share, levels):
    k = min(num_tokens, 1 + int(share * num_tokens))
    check((randn(1, num_tokens) * levels).round() / levels, k, "triton")


# Layers and heads, combined first.
COMBINE = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}


def combined(scores, ensemble, dtype):
    """Plain PyTorch in `dtype`. In float64 it is the oracle."""
    scores = scores.to(dtype)
    return COMBINE[ensemble](scores.mean(dim=2) if scores.ndim == 4 else scores, dim=0)


def check_combined(scores, k, ensemble, backend, layout="contiguous"):
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    total = in_layout(torch.zeros(scores.shape[1], scores.shape[-1], dtype=dtype, device=DEVICE), layout)
    with guarded_empty():
        actual = ops.topk(scores, k, ensemble=ensemble, total=total, backend=backend)
    oracle_total = combined(scores, ensemble, torch.float64)
    assert_as_exact_as_pytorch(total, combined(scores, ensemble, torch.float32), oracle_total)
    # Two scores closer than rounding may change places; given the rounded ones, every index is determined.
    assert torch.equal(actual.cpu(), oracle(total, k))
    assert torch.equal(actual, ops.topk(scores, k, ensemble=ensemble, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ensemble", COMBINE)
@pytest.mark.parametrize("shape", [(3, 2, 576), (1, 2, 49), (3, 2, 16, 576), (2, 1, 3, 4097), (5, 3, 1, 7)], ids=str)
def test_layers_and_heads(shape, ensemble, backend):
    check_combined(randn(*shape), min(64, shape[-1] - 1), ensemble, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_layers_and_heads_in_every_dtype(dtype, backend):
    check_combined(randn(3, 2, 4, 70, dtype=dtype), 11, "sum", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 2, 70), (3, 2, 4, 70), (2, 2, 2, 4100)], ids=str)
def test_strides_of_layers_and_total(shape, layout, backend):
    check_combined(in_layout(randn(*shape), layout), 11, "max", backend, layout)
    check_combined(in_layout(randn(*shape[:-1], shape[-1] + 1), layout)[..., 1:], 11, "sum", backend, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ensemble", COMBINE)
def test_nan_in_one_layer_or_head(ensemble, backend):
    scores = randn(3, 2, 2, 9).abs()
    scores[1, 0, 1, 4] = NAN
    scores[0, 1] = NAN
    total = torch.empty(2, 9, device=DEVICE)
    indices = ops.topk(scores, 8, ensemble=ensemble, total=total, backend=backend)
    assert total.isnan().tolist() == [[n == 4 for n in range(9)], [True] * 9]
    assert indices.tolist() == [[0, 1, 2, 3, 5, 6, 7, 8], list(range(8))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_that_underflows_to_minus_zero_ties_with_zero(backend):
    tiny = torch.finfo(torch.float32).smallest_normal * 2**-23  # half of it is no number
    layers = torch.zeros(2, 1, 4, device=DEVICE)
    layers[0, 0, :2] = -tiny
    assert str(layers.mean(0)[0, 0].item()) == "-0.0"
    assert ops.topk(layers, 1, ensemble="mean", backend=backend).tolist() == [[0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_total_of_one_layer_is_a_copy(backend):
    scores = randn(2, 49, dtype=torch.bfloat16)
    total = torch.empty(2, 49, device=DEVICE)
    ops.topk(scores, 3, total=total, backend=backend)
    assert torch.equal(total, scores.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_and_heads_alone_in_a_batch_and_again(backend):
    scores = randn(3, 4, 5, 300)
    totals = torch.empty(2, 4, 300, device=DEVICE)
    batch = ops.topk(scores, 40, total=totals[0], backend=backend)
    assert torch.equal(batch, ops.topk(scores, 40, total=totals[1], backend=backend))
    assert torch.equal(*totals)
    for b in range(4):
        alone = torch.empty(1, 300, device=DEVICE)
        assert torch.equal(batch[b : b + 1], ops.topk(scores[:, b : b + 1], 40, total=alone, backend=backend))
        assert torch.equal(alone, totals[0, b : b + 1])


@property_test
@given(
    num_layers=st.integers(1, 4),
    num_images=st.integers(1, 3),
    num_heads=st.integers(1, 5),
    num_tokens=st.integers(1, 150),
    share=st.floats(0, 1),
    ensemble=st.sampled_from(sorted(COMBINE)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_layers(num_layers, num_images, num_heads, num_tokens, share, ensemble, dtype, layout):
    scores = in_layout(randn(num_layers, num_images, num_heads, num_tokens, dtype=dtype), layout)
    check_combined(scores, min(num_tokens, 1 + int(share * num_tokens)), ensemble, "triton", layout)


def test_the_kernel_counts_up_to_2_to_the_21():
    with pytest.raises(ValueError, match=r"topk: .* at most N = 2097151 scores .*got 2097152. Use backend='torch'"):
        ops.topk(torch.zeros(1, 1, device=DEVICE).expand(1, 2**21), 2, backend="triton")

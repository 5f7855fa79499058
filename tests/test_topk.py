"""topk: indices exactly those of a sort in pure Python."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_helpers import BACKENDS, DEVICE, DTYPES, LAYOUTS, guarded_empty, in_layout, property_test

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


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_int32(axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    memory = torch.empty(4 * step + 64, dtype=torch.float16, device=DEVICE)
    values = randn(5, 5, dtype=torch.float16)
    scores = memory.as_strided((5, 5), (step, 1) if axis == 0 else (1, step))
    scores.copy_(values)
    assert torch.equal(ops.topk(scores, 2, backend="triton").cpu(), oracle(values, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_of_autograd(backend):
    scores = randn(2, 30).requires_grad_()
    expected = oracle(scores, 3)
    assert torch.equal(ops.topk(scores, 3, backend=backend).cpu(), expected)
    with torch.inference_mode():
        assert torch.equal(ops.topk(scores, 3, backend=backend).cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    assert ops.topk(randn(0, 9), 2, backend=backend).shape == (0, 2)


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


def test_launcher_refuses_what_it_could_not_read_safely():
    from vtc_kernels.topk import topk

    for k in (0, 10):
        with pytest.raises(ValueError, match=r"k must be in \[1, N\] = \[1, 9\]"):
            topk(randn(2, 9), k)
    with pytest.raises(ValueError, match="floating point"):
        topk(randn(2, 9).int(), 2)

"""select: indices of a sort in pure Python, features copied to the bit, and scores against an fp64 oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import (
    ALL_DTYPES,
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_pytorch,
    bits,
    count_launches,
    guarded_empty,
    in_layout,
    property_test,
    random_bytes,
    reserves,
)

from vtc import ops

INF, NAN = float("inf"), float("nan")
COMBINE = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}


def oracle(scores, k):
    rows = [[-INF if math.isnan(score) else score for score in row] for row in scores.tolist()]
    best_first = [sorted(range(len(row)), key=lambda n, row=row: (-row[n], n)) for row in rows]
    return torch.tensor([sorted(order[:k]) for order in best_first], dtype=torch.int64).view(len(rows), k)


def combined(scores, ensemble, dtype):
    """Plain PyTorch in `dtype`. In float64 it is the oracle."""
    scores = scores.to(dtype)
    if scores.ndim == 2:
        return scores
    return COMBINE[ensemble](scores.mean(dim=2) if scores.ndim == 4 else scores, dim=0)


def check(scores, x, k, backend, ensemble="sum"):
    with guarded_empty():
        features, indices, total = ops.select(scores, x, k, ensemble=ensemble, backend=backend)
    assert total.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    plain, exact = (combined(scores, ensemble, dtype) for dtype in (torch.float32, torch.float64))
    if exact.isfinite().all():
        assert_as_exact_as_pytorch(total, plain, exact)
    # Two scores closer than rounding may change places; given the rounded ones, every index is determined.
    assert indices.dtype == torch.int64
    assert torch.equal(indices.cpu(), oracle(total, k))
    assert features.shape == (len(x), k, *x.shape[2:])
    assert features.dtype == x.dtype
    assert features.is_contiguous()
    assert bits(features) == bits(torch.stack([own[kept] for own, kept in zip(x, indices, strict=True)]))
    # and the same as the two operations, to the bit
    other = torch.empty_like(total)
    assert torch.equal(indices, ops.topk(scores, k, ensemble=ensemble, total=other, backend=backend))
    assert bits(other) == bits(total)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 5, 49, 196, 256, 576, 729, 1023, 1024, 1025])
def test_shapes_that_hurt(num_tokens, backend):
    scores, x = randn(3, 1, 4, num_tokens), randn(1, num_tokens, 20)
    for k in sorted({1, max(1, num_tokens // 9), num_tokens}):
        check(scores, x, k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_k(backend):
    scores, x = (randn(2, 1, 3, 12) * 2).round(), randn(1, 12, 3)
    for k in range(1, 13):
        check(scores, x, k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_images", "k"), [(3, 70), (65, 5)])
def test_batches(num_images, k, backend):
    """Few images have several programs each, many have one."""
    check(randn(2, num_images, 2, 90), randn(num_images, 90, 7), k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 16, 511, 1024, 1030])
def test_widths(width, backend):
    check(randn(2, 50), randn(2, 50, width, dtype=torch.float16), 11, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("ensemble", COMBINE)
def test_ensembles_of_every_dtype(ensemble, dtype, backend):
    for shape in ((3, 2, 16, 70), (1, 2, 70), (2, 70)):
        check(randn(*shape, dtype=dtype), randn(2, 70, 5), 11, backend, ensemble)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_features_are_copied_to_the_bit(dtype, backend):
    x = random_bytes(2, 40, 24, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check(randn(2, 2, 3, 40), x, 9, backend)
    check(randn(2, 40), x[:, :, 0], 9, backend)
    check(randn(2, 40), x.unflatten(2, (4, 6)).mT, 9, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    x = in_layout(randn(2, 70, 20), layout)
    check(in_layout(randn(3, 2, 4, 70), layout), x, 11, backend, "max")
    check(in_layout(randn(3, 2, 4, 71), layout)[..., 1:], in_layout(randn(2, 71, 20), layout)[:, 1:], 11, backend)
    check(in_layout(randn(2, 70, dtype=torch.float16), layout), x, 60, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([7.0, 7.0, 7.0, 7.0], 2, [0, 1]),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, [0, 1, 3]),
        ([0.0, -0.0, 0.0, -0.0], 2, [0, 1]),
        ([NAN, 1.0, -INF, 0.0], 3, [0, 1, 3]),
        ([-INF, 1.0, NAN, 0.0], 3, [0, 1, 3]),
        ([NAN, NAN, NAN], 2, [0, 1]),
        ([-INF, -INF, -INF], 1, [0]),
        ([INF, NAN, INF, 3.0], 2, [0, 2]),
        ([-3.0, -1.0, -2.0, -4.0], 2, [1, 2]),
    ],
)
def test_ties_zeros_nan_and_infinities(row, k, expected, dtype, backend):
    scores = torch.tensor([row], dtype=dtype, device=DEVICE)
    x = randn(1, len(row), 3)
    features, indices, total = ops.select(scores, x, k, backend=backend)
    assert indices.tolist() == [expected]
    assert torch.equal(features, x[:, expected])
    assert torch.equal(total.isnan(), scores.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ensemble", COMBINE)
def test_nan_in_one_layer_or_head(ensemble, backend):
    scores = randn(3, 2, 2, 9).abs()
    scores[1, 0, 1, 4] = NAN
    scores[0, 1] = NAN
    _, indices, total = ops.select(scores, randn(2, 9, 3), 8, ensemble=ensemble, backend=backend)
    assert total.isnan().tolist() == [[n == 4 for n in range(9)], [True] * 9]
    assert indices.tolist() == [[0, 1, 2, 3, 5, 6, 7, 8], list(range(8))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_alone_in_a_batch_and_again(backend):
    scores, x = randn(3, 4, 5, 300), randn(4, 300, 16)
    batch = ops.select(scores, x, 40, backend=backend)
    for one, other in zip(batch, ops.select(scores, x, 40, backend=backend), strict=True):
        assert torch.equal(one, other)
    for b in range(4):
        alone = ops.select(scores[:, b : b + 1], x[b : b + 1], 40, backend=backend)
        for one, other in zip(batch, alone, strict=True):
            assert torch.equal(one[b : b + 1], other)


def test_one_launch_up_to_1024_tokens(monkeypatch):
    own, topk, compact = (count_launches(monkeypatch, op) for op in ("select", "topk", "compact"))
    ops.select(randn(1, 1024), randn(1, 1024, 2), 3, backend="triton")
    assert (len(own), len(topk), len(compact)) == (1, 0, 0)
    ops.select(randn(1, 1025), randn(1, 1025, 2), 3, backend="triton")
    assert (len(own), len(topk), len(compact)) == (1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_that_of_a_gather(backend):
    scores = randn(3, 2, 4, 30).requires_grad_()
    x = randn(2, 30, 5).requires_grad_()
    features, indices, total = ops.select(scores, x, 7, backend=backend)
    assert not total.requires_grad
    with torch.no_grad():
        for one, other in zip((features, indices, total), ops.select(scores, x, 7, backend=backend), strict=True):
            assert torch.equal(one, other)
    weight = randn(2, 7, 5)
    (grad,) = torch.autograd.grad((features * weight).sum(), x)
    expected = torch.zeros_like(x)
    for b in range(2):
        expected[b, indices[b]] = weight[b]
    assert torch.equal(grad, expected)


@reserves(5)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("what", ["scores", "x"])
def test_offsets_beyond_int32(what, axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    memory = torch.empty(4 * step + 256, dtype=torch.float16, device=DEVICE)
    strides = [5, 25, 1]
    strides[axis] = step
    values = randn(5, 5, 5, dtype=torch.float16)
    far = memory.as_strided((5, 5, 5), strides)
    far.copy_(values)
    scores, x = (far[:, :, None], values) if what == "scores" else (values[:, :, None], far)
    check(scores, x, 2, "triton")


@property_test
@given(
    num_layers=st.integers(1, 4),
    num_images=st.integers(1, 3),
    num_heads=st.integers(1, 5),
    num_tokens=st.integers(1, 150),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    levels=st.sampled_from([1, 3, 1000]),
    ensemble=st.sampled_from(sorted(COMBINE)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(num_layers, num_images, num_heads, num_tokens, width, share, levels, ensemble, dtype, layout):
    scores = (randn(num_layers, num_images, num_heads, num_tokens) * levels).round() / levels
    x = in_layout(randn(num_images, num_tokens, width), layout)
    k = min(num_tokens, 1 + int(share * num_tokens))
    check(in_layout(scores.to(dtype), layout), x, k, "triton", ensemble)

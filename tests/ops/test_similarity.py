"""similarity: as exact as plain PyTorch, against float64."""

import pytest
import torch
from support.kernels import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_pytorch,
    guarded_empty,
    in_layout,
    in_orders,
    reserves,
)

from vtc import ops


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def plain(x, y, temperature=None):
    """Plain PyTorch in the dtype of its inputs; float64 inputs give the oracle."""
    unit_x, unit_y = (torch.nn.functional.normalize(one, dim=2) for one in (x, y))
    cosines = torch.stack([a @ b.mT for a, b in zip(unit_x, unit_y, strict=True)])
    return cosines if temperature is None else (cosines / temperature).softmax(dim=2)


def check(x, y, temperature, backend):
    with guarded_empty():
        actual = ops.similarity(x, y, temperature=temperature, backend=backend)
    assert actual.shape == (x.shape[0], x.shape[1], y.shape[1])
    assert actual.dtype == torch.float32
    assert actual.mT.is_contiguous()
    several = [plain(*pair, temperature) for pair in in_orders(x.float(), y.float())]
    filled = torch.nn.functional.pad(
        x.float(), (0, 0, 0, -x.shape[1] % 64)
    )  # a product of another shape, another order
    several += [plain(*pair, temperature)[:, : x.shape[1]] for pair in in_orders(filled, y.float())]
    assert_as_exact_as_pytorch(actual, several, plain(x.double(), y.double(), temperature))
    return actual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [None, 0.2, 0.01])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 3, 7), (33, 70, 40), (64, 65, 16), (3, 130, 65), (130, 9, 20)], ids=str
)
def test_shapes_that_hurt(shape, temperature, backend):
    num_rows, num_columns, num_features = shape
    check(randn(2, num_rows, num_features), randn(2, num_columns, num_features, seed=1), temperature, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_strides(dtype, layout, backend):
    x, y = randn(2, 20, 33, dtype=dtype), randn(2, 35, 33, dtype=dtype, seed=1)
    check(in_layout(x, layout), in_layout(y, layout), 0.2, backend)
    check(in_layout(x, layout), y, None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_zeros_is_like_no_other(backend):
    x, y = randn(1, 5, 8), randn(1, 6, 8, seed=1)
    x[0, 2] = 0
    y[0, 3] = 0
    actual = ops.similarity(x, y, backend=backend)
    assert not actual[0, 2].any()
    assert not actual[0, :, 3].any()
    assert torch.equal(ops.similarity(x, y, temperature=0.2, backend=backend)[0, 2], torch.full((6,), 1 / 6).to(DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_or_column(backend):
    x, y = randn(2, 5, 8), randn(2, 6, 8, seed=1)
    x[0, 2, 1] = float("nan")
    y[1, 3, 0] = float("nan")
    actual = ops.similarity(x, y, backend=backend).isnan()
    assert actual.nonzero().tolist() == [[0, 2, n] for n in range(6)] + [[1, r, 3] for r in range(5)]
    shares = ops.similarity(x, y, temperature=0.2, backend=backend).isnan()
    assert shares.nonzero().tolist() == [[0, 2, n] for n in range(6)] + [[1, r, n] for r in range(5) for n in range(6)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [None, 0.2])
def test_alone_in_a_batch_and_again(temperature, backend):
    x, y = randn(3, 20, 16), randn(3, 36, 16, seed=1)
    batch = ops.similarity(x, y, temperature=temperature, backend=backend)
    assert torch.equal(batch, ops.similarity(x, y, temperature=temperature, backend=backend))
    for n in range(3):
        alone = ops.similarity(x[n : n + 1], y[n : n + 1], temperature=temperature, backend=backend)
        assert torch.equal(batch[n : n + 1], alone)


@reserves(7)
@pytest.mark.parametrize("stride", [(2**30, 4, 1), (16, 2**30, 1), (16, 1, 2**30)])
def test_offsets_beyond_int32(stride):
    """Elements far apart in memory that is reserved but, apart from these elements, never touched."""
    values = randn(3, 3, 4, dtype=torch.float16)
    last = sum(step * (size - 1) for step, size in zip(stride, values.shape, strict=True))
    x = torch.empty(last + 1, dtype=torch.float16, device=DEVICE).as_strided(values.shape, stride)
    x.copy_(values)
    expected = ops.similarity(values, values, backend="triton")
    assert torch.equal(ops.similarity(x, values, backend="triton"), expected)
    assert torch.equal(ops.similarity(values, x, backend="triton"), expected)

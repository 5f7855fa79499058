"""compact: bit for bit the tokens that were asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import (
    ALL_DTYPES,
    BACKENDS,
    DEVICE,
    LAYOUTS,
    bits,
    count_launches,
    guarded_empty,
    in_layout,
    property_test,
    random_bytes,
    reserves,
)

from vtc import ops, reference
from vtc_kernels import compact

# B, N, K, D. D and K around the tiles of 1024 elements.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 4, 7),
    (1, 577, 64, 64),
    (2, 49, 49, 3),
    (2, 9, 1, 1024),
    (1, 6, 5, 1025),
    (1, 4, 3, 2500),
    (65, 5, 2, 2),
    (2, 729, 728, 1),
    (1, 16, 200, 100),
]


def make(num_images, num_tokens, num_kept, num_features, dtype=torch.float32, layout="contiguous"):
    """Random bytes; indices in any order, with repeats."""
    generator = torch.Generator().manual_seed(num_tokens + num_features)
    x = random_bytes(num_images, num_tokens, num_features, dtype=dtype, generator=generator)
    indices = torch.randint(0, num_tokens, (num_images, num_kept), generator=generator)
    return in_layout(x.to(DEVICE), layout), in_layout(indices.to(DEVICE), layout)


def check(x, indices, backend):
    with guarded_empty():
        actual = ops.compact(x, indices, backend=backend)
    assert actual.dtype == x.dtype
    assert actual.shape == (*indices.shape, x.shape[2])
    assert actual.is_contiguous()
    tokens = [image[n] for image, kept in zip(x, indices.tolist(), strict=True) for n in kept]
    assert bits(actual) == bits(torch.stack(tokens))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, backend):
    check(*make(*shape, torch.bfloat16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dtypes(dtype, backend):
    check(*make(2, 9, 5, 12, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    check(*make(3, 20, 6, 40, torch.float16, layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_images_and_conjugates(backend):
    x, indices = make(1, 9, 5, 12)
    check(x.expand(4, -1, -1), indices.expand(4, -1), backend)
    for dtype in (torch.complex64, torch.complex128):
        x, indices = make(2, 9, 5, 12, dtype)
        check(x.conj(), indices, backend)
        check(x.conj().imag, indices, backend)
        # Operators of torch.library are given such tensors resolved, the launcher itself is not.
        direct, expected = (f(x.conj(), indices) for f in (compact.compact, reference.compact))
        assert torch.equal(torch.view_as_real(direct).view(torch.uint8), torch.view_as_real(expected).view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rest", [(), (1,), (3, 4), (2, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "slice", "every other"])
def test_trailing_axes(layout, rest, backend):
    x = in_layout(torch.randn(2, 9, *rest, device=DEVICE), layout)
    _, indices = make(2, 9, 5, 1)
    with guarded_empty():
        actual = ops.compact(x, indices, backend=backend)
    assert actual.shape == (2, 5, *rest)
    assert actual.is_contiguous()
    assert torch.equal(actual, torch.stack([image[kept] for image, kept in zip(x, indices, strict=True)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_tensors_at_once(backend):
    hidden, indices = make(2, 50, 7, 1030, torch.bfloat16, "slice")
    positions = torch.arange(50, device=DEVICE).expand(2, -1)
    mask = in_layout(positions % 3 == 0, "every other")
    pairs = torch.randn(2, 50, 3, 2, dtype=torch.complex128, device=DEVICE).conj()
    tensors = [hidden, positions, mask, pairs, hidden[:, :, :1]]
    with guarded_empty():
        actual = ops.compact(tensors, indices, backend=backend)
    assert isinstance(actual, tuple)
    for result, x in zip(actual, tensors, strict=True):
        assert result.dtype == x.dtype
        assert bits(result.resolve_conj()) == bits(ops.compact(x, indices, backend="torch").resolve_conj())
        assert result.shape == (2, 7, *x.shape[2:])
    assert torch.equal(actual[1], indices)


def test_several_tensors_take_one_launch(monkeypatch):
    launches = count_launches(monkeypatch, "compact")
    x, indices = make(2, 9, 5, 12)
    ops.compact([x, x.half(), x[..., 0]], indices, backend="triton")
    assert launches == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_several_tensors(backend):
    x = torch.randn(2, 7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.randn(2, 7, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    number = torch.arange(14, device=DEVICE).view(2, 7)
    indices = torch.tensor([[1, 4, 6], [5, 5, 0]], device=DEVICE)
    assert torch.autograd.gradcheck(lambda x, y: ops.compact([x, number, y], indices, backend=backend)[::2], (x, y))
    first, _, second = ops.compact([x, number, y], indices, backend=backend)
    (grad,) = torch.autograd.grad(second.sum(), y)  # the other output has no gradient
    assert grad.sum() == 2 * 3 * 4
    assert first.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_of_a_tower_without_the_cls_token(backend):
    x, _ = make(2, 50, 1, 24, torch.float16)
    indices = torch.tensor([[0, 7, 48], [1, 2, 3]], device=DEVICE)
    check(x[:, 1:], indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeping_everything_is_the_identity(backend):
    x, _ = make(2, 20, 1, 12)
    indices = torch.arange(20, device=DEVICE).expand(2, -1)
    assert bits(ops.compact(x, indices, backend=backend)) == bits(x)


@reserves(3)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_int32(axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    memory = torch.empty(4 * step + 64, dtype=torch.uint8, device=DEVICE)
    strides = [7, 7, 7]
    strides[axis], strides[axis - 1] = step, 1
    values = torch.arange(125, dtype=torch.uint8, device=DEVICE).view(5, 5, 5)
    x = memory.as_strided((5, 5, 5), strides)
    x.copy_(values)
    check(x, torch.tensor([[4, 0]] * 5, device=DEVICE), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    x = torch.randn(2, 7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    indices = torch.tensor([[1, 4, 6], [5, 5, 0]], device=DEVICE)  # a token twice: its gradients add up
    assert torch.autograd.gradcheck(lambda x: ops.compact(x, indices, backend=backend), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.compact(x, indices, backend=backend).square(), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_goes_to_the_kept_tokens_and_no_others(layout, backend):
    x = in_layout(torch.randn(2, 9, 4, device=DEVICE), layout).requires_grad_()
    indices = torch.tensor([[0, 8], [3, 4]], device=DEVICE)
    out = ops.compact(x, indices, backend=backend)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    expected = torch.zeros(2, 9, 4, device=DEVICE)
    expected[0, [0, 8]], expected[1, [3, 4]] = weight
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_images", "num_kept", "num_features"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_copy(num_images, num_kept, num_features, backend):
    x = torch.zeros(num_images, 5, num_features, device=DEVICE)
    indices = torch.zeros(num_images, num_kept, dtype=torch.int64, device=DEVICE)
    assert ops.compact(x, indices, backend=backend).shape == (num_images, num_kept, num_features)


@property_test
@given(
    num_images=st.integers(1, 3),
    num_tokens=st.integers(1, 60),
    num_kept=st.integers(1, 60),
    num_features=st.integers(1, 1100),
    dtype=st.sampled_from(ALL_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(num_images, num_tokens, num_kept, num_features, dtype, layout):
    check(*make(num_images, num_tokens, num_kept, num_features, dtype, layout), "triton")


def test_launcher_never_reads_outside_its_input():
    x, _ = make(2, 9, 1, 12)
    indices = torch.tensor([[-1, 3], [8, 9]], device=DEVICE)
    actual = compact.compact(x, indices)
    assert bits(actual[0, 0]) == bits(actual[1, 1]) == [0] * 48
    assert bits(actual[0, 1]) == bits(x[0, 3])
    assert bits(actual[1, 0]) == bits(x[1, 8])

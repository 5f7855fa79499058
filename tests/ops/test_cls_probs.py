"""cls_probs: the kernel and the reference against an fp64 oracle."""

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
    count_launches,
    guarded_empty,
    in_layout,
    in_orders,
    property_test,
    reserves,
)

from vtc import ops

# NumPy's word on -inf minus -inf, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# L, B, H, N, D, skip. N around the blocks of 128 keys; D through padding; CLIP, SigLIP, and images of other sizes.
SHAPES = [
    (1, 1, 1, 1, 64, 0),
    (3, 2, 2, 50, 48, 1),
    (2, 1, 3, 197, 64, 1),
    (1, 1, 2, 257, 80, 1),
    (3, 1, 2, 577, 64, 1),
    (1, 1, 1, 730, 72, 0),
    (2, 1, 1, 1025, 88, 1),
    (2, 65, 1, 50, 16, 1),
    (1, 1, 2, 128, 128, 3),
    (1, 2, 1, 129, 16, 128),
    (7, 1, 1, 130, 300, 129),
]


def make(
    num_layers, num_images, num_heads, num_tokens, num_features, dtype=torch.float32, layout="tokens first", spread=1.0
):
    generator = torch.Generator().manual_seed(num_tokens)
    queries = torch.randn(num_layers, num_images, num_heads, num_features, generator=generator).mul(spread)
    keys = torch.randn(num_layers, num_images, num_heads, num_tokens, num_features, generator=generator)
    return [[in_layout(x.to(DEVICE, dtype), layout) for x in layers] for layers in (queries, keys)]


def plain(queries, keys, scale, skip, dtype):
    """Plain PyTorch in `dtype`. In float64 it is the oracle."""
    query, key = torch.stack(list(queries)).to(dtype), torch.stack(list(keys)).to(dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(torch.einsum("lbhd,lbhnd->lbhn", query, key) * scale, dim=-1)[..., skip:]


def check(queries, keys, scale, skip, backend):
    with guarded_empty():
        actual = ops.cls_probs(queries, keys, scale=scale, skip=skip, backend=backend)
    assert actual.shape == (len(keys), *keys[0].shape[:2], keys[0].shape[2] - skip)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    oracle = plain(queries, keys, scale, skip, torch.float64)
    orders = in_orders(torch.stack(list(queries)), torch.stack(list(keys)))
    assert_as_exact_as_pytorch(actual, [plain(q, k, scale, skip, torch.float32) for q, k in orders], oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, dtype, backend):
    *sizes, skip = shape
    check(*make(*sizes, dtype), None, skip, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_computed_as_float32(backend):
    check(*make(2, 1, 2, 70, 24, torch.float64), None, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    check(*make(3, 2, 3, 140, 20, torch.float16, layout), None, 1, backend)


def test_layers_of_other_strides(monkeypatch):
    """One launch for each run of layers that have the same strides."""
    (q0, q1, q2), (k0, k1, k2) = make(3, 2, 2, 140, 16)
    queries, keys = [q0, q1, in_layout(q2, "slice")], [k0, k1, in_layout(k2, "every other")]
    launches = count_launches(monkeypatch, "cls_probs")
    check(queries, keys, None, 1, "triton")
    assert len(launches) == 2
    check(queries[:2], keys[:2], None, 1, "triton")
    assert len(launches) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_has_its_own_query_and_keys(backend):
    queries, keys = make(4, 1, 2, 50, 16)
    actual = ops.cls_probs(queries, keys, skip=1, backend=backend)
    for layer in range(4):
        alone = ops.cls_probs(queries[layer : layer + 1], keys[layer : layer + 1], skip=1, backend=backend)
        assert torch.equal(actual[layer : layer + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_keys_by_expansion(backend):
    queries, keys = make(2, 2, 4, 33, 16)
    check(queries, [key[:, :1].expand(-1, 4, -1, -1) for key in keys], 0.5, 0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.3])
def test_scale(scale, backend):
    check(*make(2, 1, 2, 140, 24), scale, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_neither_overflow_nor_vanish(backend):
    queries, keys = make(1, 1, 2, 200, 32, spread=200.0)
    assert plain(queries, keys, 1.0, 0, torch.float64).max() > 0.4
    check(queries, keys, 1.0, 0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_keys_stay_in_the_denominator(backend):
    queries, keys = make(2, 2, 2, 170, 16)
    for query, key in zip(queries, keys, strict=True):
        key[:, :, 0] = 3 * query  # a [CLS] key that takes most of the attention
    everything = ops.cls_probs(queries, keys, backend=backend)
    patches = ops.cls_probs(queries, keys, skip=1, backend=backend)
    torch.testing.assert_close(everything.sum(dim=3), torch.ones(2, 2, 2, device=DEVICE))
    assert torch.equal(patches, everything[..., 1:])
    assert patches.sum(dim=3).max() < 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", [slice(64, 150), slice(0, 140), slice(120, 200)], ids=str)
def test_keys_of_minus_infinity_weigh_nothing(where, backend):
    queries, keys = make(1, 1, 2, 200, 16)
    queries[0].abs_()
    keys[0][:, :, where] = float("-inf")
    actual = ops.cls_probs(queries, keys, backend=backend)
    gone = torch.zeros(200, dtype=torch.bool, device=DEVICE)
    gone[where] = True
    assert (actual[..., gone] == 0).all()
    expected = ops.cls_probs(queries, [keys[0][:, :, ~gone]], backend=backend)
    torch.testing.assert_close(actual[..., ~gone], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_minus_infinity_is_nan_and_no_other(backend):
    queries, keys = make(2, 2, 2, 140, 16)
    expected = ops.cls_probs(queries, keys, skip=1, backend=backend)
    queries[1][0, 1] = 1.0
    keys[1][0, 1] = float("-inf")
    actual = ops.cls_probs(queries, keys, skip=1, backend=backend)
    assert actual[1, 0, 1].isnan().all()
    actual[1, 0, 1] = expected[1, 0, 1]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 3, 139])
def test_nan_stays_in_its_head(token, bad, backend):
    queries, keys = make(2, 3, 2, 140, 16)
    queries[0][1, 0, 3] = 1.0
    expected = ops.cls_probs(queries, keys, skip=1, backend=backend)
    keys[0][1, 0, token, 3] = bad
    actual = ops.cls_probs(queries, keys, skip=1, backend=backend)
    assert actual[0, 1, 0].isnan().all()
    actual[0, 1, 0] = expected[0, 1, 0]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_and_again(dtype, backend):
    queries, keys = make(2, 5, 3, 150, 24, dtype)  # each image is 16-byte aligned
    batch = ops.cls_probs(queries, keys, skip=1, backend=backend)
    assert torch.equal(batch, ops.cls_probs(queries, keys, skip=1, backend=backend))
    for b in range(5):
        own = [[x[b : b + 1] for x in layers] for layers in (queries, keys)]
        assert torch.equal(batch[:, b : b + 1], ops.cls_probs(*own, skip=1, backend=backend))


@reserves(5)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_offsets_beyond_int32(axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    memory = torch.empty(4 * step + 64, dtype=torch.float16, device=DEVICE)
    shape = [2, 2, 2, 2]
    shape[axis] = 5
    strides = [8, 4, 2, 1]
    strides[axis] = step
    queries, values = make(1, *shape, torch.float16)
    key = memory.as_strided(shape, strides)
    key.copy_(values[0])
    check(queries, [key], None, 0, "triton")


@property_test
@given(
    num_layers=st.integers(1, 4),
    num_images=st.integers(1, 3),
    num_heads=st.integers(1, 5),
    num_tokens=st.integers(1, 300),
    num_features=st.integers(1, 130),
    skip=st.integers(0, 3),
    scale=st.none() | st.floats(-2, 2),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
@example(1, 1, 1, 129, 1, 0, None, torch.float32, "slice")
def test_any_shape(num_layers, num_images, num_heads, num_tokens, num_features, skip, scale, dtype, layout):
    layers = make(num_layers, num_images, num_heads, num_tokens, num_features, dtype, layout)
    check(*layers, scale, min(skip, num_tokens - 1), "triton")

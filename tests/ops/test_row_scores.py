"""row_scores: the kernel and the reference against an fp64 oracle."""

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
    in_orders,
    property_test,
    reserves,
)

from vtc import ops

# NumPy's word on -inf minus -inf, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# B, H, N, D, skip. N around the blocks of 32 keys; D through padding; LLaVA-1.5 (577, 64), SigLIP (729, 72).
SHAPES = [
    (1, 1, 1, 64, 0),
    (3, 2, 5, 48, 1),
    (1, 5, 16, 88, 1),
    (2, 3, 49, 72, 1),
    (2, 2, 64, 80, 1),
    (1, 3, 65, 128, 3),
    (2, 2, 577, 64, 1),
    (1, 2, 729, 72, 0),
    (65, 1, 5, 16, 1),
    (1, 1, 2880, 128, 1),
    (1, 2, 130, 300, 129),
]


def make(num_images, num_heads, num_tokens, num_features, dtype=torch.float32, layout="tokens first", spread=1.0):
    generator = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(num_images, num_heads, num_features, generator=generator).mul(spread).to(DEVICE, dtype)
    key = torch.randn(num_images, num_heads, num_tokens, num_features, generator=generator).to(DEVICE, dtype)
    return in_layout(query, layout), in_layout(key, layout)


def plain(query, key, scale, skip, dtype):
    """Plain PyTorch in `dtype`. In float64 it is the oracle."""
    logits = torch.einsum("bhd,bhnd->bhn", query.to(dtype), key.to(dtype)) * scale
    return torch.softmax(logits, dim=-1).mean(dim=1)[:, skip:]


def check(query, key, scale, skip, backend):
    with guarded_empty():
        actual = ops.row_scores(query, key, scale=scale, skip=skip, backend=backend)
    assert actual.shape == (key.shape[0], key.shape[2] - skip)
    assert actual.dtype == torch.float32
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    oracle = plain(query, key, scale, skip, torch.float64)
    expected = [plain(q, k, scale, skip, torch.float32) for q, k in in_orders(query, key)]
    assert_as_exact_as_pytorch(actual, expected, oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, dtype, backend):
    *sizes, skip = shape
    check(*make(*sizes, dtype), None, skip, backend)


def test_a_row_of_20001_keys():
    """The statistics of 626 blocks of keys, 64 at a time."""
    check(*make(1, 1, 20001, 16), None, 1, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    check(*make(2, 3, 70, 20, torch.float16, layout), None, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_keys_by_expansion(backend):
    query, key = make(2, 4, 33, 16)
    check(query, key[:, :1].expand(-1, 4, -1, -1), 0.5, 0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.3])
def test_scale(scale, backend):
    check(*make(1, 2, 70, 24), scale, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_neither_overflow_nor_vanish(backend):
    query, key = make(1, 2, 200, 32, spread=200.0)
    assert plain(query, key, 1.0, 0, torch.float64).max() > 0.4
    check(query, key, 1.0, 0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_keys_stay_in_the_denominator(backend):
    query, key = make(2, 2, 70, 16)
    key[:, :, 0] = 3 * query  # a [CLS] key that takes most of the attention
    everything = ops.row_scores(query, key, backend=backend)
    patches = ops.row_scores(query, key, skip=1, backend=backend)
    torch.testing.assert_close(everything.sum(dim=1), torch.ones(2, device=DEVICE))
    assert torch.equal(patches, everything[:, 1:])
    assert patches.sum(dim=1).max() < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_minus_infinity_weighs_nothing(backend):
    query, key = make(1, 2, 200, 16)
    query.abs_()
    key[:, :, 64:150] = float("-inf")
    actual = ops.row_scores(query, key, backend=backend)
    assert (actual[:, 64:150] == 0).all()
    finite = torch.cat([actual[:, :64], actual[:, 150:]], dim=1)
    expected = ops.row_scores(query, torch.cat([key[:, :, :64], key[:, :, 150:]], dim=2), backend=backend)
    torch.testing.assert_close(finite, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_image(bad, backend):
    query, key = make(3, 2, 70, 16)
    expected = ops.row_scores(query, key, backend=backend)
    key[1, 0, 69, 3] = bad
    query[1, 0, 3] = 1.0
    actual = ops.row_scores(query, key, backend=backend)
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_and_again(dtype, backend):
    query, key = make(5, 3, 150, 24, dtype)  # each image is 16-byte aligned
    batch = ops.row_scores(query, key, skip=1, backend=backend)
    assert torch.equal(batch, ops.row_scores(query, key, skip=1, backend=backend))
    for b in range(5):
        assert torch.equal(batch[b : b + 1], ops.row_scores(query[b : b + 1], key[b : b + 1], skip=1, backend=backend))


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
    query, values = make(*shape[:2], *shape[2:], torch.float16)
    key = memory.as_strided(shape, strides)
    key.copy_(values)
    check(query, key, None, 0, "triton")


def plain_row(query, key, mask, dtype):
    """Plain PyTorch in `dtype`: repeated key heads, an additive mask. In float64 it is the oracle."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(dtype)
    logits = torch.einsum("bhd,bhnd->bhn", query.to(dtype), key) * query.shape[-1] ** -0.5
    hidden = torch.zeros(logits.shape[0], 1, logits.shape[2], dtype=torch.bool, device=DEVICE)
    if mask is not None:
        hidden = hidden | ~mask[:, None]
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1).mean(dim=1)


def make_row(num_images, num_heads, num_key_heads, num_tokens, num_features, dtype=torch.float32, layout="slice"):
    """Queries, fewer key heads, and a mask that pads each image differently on both sides."""
    query, _ = make(num_images, num_heads, num_tokens, num_features, dtype, layout)
    _, key = make(num_images, num_key_heads, num_tokens, num_features, dtype, layout)
    generator = torch.Generator().manual_seed(num_heads)
    last = torch.randint(0, num_tokens, (num_images,), generator=generator)
    first = (torch.rand(num_images, generator=generator) * (last + 1)).long()
    token = torch.arange(num_tokens)
    mask = (token >= first[:, None]) & (token <= last[:, None])
    return query, key, in_layout(mask.to(DEVICE), layout)


def check_row(query, key, mask, backend):
    with guarded_empty():
        actual = ops.row_scores(query, key, mask=mask, backend=backend)
    oracle = plain_row(query, key, mask, torch.float64)
    expected = [plain_row(q, k, mask, torch.float32) for q, k in in_orders(query, key)]
    assert_as_exact_as_pytorch(actual, expected, oracle)
    assert (actual[oracle == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (4, 2), (6, 2), (7, 1)])
def test_grouped_queries_and_padding(num_heads, num_key_heads, dtype, backend):
    query, key, mask = make_row(3, num_heads, num_key_heads, 100, 64, dtype)
    check_row(query, key, None, backend)
    check_row(query, key, mask, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_groups_and_mask(layout, backend):
    check_row(*make_row(2, 4, 2, 70, 20, torch.float16, layout), backend)
    query, key, mask = make_row(1, 4, 2, 70, 20)
    check_row(query, key, mask.expand(1, -1), backend)
    check_row(query.expand(3, -1, -1), key.expand(3, -1, -1, -1), mask.expand(3, -1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_mask_hides_does_not_matter(backend):
    query, key, _ = make_row(2, 4, 2, 70, 16)
    token = torch.arange(70, device=DEVICE)
    mask = (token >= 9) & (token <= torch.tensor([[40], [64]], device=DEVICE))
    expected = ops.row_scores(query, key, mask=mask, backend=backend)
    key[:, :, :9] = 1e4  # in place: tensors of another alignment may be summed in another order
    key[0, :, 41:] = 1e4
    key[1, :, 65:] = 1e4
    assert torch.equal(ops.row_scores(query, key, mask=mask, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_is_nan_and_no_other(backend):
    query, key, _ = make_row(3, 2, 1, 40, 16)
    mask = torch.ones(3, 40, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    actual = ops.row_scores(query, key, mask=mask, backend=backend)
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], ops.row_scores(query, key, backend=backend)[[0, 2]])


@property_test
@given(
    num_images=st.integers(1, 3),
    num_key_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    num_tokens=st.integers(1, 100),
    num_features=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_group(num_images, num_key_heads, group, num_tokens, num_features, dtype, layout):
    row = make_row(num_images, num_key_heads * group, num_key_heads, num_tokens, num_features, dtype, layout)
    check_row(*row, "triton")


@property_test
@given(
    num_images=st.integers(1, 3),
    num_heads=st.integers(1, 5),
    num_tokens=st.integers(1, 140),
    num_features=st.integers(1, 130),
    skip=st.integers(0, 3),
    scale=st.none() | st.floats(-2, 2),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
@example(1, 1, 129, 1, 0, None, torch.float32, "slice")
def test_any_shape(num_images, num_heads, num_tokens, num_features, skip, scale, dtype, layout):
    query, key = make(num_images, num_heads, num_tokens, num_features, dtype, layout)
    check(query, key, scale, min(skip, num_tokens - 1), "triton")

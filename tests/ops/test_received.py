"""received: the kernels and the reference against an fp64 oracle."""

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
    in_orders,
    property_test,
    reserves,
)

from vtc import ops, reference

# NumPy's words in the interpreter: -inf minus -inf, the logarithm of the 0 that padded rows sum up to.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|All-NaN slice):RuntimeWarning")

# B, H, N, D, skip. N around the blocks of 64 and 32; D through padding and beyond one block of features.
SHAPES = [
    (1, 1, 1, 64, 0),
    (3, 2, 5, 48, 1),
    (2, 3, 49, 72, 1),
    (2, 2, 64, 80, 1),
    (1, 3, 65, 128, 3),
    (1, 35, 20, 16, 0),
    (1, 1, 193, 64, 1),
    (1, 1, 70, 200, 69),
]


def make(num_images, num_heads, num_tokens, num_features, dtype=torch.float32, layout="tokens first", spread=1.0):
    generator = torch.Generator().manual_seed(num_tokens)
    size = num_images, num_heads, num_tokens, num_features
    query = torch.randn(size, generator=generator).mul(spread).to(DEVICE, dtype)
    key = torch.randn(size, generator=generator).to(DEVICE, dtype)
    return in_layout(query, layout), in_layout(key, layout)


def lengths(cu_seqlens):
    """How many tokens the segment of each token has."""
    each = cu_seqlens.diff().long()
    return each.repeat_interleave(each)


def plain(query, key, scale, skip=0, cu_seqlens=None, lse=None, dtype=torch.float64, base=math.e):
    """Plain PyTorch in `dtype`, with whole N x N matrices. In float64 it is the oracle.

    With `base` 2, the scale has the logarithm of 2 in it, as in attention kernels, and the sum over the queries is a
    product, whose additions follow one another as the interpreter's do.
    """
    logits = query.to(dtype) @ key.to(dtype).mT * scale
    share = torch.tensor(query.shape[2], device=DEVICE)
    if cu_seqlens is not None:
        share = lengths(cu_seqlens)
        segment = torch.arange(len(cu_seqlens) - 1, device=DEVICE).repeat_interleave(cu_seqlens.diff().long())
        logits = logits.masked_fill(segment[:, None] != segment, float("-inf"))
    if base == 2:
        logits = logits * math.log2(math.e)
        shift = logits.amax(dim=3) if lse is None else lse.to(dtype) * math.log2(math.e)
        weights = (logits - shift.unsqueeze(3)).exp2()
        weights = weights if lse is not None else weights / weights.sum(dim=3, keepdim=True)
    else:
        weights = logits.softmax(dim=3) if lse is None else (logits - lse.to(dtype).unsqueeze(3)).exp()
    sums = torch.ones_like(weights[:, :, :1]) @ weights if base == 2 else weights.sum(dim=2, keepdim=True)
    return (sums[:, :, 0] / share).mean(dim=1)[:, skip:]


def check(query, key, backend, scale=None, skip=0, cu_seqlens=None, lse=None):
    with guarded_empty():
        actual = ops.received(query, key, scale=scale, skip=skip, lse=lse, cu_seqlens=cu_seqlens, backend=backend)
    assert actual.shape == (len(query), query.shape[2] - skip)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    scale = query.shape[3] ** -0.5 if scale is None else scale
    oracle = plain(query, key, scale, skip, cu_seqlens, lse)
    orders = [(q, k, base) for q, k in in_orders(query, key) for base in (math.e, 2)]
    expected = [plain(q, k, scale, skip, cu_seqlens, lse, torch.float32, base) for q, k, base in orders]
    assert_as_exact_as_pytorch(actual, expected, oracle)
    return actual


def log_sum_exp(query, key, scale=None):
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return (query.double() @ key.double().mT * scale).logsumexp(dim=3).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, dtype, backend):
    *sizes, skip = shape
    check(*make(*sizes, dtype), backend, skip=skip)


def test_llava_and_siglip():
    """577 tokens of 64 features with [CLS], and 729 of 72 without."""
    check(*make(1, 1, 577, 64, torch.bfloat16), "triton", skip=1)
    check(*make(1, 1, 729, 72, torch.float16), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    query, key = make(2, 3, 70, 20, torch.float16, layout)
    check(query, key, backend, skip=1)
    lse = in_layout(log_sum_exp(query, key), layout)
    check(query, key, backend, skip=1, lse=lse)
    query, key = make(1, 2, 90, 20, torch.bfloat16, layout)
    check(query, key, backend, cu_seqlens=torch.tensor([0, 0, 40, 0, 90, 0], device=DEVICE)[::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("starts", [None, [0, 20, 49]])
def test_the_default_dtype_changes_no_bit(starts, backend):
    query, key = make(1, 2, 49, 16)
    cu_seqlens = None if starts is None else torch.tensor(starts, device=DEVICE)
    expected = ops.received(query, key, cu_seqlens=cu_seqlens, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(ops.received(query, key, cu_seqlens=cu_seqlens, backend=backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_keys_by_expansion(backend):
    query, key = make(2, 4, 33, 16)
    check(query, key[:, :1].expand(-1, 4, -1, -1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.3])
def test_scale(scale, backend):
    query, key = make(1, 2, 70, 24)
    check(query, key, backend, scale=scale, skip=1)
    check(query, key, backend, scale=scale, skip=1, lse=log_sum_exp(query, key, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shares_of_all_tokens_sum_to_1(backend):
    query, key = make(2, 3, 100, 16)
    everything = ops.received(query, key, backend=backend)
    torch.testing.assert_close(everything.sum(dim=1), torch.ones(2, device=DEVICE))
    key[:, :, 0] = 3 * query.mean(dim=2)  # the skipped key stays in the denominator, and its query counts
    everything = ops.received(query, key, backend=backend)
    assert torch.equal(ops.received(query, key, skip=1, backend=backend), everything[:, 1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_receive_equally(backend):
    query, _ = make(1, 2, 65, 8)
    actual = ops.received(query, torch.zeros_like(query), backend=backend)
    torch.testing.assert_close(actual, torch.full((1, 65), 1 / 65, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_neither_overflow_nor_vanish(backend):
    query, key = make(1, 2, 150, 32, spread=200.0)
    check(query, key, backend, scale=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_sum_exp_of_pytorchs_attention(dtype, backend):
    """Natural logarithm, scale included: what SDPA's forward pass on a CPU returns beside its output."""
    query, key = make(2, 3, 70, 16, dtype)
    cpu = [x.cpu() for x in (query, key, key)]
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*cpu)
    assert lse.dtype == torch.float32
    assert not lse.is_contiguous()
    torch.testing.assert_close(lse.to(DEVICE), log_sum_exp(query, key), atol=1e-4, rtol=1e-4)
    if dtype == torch.float32:
        check(query, key, backend, skip=1, lse=lse.to(DEVICE))
    actual = ops.received(query, key, lse=lse.to(DEVICE), backend=backend)
    torch.testing.assert_close(actual, ops.received(query, key, backend=backend), atol=0, rtol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_log_sum_exp_is_used(backend):
    """With a constant taken off a query's, the query counts as much more."""
    query, key = make(2, 2, 40, 16)
    lse = log_sum_exp(query, key)
    expected = ops.received(query, key, lse=lse, backend=backend)
    less = ops.received(query, key, lse=lse - 1, backend=backend)
    torch.testing.assert_close(less, expected * torch.e)
    nobody = torch.full_like(lse, float("inf"))
    nobody[:, :, 7] = lse[:, :, 7]
    one = (query[:, :, 7:8] @ key.mT / 4).softmax(dim=3).mean(dim=1)[:, 0] / 40
    torch.testing.assert_close(ops.received(query, key, lse=nobody, backend=backend), one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "index"), [(torch.float32, torch.int64), (torch.bfloat16, torch.int32)])
@pytest.mark.parametrize(
    "starts",
    [[0, 150], [0, 1, 150], [0, 64, 128, 150], [0, 30, 30, 101, 140, 149, 150], [0, *range(2, 150, 3), 150]],
    ids=len,
)
def test_packed_images(starts, dtype, index, backend):
    """Segments within a block, over several blocks, of one token, and empty ones."""
    query, key = make(1, 2, 150, 24, dtype)
    cu_seqlens = torch.tensor(starts, dtype=index, device=DEVICE)
    check(query, key, backend, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_packed_images_never_see_each_other(with_lse, backend):
    """Whatever another image holds, NaN included, an image's bits stay, and are about those of the image alone."""
    query, key = make(1, 2, 150, 16)
    bounds = [0, 20, 90, 150]
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    spans = [slice(*bounds[i : i + 2]) for i in range(3)]

    def run(**options):
        lse = torch.cat([log_sum_exp(query[:, :, s], key[:, :, s]) for s in spans], dim=2) if with_lse else None
        return ops.received(query, key, cu_seqlens=cu_seqlens, lse=lse, backend=backend, **options)

    expected = run()
    for span in spans:
        alone = ops.received(query[:, :, span], key[:, :, span], backend=backend)
        torch.testing.assert_close(expected[:, span], alone)
        torch.testing.assert_close(alone.sum(), torch.ones((), device=DEVICE))
    for value in (5.0, float("inf"), float("nan")):
        key[:, :, 30:60] = value
        query[:, :, 50] = value
        actual = run()
        for span in (spans[0], spans[2]):
            assert torch.equal(actual[:, span], expected[:, span])
        assert not torch.equal(actual[:, spans[1]], expected[:, spans[1]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("where", ["one key", "block of keys", "all keys", "one query"])
def test_not_finite_as_the_reference(where, positive, bad, backend):
    query, key = make(2, 1, 100, 16)
    if positive:  # logits of inf are then all of one sign
        query.abs_()
    expected = ops.received(query, key, backend=backend)
    if where == "one query":
        query[1, 0, 99, 3] = bad
    else:
        last = {"one key": 1, "block of keys": 70, "all keys": 100}[where]
        key[1, :, :last] = bad
    actual = ops.received(query, key, backend=backend)
    torch.testing.assert_close(actual, reference.received(query, key), equal_nan=True)
    assert torch.equal(actual[0], expected[0])
    lse = (query @ key.mT / 4).logsumexp(dim=3)
    actual = ops.received(query, key, lse=lse, backend=backend)
    torch.testing.assert_close(actual, reference.received(query, key, lse=lse), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_minus_infinity_receive_nothing(backend):
    query, key = make(1, 2, 200, 16)
    query.abs_()
    key[:, :, :130] = float("-inf")
    actual = ops.received(query, key, backend=backend)
    assert (actual[:, :130] == 0).all()
    torch.testing.assert_close(actual.sum(), torch.ones((), device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_and_again(dtype, backend):
    query, key = make(3, 2, 70, 24, dtype)  # each image is 16-byte aligned
    batch = ops.received(query, key, skip=1, backend=backend)
    assert torch.equal(batch, ops.received(query, key, skip=1, backend=backend))
    for b in range(3):
        assert torch.equal(batch[b : b + 1], ops.received(query[b : b + 1], key[b : b + 1], skip=1, backend=backend))


def test_no_matrix_of_all_pairs():
    """Nothing that is allocated has more than two numbers for each query."""
    query, key = make(2, 3, 70, 16)
    for options in ({}, {"lse": log_sum_exp(query, key)}):
        with guarded_empty() as allocated:
            ops.received(query, key, backend="triton", **options)
        assert len(allocated) == 3 - len(options)
        assert max(x.numel() for x in allocated) == 2 * 3 * 70 * (2 - len(options))


@reserves(5)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("which", ["query", "key"])
def test_offsets_beyond_int32(axis, which):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    memory = torch.empty(4 * step + 64, dtype=torch.float16, device=DEVICE)
    shape = [2, 2, 2, 2]
    shape[axis] = 5
    strides = [8, 4, 2, 1]
    strides[axis] = step
    tensors = dict(zip(("query", "key"), make(*shape, torch.float16), strict=True))
    tensors[which] = memory.as_strided(shape, strides).copy_(tensors[which])
    check(**tensors, backend="triton")


@property_test
@given(
    num_images=st.integers(1, 2),
    num_heads=st.integers(1, 2),
    num_tokens=st.integers(1, 80),
    num_features=st.integers(1, 140),
    skip=st.integers(0, 3),
    scale=st.none() | st.floats(-2, 2),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
@example(1, 1, 65, 129, 0, None, torch.float32, "slice")
def test_any_shape(num_images, num_heads, num_tokens, num_features, skip, scale, dtype, layout):
    query, key = make(num_images, num_heads, num_tokens, num_features, dtype, layout)
    check(query, key, "triton", scale, min(skip, num_tokens - 1))


@property_test
@given(
    starts=st.lists(st.integers(0, 100), max_size=9),
    num_tokens=st.integers(1, 100),
    num_features=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_segments(starts, num_tokens, num_features, dtype, layout):
    query, key = make(1, 2, num_tokens, num_features, dtype, layout)
    inner = sorted(min(start, num_tokens) for start in starts)
    check(query, key, "triton", cu_seqlens=torch.tensor([0, *inner, num_tokens], device=DEVICE))

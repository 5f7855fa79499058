"""cls_attention: the kernel and the reference against an fp64 oracle, output and [CLS] probabilities."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from vtc import ops, reference

# NumPy's words on -inf minus -inf and on a maximum of nothing but NaN, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")

# B, H, N, D. N around the blocks of queries and keys; D through padding; LLaVA-1.5 (577, 64), ViT-H and ViT-g (80, 88).
SHAPES = [
    (1, 1, 1, 64),
    (1, 2, 2, 64),
    (3, 2, 5, 48),
    (1, 5, 16, 88),
    (3, 3, 49, 72),
    (1, 3, 64, 80),
    (2, 3, 65, 128),
    (1, 2, 66, 64),
    (1, 1, 33, 16),
    (1, 1, 577, 64),
    (1, 1, 130, 256),
    (2, 1, 97, 1),
]


def cls_attention(*args, backend, **kwargs):
    return ops.cls_attention(*args, backend=backend, **kwargs)


def make(num_images, num_heads, num_tokens, num_features, dtype=torch.float32, layout="tokens first", spread=1.0):
    generator = torch.Generator().manual_seed(num_tokens)
    size = 3, num_images, num_heads, num_tokens, num_features
    query, key, value = torch.randn(size, generator=generator)
    return [in_layout(x.to(DEVICE, dtype), layout) for x in (query * spread, key, value)]


def plain(query, key, value, scale, dtype):
    """Plain PyTorch in `dtype`: eager attention. In float64 it is the oracle."""
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    weights = torch.softmax((query @ key.mT) * scale, dim=-1)
    return (weights @ value).transpose(1, 2), weights[:, :, 0]


def check(query, key, value, scale, backend):
    with guarded_empty():
        out, probs = cls_attention(query, key, value, scale=scale, backend=backend)
    num_images, num_heads, num_tokens, num_features = query.shape
    assert out.shape == (num_images, num_tokens, num_heads, num_features)
    assert out.dtype == query.dtype
    assert out.is_contiguous()
    assert probs.shape == (num_images, num_heads, num_tokens)
    assert probs.dtype == torch.float32
    scale = num_features**-0.5 if scale is None else scale
    oracle_out, oracle_probs = plain(query, key, value, scale, torch.float64)
    assert_as_exact_as_pytorch(out, plain(query, key, value, scale, query.dtype)[0], oracle_out)
    expected = [plain(q, k, value, scale, torch.float32)[1] for q, k in in_orders(query, key)]
    assert_as_exact_as_pytorch(probs, expected, oracle_probs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, dtype, backend):
    check(*make(*shape, dtype), None, backend)


# ViT-B/32, ViT-B/16, ViT-L/14, SigLIP 378, ViT-L/14 448; a head dim in turn. 65 images are more than fill a GPU.
@pytest.mark.parametrize(
    ("num_images", "num_tokens", "num_features"),
    [(1, 50, 64), (2, 197, 64), (1, 257, 80), (1, 577, 128), (1, 730, 72), (1, 1025, 88), (65, 1, 16), (65, 66, 16)],
)
def test_towers_and_batches(num_images, num_tokens, num_features):
    check(*make(num_images, 1, num_tokens, num_features, torch.float16), None, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_features", [20, 24])  # 40 and 48 bytes: tokens are not, and are, 16-byte aligned
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, num_features, backend):
    check(*make(2, 3, 70, num_features, torch.float16, layout), None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor_has_strides_of_its_own(backend):
    query, key, value = make(2, 3, 70, 20)
    check(query, in_layout(key, "transposed"), in_layout(value, "every other"), None, backend)
    check(in_layout(query, "slice"), key[:, :1].expand(-1, 3, -1, -1), value.contiguous(), None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2])  # equal weights are exact in bfloat16, and its interpreted casts are not
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale, dtype, backend):
    check(*make(1, 2, 70, 24, dtype), scale, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_rows_neither_overflow_nor_vanish(dtype, backend):
    query, key, value = make(1, 2, 200, 32, dtype, spread=200.0)
    assert plain(query, key, value, 1.0, torch.float64)[1].max() > 0.9
    check(query, key, value, 1.0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rising", [True, False])
def test_the_maximum_may_come_first_or_last(rising, backend):
    query, key, value = make(1, 2, 300, 16)
    query = query.abs()
    key = key / 4 + torch.linspace(-3, 3, 300, device=DEVICE).mul(1 if rising else -1).unsqueeze(1)
    check(query, key, value, None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_query_of_each_head_gets_its_own(backend):
    """One hot: query m has eyes for key m + 1 alone, and each value says where it was."""
    query = 40 * torch.eye(96, device=DEVICE).expand(2, 3, -1, -1)
    key = query.roll(-1, dims=-1)
    where = torch.arange(2 * 3 * 96, device=DEVICE).float().view(2, 3, 96, 1).expand(-1, -1, -1, 96)
    out, probs = cls_attention(query, key, where, scale=1.0, backend=backend)
    assert torch.equal(out, where.roll(-1, dims=2).transpose(1, 2))
    assert torch.equal(probs, (torch.arange(96, device=DEVICE) == 1).float().expand(2, 3, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_probabilities_and_row_scores_per_head(dtype, backend):
    query, key, value = make(2, 2, 100, 40, dtype)
    probs = cls_attention(query, key, value, backend=backend)[1]
    torch.testing.assert_close(probs.sum(dim=2), torch.ones(2, 2, device=DEVICE))
    torch.testing.assert_close(probs.mean(dim=1), ops.row_scores(query[:, :, 0], key, backend=backend))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation has returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_reference_never_makes_an_n_by_n_matrix():
    tensors = make(1, 1, 600, 16)
    with Largest() as largest:
        reference.cls_attention(*tensors)
    assert 600 * 16 <= largest.elements <= 600 * 64


@pytest.mark.parametrize("num_features", [64, 72, 256])
def test_rows_in_fp32_are_as_exact_as_those_of_row_scores(num_features):
    """Off the tensor cores, and each logit a sum in a tree: a chain of D additions would have twice the error."""
    query, key, value = make(2, 1, 150, num_features, spread=4.0)
    oracle = plain(query, key, value, num_features**-0.5, torch.float64)[1]
    scores = ops.row_scores(query[:, :, 0], key, backend="triton").unsqueeze(1)
    assert_as_exact_as_pytorch(cls_attention(query, key, value, backend="triton")[1], scores, oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_minus_infinity_weigh_nothing(dtype, backend):
    """Whole blocks of them, the first one and the last one among them."""
    query, key, value = make(1, 2, 300, 16, dtype)
    query.abs_()
    key[:, :, :130] = key[:, :, 220:] = float("-inf")
    check(query, key, value, None, backend)
    probs = cls_attention(query, key, value, backend=backend)[1]
    assert (probs[:, :, :130] == 0).all()
    assert (probs[:, :, 220:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_head(bad, dtype, backend):
    query, key, value = make(3, 2, 70, 16, dtype)
    expected_out, expected_probs = cls_attention(query, key, value, backend=backend)
    key[1, 0, 69, 3] = bad
    query[1, 0, :, 3] = 1.0
    out, probs = cls_attention(query, key, value, backend=backend)
    assert out[1, :, 0].isnan().all()
    assert probs[1, 0].isnan().all()
    assert torch.equal(out[1, :, 1], expected_out[1, :, 1])
    assert torch.equal(probs[1, 1], expected_probs[1, 1])
    assert torch.equal(out[[0, 2]], expected_out[[0, 2]])
    assert torch.equal(probs[[0, 2]], expected_probs[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_of_nan_spoils_its_row_alone(dtype, backend):
    query, key, value = make(1, 2, 70, 16, dtype)
    expected_out, expected_probs = cls_attention(query, key, value, backend=backend)
    query[0, 0, 1] = float("nan")
    out, probs = cls_attention(query, key, value, backend=backend)
    assert out[0, 1, 0].isnan().all()
    assert torch.equal(probs, expected_probs)
    out[0, 1, 0] = expected_out[0, 1, 0]
    assert torch.equal(out, expected_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_nothing_but_minus_infinity_is_nan(dtype):
    query, key, value = make(1, 2, 70, 16, dtype)
    query.abs_()
    key[:, 0] = float("-inf")
    out, probs = cls_attention(query, key, value, backend="triton")
    assert out[:, :, 0].isnan().all()
    assert probs[:, 0].isnan().all()
    assert out[:, :, 1].isfinite().all()
    assert torch.equal(probs.isnan(), cls_attention(query, key, value, backend="torch")[1].isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_and_again(dtype, backend):
    query, key, value = make(3, 2, 100, 20, dtype)
    out, probs = cls_attention(query, key, value, backend=backend)
    for images in (slice(0, 3), slice(0, 1), slice(1, 3)):
        again = cls_attention(query[images], key[images], value[images], backend=backend)
        assert torch.equal(again[0], out[images])
        assert torch.equal(again[1], probs[images])


@reserves(5)
@pytest.mark.parametrize(("axis", "count"), [(0, 5), (1, 5), (2, 5), (2, 66), (3, 5)])
def test_offsets_beyond_int32(axis, count):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched.

    With 66 keys or queries, the offset of a later block alone is beyond, not that of any two within a block.
    """
    step = 2**31 // (count - 1)
    shape = [2, 2, 2, 2]
    shape[axis] = count
    strides = [8, 4, 2, 1]
    strides[axis] = step
    memory = torch.empty((count - 1) * step + 64, dtype=torch.float16, device=DEVICE)
    near = make(*shape, torch.float16, "contiguous")
    far = [memory.as_strided(shape, strides, 16 * i).copy_(x) for i, x in enumerate(near)]
    check(*far, None, "triton")


@property_test
@given(
    num_images=st.integers(1, 3),
    num_heads=st.integers(1, 4),
    num_tokens=st.integers(1, 140),
    num_features=st.integers(1, 130),
    scale=st.none() | st.floats(-2, 2),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
@example(1, 1, 129, 1, None, torch.float32, "slice")
def test_any_shape(num_images, num_heads, num_tokens, num_features, scale, dtype, layout):
    check(*make(num_images, num_heads, num_tokens, num_features, dtype, layout), scale, "triton")

"""merge: who joins whom, decided again in float64, and rows as exact as plain PyTorch's."""

import pytest
import torch
from hypothesis import given
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

NAN = float("nan")
RULES = [None, 3]
# B, N, K, D, C around the blocks of 32 targets, 32 and 64 tokens, 16 and 64 features of a key, 64 of a row.
SHAPES = [
    *((1, 1, 1, 1, 1), (2, 5, 5, 3, 2), (1, 65, 33, 65, 17), (1, 49, 7, 130, 65), (3, 16, 2, 8, 16)),
    *((1, 576, 2, 5, 9), (1, 729, 2, 4, 7)),
]


def make(num_images, num_tokens, num_targets, num_outputs, num_features, dtype=torch.float32, layout="contiguous"):
    """x, key, targets in random order, weight. No weight is 0, so that a row of `mix` shows who is in it."""
    generator = torch.Generator().manual_seed(num_tokens + 7 * num_targets)
    x = torch.randn(num_images, num_tokens, num_outputs, generator=generator)
    key = torch.randn(num_images, num_tokens, num_features, generator=generator)
    targets = torch.rand(num_images, num_tokens, generator=generator).argsort(1)[:, :num_targets]
    weight = torch.rand(num_images, num_tokens, generator=generator) + 0.1
    tensors = (x.to(dtype), key.to(dtype), targets, weight)
    return tuple(in_layout(tensor.to(DEVICE), layout) for tensor in tensors)


def cosines(key, targets):
    unit = key / key.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return torch.stack([image[kept] @ image.T for image, kept in zip(unit, targets, strict=True)])


def ideal_mix(mix, key, targets, weight, neighbors, counts):
    """The weights in float64 of those who are in `mix`, after it has been checked that they are the right ones.

    Two similarities closer than rounding may change places; nothing else may.
    """
    exact = cosines(key.double(), targets)
    slack = 2 * (cosines(key.float(), targets) - exact).abs().max() + 2 * torch.finfo(torch.float32).eps
    num_tokens, num_targets = weight.shape[1], targets.shape[1]
    ideal = torch.zeros_like(mix, dtype=torch.float64)
    for b, kept in enumerate(targets.tolist()):
        count = num_targets if counts is None else counts[b].item()
        kept = kept[:count]
        others = [n for n in range(num_tokens) if n not in kept]
        for k, t in enumerate(kept):
            members = [n for n in mix[b, k].nonzero().flatten().tolist() if n != t]
            if neighbors is None:
                assert set(members) <= set(others)
                total = weight[b, members].double().sum()
                ideal[b, k, members] = weight[b, members].double() / total
                assert all(exact[b, k, n] >= exact[b, :count, n].max() - slack for n in members)
            else:
                assert len(members) == min(neighbors, num_tokens - 1)
                rest = [n for n in range(num_tokens) if n != t and n not in members]
                assert not rest or not members or exact[b, k, members].min() >= exact[b, k, rest].max() - slack
                ideal[b, k, members] = weight[b, members].double()
                assert torch.equal(mix[b, k, members], weight[b, members])
            ideal[b, k, t] = 1
            assert mix[b, k, t] == 1
        if neighbors is None:
            joined = (mix[b, :count] != 0)[:, others].sum(0)
            assert (joined == (1 if kept else 0)).all()
        else:
            ideal[b, count, others] = weight[b, others].double()
            assert torch.equal(mix[b, count], ideal[b, count].float())
    assert ((mix == 0) == (ideal == 0)).all()
    return ideal


def check(x, key, targets, weight, neighbors, backend, counts=None):
    with guarded_empty():
        rows, mix = ops.merge(x, key, targets, weight, neighbors=neighbors, counts=counts, backend=backend)
    num_rows = targets.shape[1] + (neighbors is not None)
    assert rows.shape == (len(x), num_rows, x.shape[2])
    assert rows.dtype == x.dtype
    assert mix.shape == (len(x), num_rows, x.shape[1])
    assert rows.is_contiguous()
    assert mix.is_contiguous()
    ideal = ideal_mix(mix, key, targets, weight, neighbors, counts)
    assert_as_exact_as_pytorch(mix, ideal.float(), ideal)
    assert_as_exact_as_pytorch(rows, ideal.to(x.dtype) @ x, ideal @ x.double())
    return rows, mix


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, neighbors, backend):
    check(*make(*shape), neighbors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_images(backend):
    check(*make(65, 3, 1, 2, 2), None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, neighbors, backend):
    check(*make(2, 40, 3, 20, 70, dtype), neighbors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
def test_rows_and_keys_of_different_dtypes(neighbors, backend):
    x, key, targets, weight = make(2, 20, 4, 6, 10)
    check(x.bfloat16(), key, targets, weight, neighbors, backend)
    check(x, key.half(), targets, weight, neighbors, backend)


@pytest.mark.parametrize("neighbors", RULES)
@pytest.mark.parametrize(("num_tokens", "num_targets"), [(2048, 1), (2100, 1)])
def test_rows_of_several_blocks(num_tokens, num_targets, neighbors):
    check(*make(1, num_tokens, num_targets, 2, 3), neighbors, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_in_several_blocks(backend):
    x = key = torch.ones(1, 2100, 1, device=DEVICE)
    targets, weight = torch.tensor([[7]], device=DEVICE), torch.ones(1, 2100, device=DEVICE)
    mix = ops.merge(x, key, targets, weight, neighbors=2050, backend=backend)[1][0, 0]
    assert mix.nonzero().flatten().tolist() == list(range(2051))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_of_many_targets(backend):
    """More than a block of them: all others join the first."""
    x = key = torch.ones(1, 24, 1, device=DEVICE)
    targets, weight = torch.arange(20, device=DEVICE).expand(1, -1), torch.ones(1, 24, device=DEVICE)
    mix = ops.merge(x, key, targets, weight, backend=backend)[1][0]
    assert mix[:, 20:].nonzero().tolist() == [[0, n] for n in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_targets_than_tokens(backend):
    """Whoever repeats a target gets its row again. The zeros of the row of the dropped take two blocks."""
    x, key, targets, weight = make(1, 5, 5, 2, 2)
    mix = ops.merge(x, key, targets.repeat(1, 2), weight, neighbors=2, backend=backend)[1][0]
    assert torch.equal(mix[:5], mix[5:10])
    assert not mix[10].any()


@pytest.mark.parametrize("neighbors", [1, 11, 12, 13, 10**6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_others_where_they_are_fewer(neighbors, backend):
    check(*make(2, 13, 4, 3, 5), neighbors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, neighbors, backend):
    check(*make(2, 20, 4, 6, 10, torch.float16, layout), neighbors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
def test_images_with_different_counts(neighbors, backend):
    """Each as if it were alone with its targets; what comes after them is 0, even if x is NaN."""
    x, key, targets, weight = make(4, 32, 6, 6, 10)  # each image is 16-byte aligned
    counts = in_layout(torch.tensor([[5, 3, 1, 0]], device=DEVICE), "every other")[0]
    rows, mix = check(x, key, targets, weight, neighbors, backend, counts)
    for b, count in enumerate(counts.tolist()):
        used = count + (neighbors is not None)
        assert not rows[b, used:].any()
        assert not mix[b, used:].any()
        if count:
            image = slice(b, b + 1)
            alone = ops.merge(
                x[image], key[image], targets[image, :count], weight[image], neighbors=neighbors, backend=backend
            )
            assert torch.equal(alone[0][0], rows[b, :used])
            assert torch.equal(alone[1][0], mix[b, :used])
    x[:, 3] = NAN
    rows = ops.merge(x, key, targets, weight, neighbors=neighbors, counts=counts, backend=backend)[0]
    for b, count in enumerate(counts.tolist()):
        used = count + (neighbors is not None)
        assert rows[b, :used].isnan().all()
        assert not rows[b, used:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_far_below_the_number_of_targets(backend):
    """Whole blocks without a target."""
    counts = torch.tensor([3, 40], device=DEVICE)
    check(*make(2, 70, 70, 3, 4), None, backend, counts)


# Six tokens; keys are directions in the plane, so that similarities are exact or far apart.
EAST, NORTH, WEST, ZERO, BAD = [2.0, 0.0], [0.0, 1.0], [-4.0, 0.0], [0.0, 0.0], [NAN, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("keys", "targets", "neighbors", "expected"),
    [
        ([EAST] * 6, [3, 0], 2, [[0, 1], [1, 2]]),
        ([EAST] * 6, [1], 5, [[0, 2, 3, 4, 5]]),
        ([EAST, NORTH, EAST, WEST, NORTH, EAST], [5, 3], 2, [[0, 2], [1, 4]]),
        ([EAST, WEST, ZERO, NORTH, WEST, ZERO], [0], 3, [[2, 3, 5]]),
        ([BAD, WEST, EAST, BAD, EAST, EAST], [2], 3, [[1, 4, 5]]),
        ([BAD, WEST, EAST, BAD, EAST, EAST], [2], 4, [[0, 1, 4, 5]]),
        ([BAD, WEST, EAST, BAD, EAST, EAST], [0], 2, [[1, 2]]),  # all NaN, the target among them
        ([BAD, BAD, BAD, BAD, BAD, BAD], [1], 2, [[0, 2]]),
        ([EAST] * 6, [3, 0], None, [[1, 2, 4, 5], []]),
        ([EAST, NORTH, WEST, ZERO, EAST, NORTH], [1, 2, 0], None, [[3, 5], [], [4]]),
        ([EAST, NORTH, BAD, WEST, EAST, NORTH], [1, 0], None, [[2, 3, 5], [4]]),
        ([EAST, BAD, NORTH, EAST, WEST, NORTH], [1, 0], None, [[], [2, 3, 4, 5]]),  # nothing is like NaN
        ([EAST, BAD, NORTH, EAST, WEST, NORTH], [1], None, [[0, 2, 3, 4, 5]]),  # but there is no other target
    ],
)
def test_ties_zeros_and_nan(keys, targets, neighbors, expected, backend):
    key, targets = torch.tensor([keys], device=DEVICE), torch.tensor([targets], device=DEVICE)
    x, weight = torch.ones(1, 6, 1, device=DEVICE), torch.full((1, 6), 0.25, device=DEVICE)
    mix = ops.merge(x, key, targets, weight, neighbors=neighbors, backend=backend)[1][0]
    found = [[n for n in range(6) if mix[k, n] and n != t] for k, t in enumerate(targets[0].tolist())]
    assert found == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_weight_0_joins_none(backend):
    x, key, _, weight = make(2, 20, 3, 6, 10)
    targets = torch.tensor([[0, 10, 19], [2, 3, 12]], device=DEVICE)
    weight[:, 4:9] = 0.0
    rows, mix = ops.merge(x, key, targets, weight, backend=backend)
    assert not mix[:, :, 4:9].any()
    key[:, 4:9] = NAN
    assert torch.equal(ops.merge(x, key, targets, weight, backend=backend)[0], rows)
    weight[:] = 0.0
    kept = x[torch.arange(2, device=DEVICE).unsqueeze(1), targets]
    assert torch.equal(ops.merge(x, key, targets, weight, backend=backend)[0], kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
def test_bad_rows_reach_their_own_image_and_feature_alone(neighbors, backend):
    x, key, targets, weight = make(2, 20, 2, 6, 10)
    rows = ops.merge(x, key, targets, weight, neighbors=neighbors, backend=backend)[0]
    x[1, 5, 2] = NAN
    expected = rows.clone()
    expected[1, :, 2] = NAN
    actual = ops.merge(x, key, targets, weight, neighbors=neighbors, backend=backend)[0]
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
def test_same_bits_alone_in_a_batch_and_again(neighbors, backend):
    arguments = make(3, 40, 2, 70, 40)
    batch = ops.merge(*arguments, neighbors=neighbors, backend=backend)
    again = ops.merge(*arguments, neighbors=neighbors, backend=backend)
    assert all(map(torch.equal, batch, again))
    for b in range(3):
        alone = ops.merge(*(x[b : b + 1] for x in arguments), neighbors=neighbors, backend=backend)
        assert torch.equal(alone[0], batch[0][b : b + 1])
        assert torch.equal(alone[1], batch[1][b : b + 1])


@reserves(5)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_int32(axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    memory = torch.empty(4 * step + 64, dtype=torch.float16, device=DEVICE)
    strides = [7, 7, 7]
    strides[axis], strides[axis - 1] = step, 1
    x, key, targets, weight = make(5, 5, 1, 5, 5, torch.float16)
    far = memory.as_strided((5, 5, 5), strides)
    far.copy_(x)
    check(far, key, targets, weight, None, "triton")
    far.copy_(key)
    check(x, far, targets, weight, None, "triton")


@reserves(5)
def test_blocks_of_tokens_beyond_int32():
    """Where the step from one block of 16 tokens to the next takes more than 32 bits, and none within a block."""
    step = 2**27
    x, key, targets, weight = make(1, 18, 1, 5, 5, torch.float16)
    far = torch.empty(17 * step + 64, dtype=torch.float16, device=DEVICE).as_strided((1, 18, 5), (7, step, 1))
    far.copy_(x)
    check(far, key, targets, weight, None, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
def test_gradient(neighbors, backend):
    """Of x alone, and as the rows are linear in it, the weights themselves."""
    x, key, targets, weight = make(2, 20, 4, 6, 10)
    x, key, weight = x.requires_grad_(), key.requires_grad_(), weight.requires_grad_()
    rows, mix = ops.merge(x, key, targets, weight, neighbors=neighbors, backend=backend)
    assert not mix.requires_grad
    upstream = torch.randn_like(rows)
    rows.backward(upstream)
    torch.testing.assert_close(x.grad, mix.mT @ upstream)
    assert key.grad is None
    assert weight.grad is None
    half = x.detach().half().requires_grad_()
    rows, _ = ops.merge(half, key, targets, weight, neighbors=neighbors, backend=backend)
    (grad,) = torch.autograd.grad(rows, half, upstream.half())
    assert grad.dtype == torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_of_autograd(backend):
    x, key, targets, weight = make(2, 9, 3, 4, 5)
    x = x.requires_grad_()
    with torch.no_grad():
        assert not ops.merge(x, key, targets, weight, backend=backend)[0].requires_grad
    with torch.inference_mode():
        inside = ops.merge(x, key, targets, weight, backend=backend)[0]
    assert torch.equal(inside, ops.merge(x, key, targets, weight, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", RULES)
def test_empty_batch(neighbors, backend):
    arguments = (x[:0] for x in make(1, 9, 3, 4, 5))
    rows, mix = ops.merge(*arguments, neighbors=neighbors, backend=backend)
    num_rows = 3 if neighbors is None else 4
    assert rows.shape == (0, num_rows, 4)
    assert mix.shape == (0, num_rows, 9)


@property_test
@given(
    num_images=st.integers(1, 2),
    num_tokens=st.integers(1, 50),
    share=st.floats(0, 1),
    num_outputs=st.integers(1, 70),
    num_features=st.integers(1, 70),
    neighbors=st.none() | st.integers(1, 60),
    counted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(num_images, num_tokens, share, num_outputs, num_features, neighbors, counted, dtype, layout):
    num_targets = min(num_tokens, 5, 1 + int(share * num_tokens))
    arguments = make(num_images, num_tokens, num_targets, num_outputs, num_features, dtype, layout)
    counts = torch.tensor([int(share * num_targets), num_targets][:num_images], device=DEVICE) if counted else None
    check(*arguments, neighbors, "triton", counts)


def test_launcher_refuses_what_it_could_not_read_safely():
    from vtc_kernels.merge import merge

    x, key, targets, weight = make(2, 9, 3, 4, 5)
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\] and key"):
        merge(x, key[:, 1:], targets, weight)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        merge(x.double(), key, targets, weight)
    with pytest.raises(ValueError, match=r"targets must be int64 \[2, K\]"):
        merge(x, key, targets.int(), weight)
    with pytest.raises(ValueError, match=r"weight must be float32 \[2, 9\]"):
        merge(x, key, targets, weight[:, 1:])
    with pytest.raises(ValueError, match=r"counts must be int64 \[2\]"):
        merge(x, key, targets, weight, counts=targets)
    with pytest.raises(ValueError, match="neighbors must be at least 1"):
        merge(x, key, targets, weight, neighbors=0)
    with pytest.raises(ValueError, match="different devices"):
        merge(x, key, targets, weight.to("meta"))


@pytest.mark.parametrize("neighbors", RULES)
def test_launcher_never_reads_outside_its_input(neighbors):
    from vtc_kernels.merge import merge

    x, key, _, weight = make(2, 9, 3, 4, 5)
    targets = torch.tensor([[-1, 3, 9], [8, 10**12, 0]], device=DEVICE)
    counts = torch.tensor([3, 10**9], device=DEVICE)
    rows, mix = merge(x, key, targets, weight, neighbors=neighbors, counts=counts)
    assert rows.isfinite().all()
    assert mix[0, 1, 3] == mix[1, 0, 8] == mix[1, 2, 0] == 1
    assert (mix[0, 0] < 1.5).all()

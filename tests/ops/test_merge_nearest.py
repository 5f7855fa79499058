"""merge_nearest: which target each token joins, decided again in float64, and features as exact as plain PyTorch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_is_merged,
    cosines_and_slack,
    guarded_empty,
    merge_inputs,
    property_test,
    reserves,
)

from vtc import ops

NAN = float("nan")
# B, N, K, D, C around the blocks of 32 targets, 32 and 64 tokens, 16 and 64 features of a key, 64 of a token.
SHAPES = [
    *((1, 1, 1, 1, 1), (2, 5, 5, 3, 2), (1, 65, 33, 65, 17), (1, 49, 7, 130, 65), (3, 16, 2, 8, 16)),
    *((1, 576, 2, 5, 9), (1, 729, 2, 4, 7)),
]
# Six tokens; keys are directions in the plane, so that similarities are exact or far apart.
EAST, NORTH, WEST, ZERO, BAD = [2.0, 0.0], [0.0, 1.0], [-4.0, 0.0], [0.0, 0.0], [NAN, 1.0]


def ideal_mix(mix, key, targets, weight):
    """The weights in float64 of those who are in `mix`, after it has been checked that they are the right ones.

    Two similarities closer than rounding may change places; nothing else may.
    """
    exact, slack = cosines_and_slack(key, targets)
    num_tokens = weight.shape[1]
    ideal = torch.zeros(len(mix), targets.shape[1], num_tokens, dtype=torch.float64, device=DEVICE)
    for b, kept in enumerate(targets.tolist()):
        others = [n for n in range(num_tokens) if n not in kept]
        for k, t in enumerate(kept):
            members = [n for n in mix[b, k].nonzero().flatten().tolist() if n != t]
            assert set(members) <= set(others)
            ideal[b, k, members] = weight[b, members].double() / weight[b, members].double().sum()
            assert all(exact[b, k, n] >= exact[b, :, n].max() - slack for n in members)
            ideal[b, k, t] = 1
            assert mix[b, k, t] == 1
        assert ((mix[b] != 0)[:, others].sum(0) == 1).all()
    return ideal


def check(x, key, targets, weight, backend):
    with guarded_empty():
        features, mix = ops.merge_nearest(x, key, targets, weight, backend=backend)
    assert_is_merged(features, mix, ideal_mix(mix, key, targets, weight), x)
    return features, mix


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, backend):
    check(*merge_inputs(*shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_images(backend):
    check(*merge_inputs(65, 3, 1, 2, 2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend):
    check(*merge_inputs(2, 40, 3, 20, 70, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_keys_of_different_dtypes(backend):
    x, key, targets, weight = merge_inputs(2, 20, 4, 6, 10)
    check(x.bfloat16(), key, targets, weight, backend)
    check(x, key.half(), targets, weight, backend)


@pytest.mark.parametrize(("num_tokens", "num_targets"), [(2048, 1), (2100, 1)])
def test_rows_of_several_blocks(num_tokens, num_targets):
    check(*merge_inputs(1, num_tokens, num_targets, 2, 3), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_of_many_targets(backend):
    """More than a block of them: all others join the first."""
    x = key = torch.ones(1, 24, 1, device=DEVICE)
    targets, weight = torch.arange(20, device=DEVICE).expand(1, -1), torch.ones(1, 24, device=DEVICE)
    mix = ops.merge_nearest(x, key, targets, weight, backend=backend)[1][0]
    assert mix[:, 20:].nonzero().tolist() == [[0, n] for n in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    check(*merge_inputs(2, 20, 4, 6, 10, torch.float16, layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_several_blocks(backend):
    """70 targets for 100 tokens: most tokens do not join one of the first block."""
    check(*merge_inputs(2, 100, 70, 3, 4), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("keys", "targets", "expected"),
    [
        ([EAST] * 6, [3, 0], [[1, 2, 4, 5], []]),
        ([EAST, NORTH, WEST, ZERO, EAST, NORTH], [1, 2, 0], [[3, 5], [], [4]]),
        ([EAST, NORTH, BAD, WEST, EAST, NORTH], [1, 0], [[2, 3, 5], [4]]),
        ([EAST, BAD, NORTH, EAST, WEST, NORTH], [1, 0], [[], [2, 3, 4, 5]]),  # nothing is like NaN
        ([EAST, BAD, NORTH, EAST, WEST, NORTH], [1], [[0, 2, 3, 4, 5]]),  # but there is no other target
    ],
)
def test_ties_zeros_and_nan(keys, targets, expected, backend):
    key, targets = torch.tensor([keys], device=DEVICE), torch.tensor([targets], device=DEVICE)
    x, weight = torch.ones(1, 6, 1, device=DEVICE), torch.full((1, 6), 0.25, device=DEVICE)
    mix = ops.merge_nearest(x, key, targets, weight, backend=backend)[1][0]
    found = [[n for n in range(6) if mix[k, n] and n != t] for k, t in enumerate(targets[0].tolist())]
    assert found == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_weight_0_joins_none(backend):
    x, key, _, weight = merge_inputs(2, 20, 3, 6, 10)
    targets = torch.tensor([[0, 10, 19], [2, 3, 12]], device=DEVICE)
    weight[:, 4:9] = 0.0
    features, mix = ops.merge_nearest(x, key, targets, weight, backend=backend)
    assert not mix[:, :, 4:9].any()
    key[:, 4:9] = NAN
    assert torch.equal(ops.merge_nearest(x, key, targets, weight, backend=backend)[0], features)
    weight[:] = 0.0
    kept = x[torch.arange(2, device=DEVICE).unsqueeze(1), targets]
    assert torch.equal(ops.merge_nearest(x, key, targets, weight, backend=backend)[0], kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_reach_their_own_image_and_feature_alone(backend):
    x, key, targets, weight = merge_inputs(2, 20, 2, 6, 10)
    features = ops.merge_nearest(x, key, targets, weight, backend=backend)[0]
    x[1, 5, 2] = NAN
    expected = features.clone()
    expected[1, :, 2] = NAN
    actual = ops.merge_nearest(x, key, targets, weight, backend=backend)[0]
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_alone_in_a_batch_and_again(backend):
    arguments = merge_inputs(3, 40, 2, 70, 40)
    batch = ops.merge_nearest(*arguments, backend=backend)
    again = ops.merge_nearest(*arguments, backend=backend)
    assert all(map(torch.equal, batch, again))
    for b in range(3):
        alone = ops.merge_nearest(*(x[b : b + 1] for x in arguments), backend=backend)
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
    x, key, targets, weight = merge_inputs(5, 5, 1, 5, 5, torch.float16)
    far = memory.as_strided((5, 5, 5), strides)
    far.copy_(x)
    check(far, key, targets, weight, "triton")
    far.copy_(key)
    check(x, far, targets, weight, "triton")


@reserves(5)
def test_blocks_of_tokens_beyond_int32():
    """Where the step from one block of 16 tokens to the next takes more than 32 bits, and none within a block."""
    step = 2**27
    x, key, targets, weight = merge_inputs(1, 18, 1, 5, 5, torch.float16)
    far = torch.empty(17 * step + 64, dtype=torch.float16, device=DEVICE).as_strided((1, 18, 5), (7, step, 1))
    far.copy_(x)
    check(far, key, targets, weight, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    """Of x alone, and as the features are linear in it, the weights themselves."""
    x, key, targets, weight = merge_inputs(2, 20, 4, 6, 10)
    x, key, weight = x.requires_grad_(), key.requires_grad_(), weight.requires_grad_()
    features, mix = ops.merge_nearest(x, key, targets, weight, backend=backend)
    assert not mix.requires_grad
    upstream = torch.randn_like(features)
    features.backward(upstream)
    torch.testing.assert_close(x.grad, mix.mT @ upstream)
    assert key.grad is None
    assert weight.grad is None
    half = x.detach().half().requires_grad_()
    features, _ = ops.merge_nearest(half, key, targets, weight, backend=backend)
    (grad,) = torch.autograd.grad(features, half, upstream.half())
    assert grad.dtype == torch.float16


@property_test
@given(
    num_images=st.integers(1, 2),
    num_tokens=st.integers(1, 50),
    share=st.floats(0, 1),
    width=st.integers(1, 70),
    num_features=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(num_images, num_tokens, share, width, num_features, dtype, layout):
    num_targets = min(num_tokens, 5, 1 + int(share * num_tokens))
    arguments = merge_inputs(num_images, num_tokens, num_targets, width, num_features, dtype, layout)
    check(*arguments, "triton")


def test_launcher_never_reads_outside_its_input():
    from vtc_kernels.merge_nearest import merge_nearest

    x, key, _, weight = merge_inputs(2, 9, 3, 4, 5)
    targets = torch.tensor([[-1, 3, 9], [8, 10**12, 0]], device=DEVICE)
    features, mix = merge_nearest(x, key, targets, weight)
    assert features.isfinite().all()
    assert mix[0, 1, 3] == mix[1, 0, 8] == mix[1, 2, 0] == 1
    assert (mix[0, 0] < 1.5).all()

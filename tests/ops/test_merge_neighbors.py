"""merge_neighbors: who is whose neighbor, decided again in float64, and features as exact as plain PyTorch's."""

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
    in_layout,
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


def ideal_mix(mix, key, targets, weight, neighbors, counts):
    """The weights in float64 of those who are in `mix`, after it has been checked that they are the right ones.

    Two similarities closer than rounding may change places; nothing else may.
    """
    exact, slack = cosines_and_slack(key, targets)
    num_tokens, num_targets = weight.shape[1], targets.shape[1]
    ideal = torch.zeros(len(mix), num_targets + 1, num_tokens, dtype=torch.float64, device=DEVICE)
    for b, kept in enumerate(targets.tolist()):
        count = num_targets if counts is None else counts[b].item()
        kept = kept[:count]
        others = [n for n in range(num_tokens) if n not in kept]
        for k, t in enumerate(kept):
            members = [n for n in mix[b, k].nonzero().flatten().tolist() if n != t]
            assert len(members) == min(neighbors, num_tokens - 1)
            rest = [n for n in range(num_tokens) if n != t and n not in members]
            assert not rest or not members or exact[b, k, members].min() >= exact[b, k, rest].max() - slack
            ideal[b, k, members] = weight[b, members].double()
            assert torch.equal(mix[b, k, members], weight[b, members])
            ideal[b, k, t] = 1
            assert mix[b, k, t] == 1
        ideal[b, count, others] = weight[b, others].double()
        assert torch.equal(mix[b, count], ideal[b, count].float())
    return ideal


def check(x, key, targets, weight, backend, neighbors=3, counts=None):
    with guarded_empty():
        features, mix = ops.merge_neighbors(
            x, key, targets, weight, neighbors=neighbors, counts=counts, backend=backend
        )
    assert_is_merged(features, mix, ideal_mix(mix, key, targets, weight, neighbors, counts), x)
    return features, mix


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, backend):
    check(*merge_inputs(*shape), backend)


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
def test_ties_in_several_blocks(backend):
    x = key = torch.ones(1, 2100, 1, device=DEVICE)
    targets, weight = torch.tensor([[7]], device=DEVICE), torch.ones(1, 2100, device=DEVICE)
    mix = ops.merge_neighbors(x, key, targets, weight, neighbors=2050, backend=backend)[1][0, 0]
    assert mix.nonzero().flatten().tolist() == list(range(2051))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_targets_than_tokens(backend):
    """Whoever repeats a target gets its row again. The zeros of the row of the dropped take two blocks."""
    x, key, targets, weight = merge_inputs(1, 5, 5, 2, 2)
    mix = ops.merge_neighbors(x, key, targets.repeat(1, 2), weight, neighbors=2, backend=backend)[1][0]
    assert torch.equal(mix[:5], mix[5:10])
    assert not mix[10].any()


@pytest.mark.parametrize("neighbors", [1, 11, 12, 13, 10**6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_others_where_they_are_fewer(neighbors, backend):
    check(*merge_inputs(2, 13, 4, 3, 5), backend, neighbors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    check(*merge_inputs(2, 20, 4, 6, 10, torch.float16, layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_with_different_counts(backend):
    """Each as if it were alone with its targets; what comes after them is 0, even if x is NaN."""
    x, key, targets, weight = merge_inputs(4, 32, 6, 6, 10)  # each image is 16-byte aligned
    counts = in_layout(torch.tensor([[5, 3, 1, 0]], device=DEVICE), "every other")[0]
    features, mix = check(x, key, targets, weight, backend, counts=counts)
    for b, count in enumerate(counts.tolist()):
        used = count + 1
        assert not features[b, used:].any()
        assert not mix[b, used:].any()
        if count:
            image = slice(b, b + 1)
            alone = ops.merge_neighbors(
                x[image], key[image], targets[image, :count], weight[image], neighbors=3, backend=backend
            )
            assert torch.equal(alone[0][0], features[b, :used])
            assert torch.equal(alone[1][0], mix[b, :used])
    x[:, 3] = NAN
    features = ops.merge_neighbors(x, key, targets, weight, neighbors=3, counts=counts, backend=backend)[0]
    for b, count in enumerate(counts.tolist()):
        used = count + 1
        assert features[b, :used].isnan().all()
        assert not features[b, used:].any()


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
    ],
)
def test_ties_zeros_and_nan(keys, targets, neighbors, expected, backend):
    key, targets = torch.tensor([keys], device=DEVICE), torch.tensor([targets], device=DEVICE)
    x, weight = torch.ones(1, 6, 1, device=DEVICE), torch.full((1, 6), 0.25, device=DEVICE)
    mix = ops.merge_neighbors(x, key, targets, weight, neighbors=neighbors, backend=backend)[1][0]
    found = [[n for n in range(6) if mix[k, n] and n != t] for k, t in enumerate(targets[0].tolist())]
    assert found == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_reach_their_own_image_and_feature_alone(backend):
    x, key, targets, weight = merge_inputs(2, 20, 2, 6, 10)
    features = ops.merge_neighbors(x, key, targets, weight, neighbors=3, backend=backend)[0]
    x[1, 5, 2] = NAN
    expected = features.clone()
    expected[1, :, 2] = NAN
    actual = ops.merge_neighbors(x, key, targets, weight, neighbors=3, backend=backend)[0]
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_alone_in_a_batch_and_again(backend):
    arguments = merge_inputs(3, 40, 2, 70, 40)
    batch = ops.merge_neighbors(*arguments, neighbors=3, backend=backend)
    again = ops.merge_neighbors(*arguments, neighbors=3, backend=backend)
    assert all(map(torch.equal, batch, again))
    for b in range(3):
        alone = ops.merge_neighbors(*(x[b : b + 1] for x in arguments), neighbors=3, backend=backend)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    """Of x alone, and as the features are linear in it, the weights themselves."""
    x, key, targets, weight = merge_inputs(2, 20, 4, 6, 10)
    x, key, weight = x.requires_grad_(), key.requires_grad_(), weight.requires_grad_()
    features, mix = ops.merge_neighbors(x, key, targets, weight, neighbors=3, backend=backend)
    assert not mix.requires_grad
    upstream = torch.randn_like(features)
    features.backward(upstream)
    torch.testing.assert_close(x.grad, mix.mT @ upstream)
    assert key.grad is None
    assert weight.grad is None
    half = x.detach().half().requires_grad_()
    features, _ = ops.merge_neighbors(half, key, targets, weight, neighbors=3, backend=backend)
    (grad,) = torch.autograd.grad(features, half, upstream.half())
    assert grad.dtype == torch.float16


@property_test
@given(
    num_images=st.integers(1, 2),
    num_tokens=st.integers(1, 50),
    share=st.floats(0, 1),
    width=st.integers(1, 70),
    num_features=st.integers(1, 70),
    neighbors=st.integers(1, 60),
    counted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(num_images, num_tokens, share, width, num_features, neighbors, counted, dtype, layout):
    num_targets = min(num_tokens, 5, 1 + int(share * num_tokens))
    arguments = merge_inputs(num_images, num_tokens, num_targets, width, num_features, dtype, layout)
    counts = torch.tensor([int(share * num_targets), num_targets][:num_images], device=DEVICE) if counted else None
    check(*arguments, "triton", neighbors, counts)


def test_launcher_never_reads_outside_its_input():
    from vtc_kernels.merge_neighbors import merge_neighbors

    x, key, _, weight = merge_inputs(2, 9, 3, 4, 5)
    targets = torch.tensor([[-1, 3, 9], [8, 10**12, 0]], device=DEVICE)
    counts = torch.tensor([3, 10**9], device=DEVICE)
    features, mix = merge_neighbors(x, key, targets, weight, neighbors=3, counts=counts)
    assert features.isfinite().all()
    assert mix[0, 1, 3] == mix[1, 0, 8] == mix[1, 2, 0] == 1
    assert (mix[0, 0] < 1.5).all()
    extra = weight.clone()
    extra[0, 3] = extra[1, 8] = extra[1, 0] = 0
    assert torch.equal(mix[:, 3], extra)


def test_the_kernel_counts_up_to_2_to_the_21():
    x, targets = (
        torch.zeros(1, 1, 1, device=DEVICE).expand(1, 2**21, 1),
        torch.zeros(1, 1, dtype=torch.int64, device=DEVICE),
    )
    with pytest.raises(ValueError, match=r"merge_neighbors: .* at most N = 2097151 tokens .*got 2097152"):
        ops.merge_neighbors(x, x, targets, x[:, :, 0], neighbors=2, backend="triton")

"""maxmin: the kernel and the reference against a slow greedy of Python floats, the sequence of choices included."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import BACKENDS, DEVICE, LAYOUTS, count_launches, guarded_empty, in_layout, property_test, reserves

from vtc import ops, reference, tiny
from vtc.tiny.scenes import balanced_questions

# NumPy's word in the interpreter on the maximum of nothing but NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")


def cosines(num_images, num_tokens, num_features=8, seed=0):
    """Similarities of random tokens; symmetric to the bit."""
    generator = torch.Generator().manual_seed(seed + num_tokens)
    x = torch.nn.functional.normalize(torch.randn(num_images, num_tokens, num_features, generator=generator), dim=2)
    similarity = x @ x.mT
    return torch.minimum(similarity, similarity.mT).to(DEVICE)


def slow_greedy(similarity, k, allowed=None):
    """One image, in Python floats: the token that is least like those chosen, again and again."""
    rows = [[-math.inf if math.isnan(value) else value for value in row] for row in similarity.tolist()]
    tokens = range(len(rows))
    may = [True] * len(rows) if allowed is None else allowed.tolist()
    order = []
    for _ in range(k):
        best = None
        for n in tokens:
            others = order or [m for m in tokens if m != n and may[m]]
            worst = max((rows[m][n] for m in others), default=-math.inf)
            rank = (False, worst) if may[n] else (True, 0.0)
            if n not in order and (best is None or rank < best[0]):
                best = rank, n
        order.append(best[1])
    return order


def check(similarity, k, backend="triton", allowed=None, counts=None):
    with guarded_empty():
        indices, order = ops.maxmin(similarity, k, allowed=allowed, counts=counts, backend=backend)
    assert indices.shape == order.shape == (len(similarity), k)
    assert indices.dtype == order.dtype == torch.int64
    for b, image in enumerate(similarity):
        count = k if counts is None else int(counts[b])
        expected = slow_greedy(image, count, None if allowed is None else allowed[b])
        left = [0] * (k - count)
        assert order[b].tolist() == expected + left
        assert indices[b].tolist() == sorted(expected) + left
    return order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (2, 1), (2, 2), (5, 5), (16, 9), (33, 33), (129, 40)])
def test_the_sequence_is_that_of_a_slow_greedy(num_tokens, k, backend):
    check(cosines(3, num_tokens), k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_choice_in_float64_is_the_same(backend):
    """Where no two distances are equal up to rounding, fp32 chooses as the oracle does."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 60, 32, generator=generator, dtype=torch.float64)
    unit = x / x.norm(dim=2, keepdim=True)
    exact = unit @ unit.mT
    order = check(exact.float().to(DEVICE), 20, backend)
    assert order.tolist() == [slow_greedy(image, 20) for image in exact]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_token(backend):
    assert check(torch.ones(2, 9, 9, device=DEVICE), 9, backend).tolist() == [[*range(9)]] * 2
    signs = torch.tensor([0.0, -0.0], device=DEVICE).repeat(3)
    zeros = torch.minimum(signs[:, None], signs).expand(1, -1, -1)  # -0.0 equals 0.0
    assert check(zeros, 6, backend).tolist() == [[*range(6)]]
    few_values = (cosines(3, 40) * 2).round() / 2
    assert few_values.unique().numel() < 6
    check(few_values, 40, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_of_a_token_comes_last(backend):
    """Six directions, each twice: no second one before all are there."""
    directions = torch.eye(6).repeat(2, 1)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    order = check((directions @ directions.T).expand(2, -1, -1).to(DEVICE), 12, backend)
    for image in order:
        assert len({int(directions[n].argmax()) for n in image[:6]}) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_zeros(backend):
    similarity = cosines(2, 20).abs()
    similarity[:, 4] = similarity[:, :, 4] = 0.0
    similarity[:, 11] = similarity[:, :, 11] = 0.0
    order = check(similarity, 20, backend)
    assert order[:, 0].tolist() == [4, 4]  # and to it, all have the same similarity
    assert order[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_similarities_that_are_not_finite(value, backend):
    similarity = cosines(2, 17)
    similarity[0, 3, 8] = similarity[0, 8, 3] = value
    similarity[1, 5] = similarity[1, :, 5] = value
    check(similarity, 17, backend)
    check(similarity, 17, backend, allowed=torch.arange(34, device=DEVICE).view(2, 17) % 3 > 0)
    check(torch.full((1, 5, 5), value, device=DEVICE), 5, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_read_for_its_token(backend):
    """Of a matrix that is not symmetric, too, all backends read the same."""
    similarity = torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    check(similarity, 30, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_are_not_allowed_come_last_and_in_order(backend):
    similarity = cosines(4, 21)
    allowed = torch.rand(4, 21, generator=torch.Generator().manual_seed(3)).to(DEVICE) > 0.6
    allowed[2], allowed[3] = False, True
    order = check(similarity, 21, backend, allowed)
    assert order[2].tolist() == [*range(21)]
    for image, may in zip(order, allowed, strict=True):
        count = int(may.sum())
        assert may[image[:count]].all()
        assert image[count:].tolist() == sorted(image[count:].tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forbidden_token_does_not_decide_which_is_first(backend):
    """Token 2 is most like token 0, but may not be chosen; without it, token 0 is farthest from the others."""
    similarity = torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]], device=DEVICE)[None]
    allowed = torch.tensor([[True, True, False]], device=DEVICE)
    assert check(similarity, 3, backend)[0, 0] == 1
    assert check(similarity, 3, backend, allowed)[0, 0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_the_beginning_of_the_same_sequence(backend):
    similarity = cosines(4, 25)
    counts = torch.tensor([1, 12, 7, 2], device=DEVICE)
    order = check(similarity, 12, backend, counts=counts)
    whole = check(similarity, 12, backend)
    for b, count in enumerate(counts):
        assert torch.equal(order[b, :count], whole[b, :count])


def test_counts_that_a_gpu_cannot_check_write_nowhere_else():
    counts = torch.tensor([-3, 0, 99], device=DEVICE)
    with guarded_empty():
        indices, order = ops.dispatch._triton().launchers["maxmin"](cosines(3, 9), 4, counts=counts)
    for actual, expected in zip((indices, order), reference.maxmin(cosines(3, 9), 4, counts=counts), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tokens first"])
def test_strides(layout, backend):
    similarity = torch.rand(3, 19, 19, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    allowed = (torch.rand(3, 19, generator=torch.Generator().manual_seed(6)) > 0.3).to(DEVICE)
    counts = torch.tensor([19, 0, 5, 0, 9, 0], device=DEVICE)[::2]
    check(in_layout(similarity, layout), 19, backend, in_layout(allowed, layout), counts)
    check(similarity[:1].expand(3, -1, -1), 19, backend, allowed[:1].expand(3, -1), counts[:1].expand(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_alone_in_a_batch_and_again(backend):
    similarity = cosines(5, 50)
    batch = ops.maxmin(similarity, 30, backend=backend)
    for one, other in zip(batch, ops.maxmin(similarity, 30, backend=backend), strict=True):
        assert torch.equal(one, other)
    for b in range(5):
        for one, other in zip(batch, ops.maxmin(similarity[b : b + 1], 30, backend=backend), strict=True):
            assert torch.equal(one[b : b + 1], other)


def test_permuted_tokens_are_chosen_in_the_same_order():
    similarity = cosines(1, 40, num_features=16)
    assert similarity.unique().numel() > 700  # no ties
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    _, order = ops.maxmin(similarity, 40)
    _, permuted = ops.maxmin(similarity[:, permutation][:, :, permutation], 40)
    assert torch.equal(permutation[permuted], order)


@functools.cache
def real_similarity():
    """Of the bundled model's projected tokens, for three of its images."""
    model, processor = tiny.load()
    images = [scene.image for scene, _ in balanced_questions("test", 3)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixels, return_dict=True).pooler_output
    tokens = torch.nn.functional.normalize(torch.stack(list(features)), dim=2)
    return (tokens @ tokens.mT).to(DEVICE)


def test_features_of_the_bundled_model():
    similarity = real_similarity()
    assert similarity.shape == (3, 576, 576)
    expected = reference.maxmin(similarity, 64)
    for one, other in zip(ops.maxmin(similarity, 64, backend="triton"), expected, strict=True):
        assert torch.equal(one, other)
    assert expected[1][0, :6].tolist() == slow_greedy(similarity[0], 6)


@pytest.mark.parametrize("num_tokens", [1025, 4096])
def test_long_rows(num_tokens):
    similarity = cosines(1, num_tokens)
    allowed = (torch.rand(1, num_tokens, generator=torch.Generator().manual_seed(8)) > 0.1).to(DEVICE)
    actual = ops.maxmin(similarity, 5, allowed=allowed, backend="triton")
    for one, other in zip(actual, reference.maxmin(similarity, 5, allowed=allowed), strict=True):
        assert torch.equal(one, other)


def test_one_launch_for_a_batch(monkeypatch):
    launches = count_launches(monkeypatch, "maxmin")
    ops.maxmin(cosines(3, 12), 12, counts=torch.tensor([3, 12, 1], device=DEVICE), backend="triton")
    assert launches == [1]


@reserves(9)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_int32(axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step, size = 2**30, 3
    memory = torch.empty(2 * step + 64, dtype=torch.float32, device=DEVICE)
    strides = [9, 3, 1]
    strides[axis] = step
    similarity = memory.as_strided((3 if axis == 0 else 1, size, size), strides)
    similarity.copy_(cosines(len(similarity), size))
    check(similarity, size)


@property_test
@given(
    num_images=st.integers(1, 3),
    num_tokens=st.integers(1, 40),
    num_values=st.integers(1, 9),
    share=st.floats(0, 1),
    layout=st.sampled_from(["contiguous", "slice", "transposed", "every other"]),
    data=st.data(),
)
def test_any_matrix(num_images, num_tokens, num_values, share, layout, data):
    generator = torch.Generator().manual_seed(num_tokens)
    values = torch.randint(0, num_values, (num_images, num_tokens, num_tokens), generator=generator) / num_values
    allowed = torch.rand(num_images, num_tokens, generator=generator) >= share
    k = data.draw(st.integers(1, num_tokens))
    counts = torch.randint(1, k + 1, (num_images,), generator=generator)
    check(in_layout((values - 0.5).to(DEVICE), layout), k, "triton", allowed.to(DEVICE), counts.to(DEVICE))


def test_more_columns_than_the_kernel_takes():
    many = torch.rand(1, 4097, 4097, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    with pytest.raises(ValueError, match=r"at most N = 4096 .* got 4097. Use backend='torch'"):
        ops.maxmin(many, 2, backend="triton")
    with guarded_empty():
        assert ops.maxmin(many, 2, backend="torch")[0].shape == (1, 2)

"""coverage: the same choices, in the same order, from the kernel, the CPU's lazy evaluation and the eager reference."""

import functools
import itertools
import math

import pytest
import torch
from support.kernels import BACKENDS, DEVICE, LAYOUTS, guarded_empty, in_layout, reserves

from vtc import ops, reference, tiny

INF, NAN = float("inf"), float("nan")


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(cover, k, backends=BACKENDS, **kwargs):
    """All backends choose what the eager reference does; returns the order."""
    kwargs = {name: None if value is None else value.to(DEVICE) for name, value in kwargs.items()}
    cover = cover.to(DEVICE)
    indices, order = reference.coverage(cover, k, **kwargs)
    for backend in backends:
        with guarded_empty():
            actual = ops.coverage(cover, k, backend=backend, **kwargs)
        for one, other in zip(actual, (indices, order), strict=True):
            assert one.dtype == torch.int64
            assert one.is_contiguous()
            assert torch.equal(one, other)
    return order.cpu()


def slow(cover, k, weight=None, allowed=None):
    """One image in Python's numbers: the order of the choices. Exact where all sums are."""
    num_rows, num_columns = len(cover), len(cover[0])
    weight = weight or [1.0] * num_columns
    allowed = allowed or [True] * num_columns
    covered, order = [0.0] * num_rows, []
    for _ in range(k):
        best, best_rank = None, None
        for n in range(num_columns):
            if n in order:
                continue
            added = 0.0
            for row, before in zip(cover, covered, strict=True):
                if row[n] > before:
                    added += row[n] - before
            rank = (1, added * weight[n] if weight[n] > 0 else 0.0) if allowed[n] else (0, 0.0)
            if best is None or rank > best_rank:
                best, best_rank = n, rank
        order.append(best)
        covered = [max(before, row[best]) for row, before in zip(cover, covered, strict=True)]
    return order


@pytest.mark.parametrize("seed", range(4))
def test_the_sequence_is_that_of_a_slow_greedy(seed):
    """Multiples of 1/8: every sum is exact, and many tie."""
    num_rows, num_columns = 5 + seed, 12 - seed
    cover = (randn(1, num_rows, num_columns, seed=seed) * 8).round() / 8
    weight = (rand(1, num_columns, seed=seed + 9) * 4).round() / 4
    allowed = rand(1, num_columns, seed=seed) > 0.3
    for given in ({}, {"weight": weight}, {"weight": weight, "allowed": allowed}):
        order = check(cover, num_columns, **given)
        lists = {name: value[0].tolist() for name, value in given.items()}
        assert order[0].tolist() == slow(cover[0].tolist(), num_columns, **lists)


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "k"),
    [(1, 1, 1), (3, 5, 5), (16, 16, 4), (40, 37, 12), (129, 70, 6), (1024, 17, 4), (1025, 17, 4), (2500, 33, 5)],
)
def test_shapes_that_hurt(num_rows, num_columns, k):
    check(randn(2, num_rows, num_columns), k)
    check(rand(1, num_rows, num_columns), k)


def test_many_columns():
    check(rand(1, 2, 4096), 2, ("triton",))
    check(rand(1, 2, 2000), 9, ("torch",))
    check(rand(1, 2, 129), 129)


@functools.cache
def features():
    """What the bundled model's tower gives for two scenes, [2, 576, D], and the attention of its [CLS] tokens."""
    model, processor = tiny.load(attn_implementation="eager")
    images = [tiny.scenes.Scene("test", number).image for number in range(2)]
    inputs = processor(images=images, text=[tiny.prompt("what is it ?")] * 2, return_tensors="pt")
    with torch.no_grad():
        out = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    return out.hidden_states[-2][:, 1:], out.attentions[-2][:, :, 0, 1:].sum(dim=1)


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_real_features(temperature, weighted):
    hidden, attention = features()
    cover = reference.similarity(hidden, hidden, temperature=temperature)
    check(cover, 64, ("torch",), weight=attention if weighted else None)
    check(cover[:1], 3, ("triton",), weight=attention[:1] if weighted else None)


ADVERSARIAL = {
    "all equal": torch.full((2, 9, 21), 0.3),
    "one-hot rows": torch.eye(20).expand(2, 20, 20),
    "negative": -rand(2, 9, 21),
    "mixed": randn(2, 9, 21),
    "columns of zeros": rand(2, 9, 21) * (torch.arange(21) % 3 > 0),
    "rows of zeros": rand(2, 9, 21) * (torch.arange(9)[:, None] % 2),
    "duplicates": rand(2, 9, 7).repeat(1, 1, 3),
    "near ties": 0.5 + rand(2, 900, 9).repeat(1, 1, 3) * 1e-7,
    "subnormal": rand(2, 9, 21) * 1e-40,
    "huge": rand(2, 9, 21) * 3e38,
    "NaN": torch.where(rand(2, 9, 21) > 0.3, rand(2, 9, 21, seed=1), NAN),
    "all NaN": torch.full((2, 9, 21), NAN),
    "infinities": torch.where(rand(2, 9, 21) > 0.3, rand(2, 9, 21, seed=1), torch.tensor([INF, -INF, INF]).repeat(7)),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs(name):
    order = check(ADVERSARIAL[name], 20)
    if name in ("all equal", "one-hot rows", "negative", "all NaN"):
        assert order.tolist() == [list(range(20))] * 2


@pytest.mark.parametrize("name", ["mixed", "one-hot rows", "duplicates", "infinities", "huge"])
def test_weights(name):
    cover = ADVERSARIAL[name]
    weight = rand(2, cover.shape[2], seed=5)
    weight[:, ::7] = torch.tensor([0.0, NAN, -1.0])[: weight[:, ::7].shape[1]].repeat(2, 1)
    weight[:, 4] = INF
    order = check(cover, cover.shape[2], weight=weight)
    check(cover, 7, weight=torch.full_like(weight, 2.0**-140))
    assert not torch.equal(order, check(cover, cover.shape[2]))


def test_an_infinite_weight_of_a_column_that_adds_nothing():
    cover = torch.tensor([[[0.0, 1.0, 0.0, 0.5]]])
    assert check(cover, 4, weight=torch.tensor([[1.0, 1.0, INF, INF]])).tolist() == [[3, 1, 0, 2]]


def test_a_weight_times_a_constant_changes_nothing():
    cover, weight = rand(2, 9, 21), rand(2, 21, seed=1)
    assert torch.equal(check(cover, 9, weight=weight), check(cover, 9, weight=4 * weight))


def test_columns_that_are_not_allowed_come_last():
    cover = rand(3, 9, 21)
    allowed = torch.zeros(3, 21, dtype=torch.bool)
    allowed[0, [3, 20, 7]] = True
    allowed[1] = True
    order = check(cover, 6, allowed=allowed, weight=rand(3, 21))
    assert sorted(order[0, :3].tolist()) == [3, 7, 20]
    assert order[0, 3:].tolist() == [0, 1, 2]
    assert order[2].tolist() == [0, 1, 2, 3, 4, 5]
    counted = check(cover, 21, allowed=allowed, weight=rand(3, 21), counts=torch.tensor([2, 21, 4]))
    assert torch.equal(counted[0, :2], order[0, :2])


def test_counts():
    cover = rand(4, 30, 40)
    whole = check(cover, 8)
    counts = torch.tensor([8, 1, 3, 5])
    order = check(cover, 8, counts=counts)
    for image, count in enumerate(counts.tolist()):
        assert torch.equal(order[image, :count], whole[image, :count])
        assert not order[image, count:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    weight, allowed = in_layout(rand(2, 20), layout), in_layout(rand(2, 20) > 0.2, layout)
    counts = torch.tensor([[5, 0], [3, 0]])[:, 0]
    check(in_layout(rand(2, 30, 20), layout), 5, weight=weight, allowed=allowed, counts=counts)
    check(rand(2, 30, 20), 5, weight=weight, allowed=allowed, counts=counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alone_in_a_batch_and_again(backend):
    cover, weight = randn(3, 30, 40).to(DEVICE), rand(3, 40).to(DEVICE)
    batch = ops.coverage(cover, 9, weight=weight, backend=backend)
    again = ops.coverage(cover, 9, weight=weight, backend=backend)
    for n in range(3):
        alone = ops.coverage(cover[n : n + 1], 9, weight=weight[n : n + 1], backend=backend)
        for one, two, three in zip(batch, again, alone, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one[n : n + 1], three)


def test_gains_of_the_chosen_never_rise_and_all_are_chosen():
    cover = randn(1, 30, 20)
    (order,) = check(cover, 20).tolist()
    assert sorted(order) == list(range(20))
    best = [cover[0][:, order[:n]].clamp(min=0).amax(dim=1).double().sum().item() if n else 0.0 for n in range(21)]
    gains = [after - before for before, after in itertools.pairwise(best)]
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(gains))


def test_the_choice_covers_at_least_1_minus_1_over_e_of_the_best():
    cover = rand(1, 8, 9, seed=3) ** 4
    (order,) = check(cover, 3).tolist()

    def covered(columns):
        return cover[0][:, list(columns)].amax(dim=1).sum().item()

    best = max(covered(columns) for columns in itertools.combinations(range(9), 3))
    assert covered(order) >= (1 - 1 / math.e) * best


def test_permuted_columns_and_rows():
    cover = rand(1, 30, 40)
    columns = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    order = check(cover, 9)
    assert torch.equal(columns[check(cover[:, :, columns], 9)], order)


@reserves(9)
@pytest.mark.parametrize("stride", [(2**30, 1, 30), (200, 1, 2**28), (200, 2**29, 1)])
def test_offsets_beyond_int32(stride):
    """Elements far apart in memory that is reserved but, apart from these elements, never touched."""
    values = rand(3, 5, 9)
    last = sum(step * (size - 1) for step, size in zip(stride, values.shape, strict=True))
    memory = torch.empty(last + 1, dtype=torch.float32, device=DEVICE)
    cover = memory.as_strided(values.shape, stride)
    cover.copy_(values)
    expected = reference.coverage(values, 4)
    for one, other in zip(ops.coverage(cover, 4, backend="triton"), expected, strict=True):
        assert torch.equal(one.cpu(), other)


def test_more_columns_than_the_kernel_takes():
    many = torch.rand(1, 4097, 4097, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    with pytest.raises(ValueError, match=r"at most N = 4096 .* got 4097. Use backend='torch'"):
        ops.coverage(many, 2, backend="triton")
    with guarded_empty():
        assert ops.coverage(many, 2, backend="torch")[0].shape == (1, 2)

"""Each operation: the kernel against the reference, and arguments that do not fit."""

import importlib

import pytest
import torch

B, H, N, D, K = 2, 3, 50, 16, 7


def of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def indices():
    return torch.stack([torch.arange(3, 3 + K), torch.arange(0, 5 * K, 5)])


# The arguments of one call.
CALLS = {
    "cls_attention": lambda: ((of(B, H, N, D), of(B, H, N, D, seed=1), of(B, H, N, D, seed=2)), {}),
    "cls_probs": lambda: (([of(B, H, D), of(B, H, D, seed=1)], [of(B, H, N, D, seed=2)] * 2), {"skip": 1}),
    "row_scores": lambda: ((of(B, H, D), of(B, H, N, D, seed=1)), {"skip": 1}),
    "topk": lambda: ((of(B, N), K), {}),
    "compact": lambda: ((of(B, N, D), indices()), {}),
    "select": lambda: ((of(2, B, H, N), of(B, N, D, seed=1), K), {}),
    "compact_kv": lambda: (([of(B, H, N, D)], [of(B, H, N, D, seed=1)], indices()), {}),
    "merge_neighbors": lambda: ((of(B, N, D), of(B, N, D, seed=1), indices(), of(B, N).abs()), {"neighbors": 4}),
    "merge_nearest": lambda: ((of(B, N, D), of(B, N, D, seed=1), indices(), of(B, N).abs()), {}),
    "maxmin": lambda: ((of(B, N, N), K), {}),
    "received": lambda: ((of(B, H, N, D), of(B, H, N, D, seed=1)), {"skip": 1}),
    "similarity": lambda: ((of(B, N, D), of(B, K, D, seed=1)), {"temperature": 0.2}),
    "coverage": lambda: ((of(B, N, N), K), {"weight": of(B, N, seed=1)}),
}
# The arguments, by their place, whose elements are copied: they may be of any type.
COPIED = {("compact", 0), ("compact_kv", 0), ("compact_kv", 1), ("select", 1)}


def each(value, change):
    """A value with `change` made to its tensors."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(each(one, change) for one in value)
    if isinstance(value, dict):
        return {name: each(one, change) for name, one in value.items()}
    return value


def call(package, op, device, backend):
    given, named = each(CALLS[op](), lambda tensor: tensor.to(device))
    return getattr(package, op)(*given, **named, backend=backend)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [tensor for one in value for tensor in flat(one)]


def test_every_operation_has_a_call(package):
    missing = set(package.OPS) - set(CALLS)
    assert not missing, f"add the arguments of one call of {', '.join(sorted(missing))}"
    assert set(package.OPS) <= set(package.__all__)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("op", CALLS)
def test_the_kernel_computes_what_the_reference_does(package, device, op):
    expected = flat(call(package, op, device, "torch"))
    computed = flat(call(package, op, device, "triton"))
    for one, other in zip(computed, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", CALLS)
def test_tensors_that_do_not_fit_are_refused(package, device, op, backend):
    """A tensor with an axis more, of complex numbers, or on another device than the rest: each argument in turn."""
    given, named = each(CALLS[op](), lambda tensor: tensor.to(device))
    for place, value in enumerate(given):
        if not isinstance(value, (torch.Tensor, list)):
            continue
        alone = sum(isinstance(one, (torch.Tensor, list)) for one in given) == 1
        changes = [
            lambda x: x[None, None, None],
            None if (op, place) in COPIED else lambda x: x.to(torch.complex64),
            None if alone else lambda x: x.to("meta"),
        ]
        for change in filter(None, changes):
            wrong = [*given[:place], each(value, change), *given[place + 1 :]]
            with pytest.raises(ValueError, match=rf"^{op}: "):
                getattr(package, op)(*wrong, **named, backend=backend)


@pytest.mark.parametrize(
    ("op", "arguments", "says"),
    [
        ("topk", (torch.zeros(1, 4), 5), "k must be an int with 1 <= k <= N = 4"),
        ("compact", (torch.zeros(1, 4, 2), torch.tensor([[4]])), r"indices must lie in \[0, N\)"),
        ("row_scores", (torch.zeros(1, 3, 2), torch.zeros(1, 2, 4, 2)), "a multiple of key heads"),
    ],
)
def test_values_that_do_not_fit_are_refused(package, op, arguments, says):
    with pytest.raises(ValueError, match=f"^{op}: .*{says}"):
        getattr(package, op)(*arguments)


def test_tokens_have_a_gradient(package, device):
    x = of(B, N, D).to(device).requires_grad_()
    package.compact(x, indices().to(device), backend="triton").sum().backward()
    assert x.grad.sum() == B * K * D


def test_two_versions_stand_side_by_side(package, another, device):
    for op in CALLS:
        computed = [flat(call(version, op, device, "triton")) for version in (package, another)]
        assert all(torch.equal(one, other) for one, other in zip(*computed, strict=True))
    names = [importlib.import_module(f"{version.__name__}.namespace").NAMESPACE for version in (package, another)]
    assert names == [package.__name__, another.__name__]
    assert not torch._C._jit_get_schemas_for_operator("vtc::topk")


def test_the_operators_can_be_traced(package, device):
    def shorten(x, scores):
        return package.compact(x, package.topk(scores, K))

    x, scores = of(B, N, D).to(device), of(B, N, seed=1).to(device)
    traced = torch.compile(shorten, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x, scores), shorten(x, scores))

"""The operators of `torch.library`: schema, fake kernel and autograd of each, and compilers that trace through."""

import pytest
import torch
from support.kernels import BACKENDS, DEVICE

from vtc import ops

QUERY, KEY, MASK = torch.randn(2, 3, 8), torch.randn(2, 3, 10, 8), torch.arange(10).expand(2, -1) > 1
SCORES, TOKENS, INDICES = torch.randn(2, 10), torch.randn(2, 10, 4), torch.tensor([[0, 9], [3, 4]])


def samples():
    """Operator and arguments: one call of each `torch.ops.vtc.*`."""
    attention = [torch.randn(2, 2, 5, 8, device=DEVICE) for _ in range(3)]
    query, key, mask = (x.to(DEVICE) for x in (QUERY, KEY, MASK))
    scores, tokens, indices = (x.to(DEVICE) for x in (SCORES, TOKENS, INDICES))
    return {
        "cls_attention": (*attention, None),
        "cls_probs": ([query, query + 1], [key, key * 2], None, 1),
        "row_scores": (query, key, None, 1, mask),
        "topk": (scores.expand(3, 2, 10), 4, "mean", scores.clone()),
        "compact": ([tokens.clone().requires_grad_(), indices.repeat(1, 5)], indices),
        "select": (scores.expand(3, 2, 10), tokens, 4, "max"),
        "compact_kv": ([key, key + 1], indices),
        "merge_neighbors": (tokens.clone().requires_grad_(), tokens.half(), indices, scores, 3, indices[:, 0] % 3),
        "merge_nearest": (tokens.clone().requires_grad_(), tokens.half(), indices, scores),
        "maxmin": (tokens @ tokens.mT, 4, mask, indices[:, 0] + 1),
        "received": (*attention[:2], None, 1, attention[2].logsumexp(dim=3), None),
        "similarity": (tokens, tokens[:, 2:], 0.2),
        "coverage": (key[:, 0].mT, 3, scores, mask, indices[:, 0] % 3 + 1),
    }


def test_every_operator_is_sampled():
    assert {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name[:5] == "vtc::"
    } == {*samples()}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", samples())
def test_operators_keep_what_they_promise(name, backend):
    """Schema (what is mutated, what aliases), fake kernel and autograd, as torch.library.opcheck has it."""
    torch.library.opcheck(getattr(torch.ops.vtc, name).default, (*samples()[name], backend))


def whole_path(query, key, value, hidden, cache):
    """Attention with scores, selection, and every copy, as one function that a compiler has to trace."""
    totals = torch.empty_like(hidden[:, :, 0])
    with torch.no_grad():
        out, probs = ops.cls_attention(query, key, value)
        layers = torch.stack([probs, ops.cls_attention(value, key, query, scale=0.5)[1]])
    scores = ops.row_scores(query[:, :, 0], key, skip=1)
    scores = scores + ops.row_scores(query[:, :, 1], key, skip=1)
    indices = ops.topk(layers[..., 1:], 3, total=totals)
    kept, positions = ops.compact([hidden, torch.arange(9, device=DEVICE).expand(2, -1)], indices)
    (short,), (copy,) = ops.compact_kv([cache], [cache], indices)
    (front,), _ = ops.compact_kv([cache + 1], [cache * 2], ops.topk(scores, 2))
    both = ops.cls_probs([query[:, :, 0]] * 2, [key, key], skip=1)
    chosen, _, sums = ops.select(both, hidden, 3, ensemble="mean")
    counts = indices[:, 0] * 0 + 2
    merged, mix = ops.merge_neighbors(hidden, hidden, indices, totals, neighbors=2, counts=counts)
    joined, _ = ops.merge_nearest(hidden, hidden, indices, totals)
    distinct, order = ops.maxmin(hidden @ hidden.mT, 3)
    bounds = torch.arange(3, device=DEVICE) * 5
    shares = ops.received(query, key, skip=1) + ops.received(query[:1], key[:1], cu_seqlens=bounds)[:, 1:]
    return (
        out,
        scores,
        totals,
        indices,
        kept.square() + merged[:, 1:] + joined + chosen,
        positions,
        short,
        copy,
        front,
        mix,
        sums,
        distinct,
        order,
        shares,
    )


@pytest.mark.filterwarnings("error:.*custom operator:UserWarning")  # outputs that alias
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on -inf minus -inf
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compilers_trace_through(backend, dynamic, monkeypatch):
    if backend == "triton" or DEVICE.type == "cuda":
        monkeypatch.setenv("VTC_BACKEND", backend)
    attention = [torch.randn(2, 3, 10, 8, device=DEVICE) for _ in range(3)]
    hidden = torch.randn(2, 9, 4, device=DEVICE, requires_grad=True)
    cache = torch.randn(2, 2, 9, 8, device=DEVICE)
    compiled = torch.compile(whole_path, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, actual = whole_path(*attention, hidden, cache), compiled(*attention, hidden, cache)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)
    (wanted,) = torch.autograd.grad(expected[4].sum(), hidden)
    assert torch.equal(torch.autograd.grad(actual[4].sum(), hidden)[0], wanted)


def test_exported_programs_hold_the_operators():
    class Select(torch.nn.Module):
        def forward(self, scores, x):
            return ops.compact(x, ops.topk(scores, 2))

    program = torch.export.export(Select(), (SCORES, TOKENS))
    assert {str(node.target) for node in program.graph.nodes if "vtc" in str(node.target)} == {
        "vtc.topk.default",
        "vtc.compact.default",
    }
    assert torch.equal(program.module()(SCORES, TOKENS), ops.compact(TOKENS, ops.topk(SCORES, 2)))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_stream_that_is_not_the_default_one():
    scores = torch.randn(64, 16384, device=DEVICE)
    expected = ops.topk(scores, 100)
    later = torch.zeros_like(scores)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a launch on another stream would see zeros
        later.copy_(scores)
        actual = ops.topk(later, 100)
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    for name, arguments in samples().items():
        moved = torch.utils._pytree.tree_map(lambda x: x.to("cuda:1") if isinstance(x, torch.Tensor) else x, arguments)
        actual = getattr(torch.ops.vtc, name)(*moved, "triton")
        for result in torch.utils._pytree.tree_leaves(actual):
            assert result.device == torch.device("cuda:1")

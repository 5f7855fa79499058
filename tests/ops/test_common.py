"""What holds for all operations: messages for arguments that do not fit, modes of autograd, empty batches, grids."""

import functools
import math
import sys

import pytest
import torch
from support.kernels import BACKENDS, DEVICE, merge_inputs

from vtc import ops
from vtc.ops import dispatch

QUERY, KEY = torch.randn(2, 3, 8), torch.randn(2, 3, 10, 8)
SCORES, TOKENS, INDICES = torch.randn(2, 10), torch.randn(2, 10, 4), torch.tensor([[0, 9], [3, 4]])
COSINES = TOKENS @ TOKENS.mT
MASK, COUNTS = torch.arange(10).expand(2, -1) > 1, torch.tensor([9, 5])


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("VTC_BACKEND", raising=False)


def merge_neighbors(x=TOKENS, key=TOKENS, targets=INDICES, weight=SCORES, neighbors=2, **kwargs):
    return ops.merge_neighbors(x, key, targets, weight, neighbors=neighbors, **kwargs)


MERGE = [
    (lambda merge: merge(TOKENS, TOKENS[:, 1:], INDICES, SCORES), r"one B and N, .*got \[2, 10, 4\] and \[2, 9, 4\]"),
    (lambda merge: merge(TOKENS, TOKENS[:, :, :0], INDICES, SCORES), r"got \[2, 10, 4\] and \[2, 10, 0\]"),
    (lambda merge: merge(TOKENS, TOKENS.double(), INDICES, SCORES), "bfloat16, got torch.float32 and torch.float64"),
    (
        lambda merge: merge(TOKENS, TOKENS, INDICES.int(), SCORES),
        r"int64 \[B, K\] with B = 2 .*got torch.int32 \[2, 2\]",
    ),
    (lambda merge: merge(TOKENS, TOKENS, INDICES[:1], SCORES), r"got torch.int64 \[1, 2\]"),
    (lambda merge: merge(TOKENS, TOKENS, INDICES[:, :0], SCORES), r"at least one target, got torch.int64 \[2, 0\]"),
    (lambda merge: merge(TOKENS, TOKENS, INDICES, SCORES[:, 1:]), r"\[B, N\] = \[2, 10\], got torch.float32 \[2, 9\]"),
    (lambda merge: merge(TOKENS, TOKENS, INDICES, SCORES.half()), "got torch.float16"),
    (lambda merge: merge(TOKENS, TOKENS, INDICES + 1, SCORES), r"targets must lie in .*got values from 1 to 10"),
    (lambda merge: merge(TOKENS, TOKENS, INDICES, SCORES.to("meta")), "one device, got x on cpu, .*weight on meta"),
]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.cls_attention(KEY[0], KEY, KEY), r"one shape, got \[3, 10, 8\] and \[2, 3, 10, 8\] and"),
        (lambda: ops.cls_attention(KEY, KEY[:, :1], KEY), "one shape, got"),
        (lambda: ops.cls_attention(KEY, KEY, KEY.half()), "one dtype of float32, float16 and bfloat16, got"),
        (lambda: ops.cls_attention(*[KEY.double()] * 3), "got torch.float64, torch.float64 and torch.float64"),
        (lambda: ops.cls_attention(*[KEY[:, :0]] * 3), r"a head, a token and 1 to 256 features, got \[2, 0, 10, 8\]"),
        (lambda: ops.cls_attention(*[torch.ones(1, 1, 2, 257)] * 3), r"1 to 256 features, got \[1, 1, 2, 257\]"),
        (lambda: ops.cls_attention(KEY, KEY, KEY, scale=float("inf")), "finite number or None, got inf"),
        (
            lambda: ops.cls_attention(KEY, KEY, KEY.to("meta")),
            "one device, got query on cpu, key on cpu, value on meta",
        ),
        (lambda: ops.cls_attention(KEY.clone().requires_grad_(), KEY, KEY), "not differentiable.*no_grad"),
        (lambda: ops.row_scores(QUERY[0], KEY), r"same B and D, got \[3, 8\] and \[2, 3, 10, 8\]"),
        (lambda: ops.row_scores(QUERY, KEY[:, :2]), r"multiple of key heads as query heads, got \[2, 3, 8\] and"),
        (lambda: ops.row_scores(QUERY, KEY, mask=MASK.int()), r"bool \[B, N\] = \[2, 10\], got torch.int32.*mask.bool"),
        (lambda: ops.row_scores(QUERY, KEY, mask=MASK[:, 1:]), r"got torch.bool \[2, 9\]"),
        (lambda: ops.row_scores(QUERY, KEY, mask=MASK.to("meta")), "mask on meta"),
        (lambda: ops.row_scores(QUERY.half(), KEY), "one floating-point dtype, got torch.float16 and torch.float32"),
        (lambda: ops.row_scores(QUERY.int(), KEY.int()), "one floating-point dtype, got torch.int32"),
        (lambda: ops.row_scores(QUERY[:, :0], KEY[:, :0]), "at least one feature and one head"),
        (lambda: ops.row_scores(QUERY, KEY, skip=10), "0 <= skip < N = 10, or no column is left; got 10"),
        (lambda: ops.row_scores(QUERY, KEY, skip=-1), "got -1"),
        (lambda: ops.row_scores(QUERY, KEY, skip=True), "got True"),
        (lambda: ops.row_scores(QUERY, KEY, scale=float("nan")), "finite number or None, got nan"),
        (lambda: ops.row_scores(QUERY, KEY.to("meta")), "one device, got query on cpu, key on meta"),
        (lambda: ops.cls_probs([QUERY], []), "one of each per layer, got 1 and 0"),
        (lambda: ops.cls_probs([], []), "got 0 and 0"),
        (lambda: ops.cls_probs([QUERY[0]], [KEY]), r"keys \[B, H, N, D\], all layers of one shape, got \[3, 8\] and"),
        (lambda: ops.cls_probs([QUERY], [KEY[:, :1]]), r"of one shape, got \[2, 3, 8\] and \[2, 1, 10, 8\]"),
        (lambda: ops.cls_probs([QUERY] * 2, [KEY, KEY[:, :, 1:]]), r"of one shape, got .*\[2, 3, 9, 8\]"),
        (lambda: ops.cls_probs([QUERY[0]], [KEY[0]]), r"of one shape, got \[3, 8\] and \[3, 10, 8\]"),
        (
            lambda: ops.cls_probs([QUERY] * 2, [KEY, KEY.half()]),
            "one floating-point dtype, got torch.float16 and torch.float",
        ),
        (lambda: ops.cls_probs([QUERY.int()], [KEY.int()]), "one floating-point dtype, got torch.int32"),
        (lambda: ops.cls_probs([QUERY[:, :0]], [KEY[:, :0]]), "at least one head and one feature"),
        (lambda: ops.cls_probs([QUERY], [KEY], skip=10), "0 <= skip < N = 10, or no column is left; got 10"),
        (lambda: ops.cls_probs([QUERY], [KEY], skip=True), "got True"),
        (lambda: ops.cls_probs([QUERY], [KEY], scale=float("nan")), "finite number or None, got nan"),
        (lambda: ops.cls_probs([QUERY] * 2, [KEY, KEY.to("meta")]), r"one device, got .*keys\[1\] on meta"),
        (lambda: ops.select(SCORES[0], TOKENS, 2), r"select: scores must be .*\[B, N\], .*got torch.float32 \[10\]"),
        (lambda: ops.select(SCORES.long(), TOKENS, 2), "got torch.int64"),
        (lambda: ops.select(SCORES, TOKENS, 11), "select: k must be .* 1 <= k <= N = 10 .*got 11"),
        (lambda: ops.select(SCORES, TOKENS, 0), "got 0"),
        (lambda: ops.select(SCORES[None], TOKENS, 2, ensemble="median"), "one of sum, mean, max, min, got 'median'"),
        (lambda: ops.select(SCORES.expand(0, 2, 10), TOKENS, 2), r"select: needs at least one layer and one head"),
        (lambda: ops.select(SCORES, TOKENS[:, 1:], 2), r"x must be \[B, N, ...\] = \[2, 10, ...\], got \[2, 9, 4\]"),
        (lambda: ops.select(SCORES, TOKENS[0], 2), r"got \[10, 4\]"),
        (lambda: ops.select(SCORES, TOKENS.to("meta"), 2), "one device, got scores on cpu, x on meta"),
        (lambda: ops.topk(SCORES[0], 2), r"floating-point \[B, N\], .*got torch.float32 \[10\]"),
        (lambda: ops.topk(SCORES.long(), 2), "got torch.int64"),
        (lambda: ops.topk(SCORES, 11), "1 <= k <= N = 10 .*got 11"),
        (lambda: ops.topk(SCORES, 0), "got 0"),
        (lambda: ops.topk(SCORES, 2.0), "got 2.0"),
        (lambda: ops.topk(SCORES, True), "got True"),
        (lambda: ops.topk(SCORES[None], 2, ensemble="median"), "one of sum, mean, max, min, got 'median'"),
        (lambda: ops.topk(SCORES.expand(0, 2, 10), 2), r"at least one layer and one head, got \[0, 2, 10\]"),
        (lambda: ops.topk(SCORES, 2, total=SCORES[:1]), r"float32 \[B, N\] = \[2, 10\], got torch.float32 \[1, 10\]"),
        (lambda: ops.topk(SCORES, 2, total=SCORES.double()), "got torch.float64"),
        (lambda: ops.compact(TOKENS[0, 0], INDICES), r"x must be \[B, N, ...\].*got \[4\]"),
        (lambda: ops.compact([TOKENS, TOKENS[:, 1:]], INDICES), r"one B and N, got \[2, 10, 4\] and \[2, 9, 4\]"),
        (lambda: ops.compact([], INDICES), "x must be"),
        (lambda: ops.compact(TOKENS, INDICES[:1]), r"\[B, K\] with B = 2, got \[1, 2\]"),
        (lambda: ops.compact(TOKENS, INDICES.int()), r"must be int64, got torch.int32. Use indices.long\(\)"),
        (lambda: ops.compact(TOKENS, INDICES + 1), r"\[0, N\) = \[0, 10\), got values from 1 to 10"),
        (lambda: ops.compact(TOKENS, INDICES - 1), "got values from -1 to 8"),
        (lambda: ops.compact(TOKENS.to("meta"), INDICES), r"one device, got indices on cpu, x\[0\] on meta"),
        (lambda: ops.compact_kv([KEY], [KEY, KEY], INDICES), "one of each per layer, got 1 and 2"),
        (lambda: ops.compact_kv([], [], INDICES), "got 0 and 0"),
        (lambda: ops.compact_kv([QUERY], [QUERY], INDICES), r"sequences of \[B, H, N, D\].*got 1 and 1: \[2, 3, 8\]"),
        (lambda: ops.compact_kv([KEY], [KEY[:, :, 1:]], INDICES), r"one N, got \[2, 3, 10, 8\] and \[2, 3, 9, 8\]"),
        (lambda: ops.compact_kv([KEY.to(torch.complex128)], [KEY], INDICES), "8 bytes, got torch.complex128"),
        (lambda: ops.compact_kv([KEY], [KEY], INDICES.int()), "must be int64, got torch.int32"),
        (lambda: ops.compact_kv([KEY], [KEY], INDICES + 1), "got values from 1 to 10"),
        (lambda: ops.compact_kv([KEY], [KEY.to("meta")], INDICES), "tensor 1 on meta"),
        (lambda: merge_neighbors(neighbors=0), "neighbors must be an int of at least 1, got 0"),
        (lambda: merge_neighbors(neighbors=2.0), "got 2.0"),
        (lambda: merge_neighbors(counts=COUNTS.int()), r"int64 \[B\] = \[2\], got torch.int32"),
        (
            lambda: merge_neighbors(counts=COUNTS - 6),
            r"counts must lie in \[0, K \+ 1\) = \[0, 3\), got values from -1 to 3",
        ),
        (lambda: ops.maxmin(COSINES[0], 2), r"similarity must be float32 \[B, R, N\] .*, got torch.float32 \[10, 10\]"),
        (lambda: ops.maxmin(COSINES.half(), 2), r"must be float32 .*, got torch.float16 .* Use similarity.float\(\)"),
        (lambda: ops.coverage(COSINES.half(), 2), r"must be float32 .*, got torch.float16 .* Use cover.float\(\)"),
        (lambda: ops.coverage(COSINES, 2, weight=SCORES.double()), r"got torch.float64 .* Use weight.float\(\)"),
        (lambda: ops.coverage(COSINES, 2, weight=SCORES[:, 1:]), r"= \[2, 10\], got torch.float32 \[2, 9\].$"),
        (lambda: ops.maxmin(COSINES[:, 1:], 2), r"similarity must be \[B, N, N\], got \[2, 9, 10\]"),
        (lambda: ops.maxmin(COSINES, 11), "1 <= k <= N = 10, got 11"),
        (lambda: ops.maxmin(COSINES, 0), "got 0"),
        (
            lambda: ops.maxmin(COSINES, 2, allowed=MASK.int()),
            r"bool .* = \[2, 10\], got torch.int32 .* Use allowed.bool\(\)",
        ),
        (lambda: ops.maxmin(COSINES, 2, counts=COUNTS.int()), r"int64 .*, got torch.int32 .* Use counts.long\(\)"),
        (lambda: ops.maxmin(COSINES, 2, counts=COUNTS[:1]), r"int64 \[B\] = \[2\], got torch.int64 \[1\]"),
        (
            lambda: ops.maxmin(COSINES, 2, counts=COUNTS),
            r"counts must lie in \[1, k\] = \[1, 2\], got values from 5 to 9",
        ),
        (lambda: ops.maxmin(COSINES, 9, counts=COUNTS - 5), "got values from 0 to 4"),
        (lambda: ops.maxmin(COSINES, 2, allowed=MASK.to("meta")), "similarity on cpu, .*allowed on meta"),
        (lambda: ops.received(KEY, KEY[:, :2]), r"of one shape, .*got \[2, 3, 10, 8\] and \[2, 2, 10, 8\]"),
        (lambda: ops.received(KEY[:, :, :0], KEY[:, :, :0]), "at least one head, token and feature, got"),
        (lambda: ops.received(KEY, KEY.half()), "one dtype, .*got torch.float32 and torch.float16"),
        (lambda: ops.received(KEY, KEY, skip=10), "0 <= skip < N = 10, got 10"),
        (lambda: ops.received(KEY, KEY, skip=True), "got True"),
        (lambda: ops.received(KEY, KEY, scale=float("inf")), "finite number or None, got inf"),
        (lambda: ops.received(KEY, KEY, scale="0.5"), r"finite number or None, got '0.5'. Use float\(scale\)"),
        (lambda: ops.received(KEY, KEY, scale=[0.5]), r"finite number or None, got \[0.5\]"),
        (lambda: ops.received(KEY, KEY, scale=True), "finite number or None, got True"),
        *(
            (
                functools.partial(ops.similarity, TOKENS, TOKENS, temperature=value),
                f"positive number or None, got {got}",
            )
            for value, got in ((0, "0"), (math.nan, "nan"), ("0.2", "'0.2'"), ([0.2], r"\[0.2\]"), (True, "True"))
        ),
        (
            lambda: ops.received(KEY, KEY, lse=KEY[..., 0].half()),
            r"float32 \[B, H, N\] = \[2, 3, 10\], got torch.float16",
        ),
        (lambda: ops.received(KEY, KEY, lse=KEY[:, :, 1:, 0]), r"got torch.float32 \[2, 3, 9\]"),
        (lambda: ops.received(KEY, KEY, cu_seqlens=COUNTS), "needs B = 1 and skip = 0, got B = 2 and skip = 0"),
        (lambda: ops.received(KEY[:1], KEY[:1], skip=1, cu_seqlens=COUNTS), "got B = 1 and skip = 1"),
        (lambda: ops.received(KEY[:1], KEY[:1], cu_seqlens=SCORES[0]), r"int64 \[S \+ 1\], got torch.float32 \[10\]"),
        (lambda: ops.received(KEY[:1], KEY[:1], cu_seqlens=COUNTS[:1]), r"got torch.int64 \[1\]"),
        (lambda: ops.received(KEY[:1], KEY[:1], cu_seqlens=COUNTS), "must ascend from 0 to N = 10, got .*9, 5.* 5"),
        (lambda: ops.received(KEY[:1], KEY[:1], cu_seqlens=torch.tensor([0, 9])), "from 0 to N = 10"),
        (lambda: ops.received(KEY[:1], KEY[:1], cu_seqlens=torch.tensor([0, 7, 6, 10])), "ascend"),
        (lambda: ops.received(KEY, KEY.to("meta")), "one device, got query on cpu, key on meta"),
        *(
            (functools.partial(call, merge), message)
            for call, message in MERGE
            for merge in (merge_neighbors, ops.merge_nearest)
        ),
    ],
)
@pytest.mark.parametrize("environment", [None, "triton"])
def test_bad_arguments_are_explained(call, message, environment, monkeypatch):
    if environment and DEVICE.type == "cpu":  # the checks come before the choice, so on both backends
        monkeypatch.setenv("VTC_BACKEND", environment)
    with pytest.raises(ValueError, match=message):
        call()


def calls(num_images=2):
    """Operation: a call of it, and the floating-point tensor that it takes first."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(num_images, *size, generator=generator).to(DEVICE)

    indices = torch.tensor([[1, 4, 6], [5, 5, 0]], device=DEVICE)[:num_images]
    key, scores = randn(2, 10, 16), torch.randn(3, num_images, 30, generator=generator).to(DEVICE)
    x, *merged = (tensor[:num_images] for tensor in merge_inputs(2, 9, 3, 4, 5))
    return {
        "cls_attention": (lambda x, backend: ops.cls_attention(x, key, key, backend=backend)[0], randn(2, 10, 16)),
        "cls_probs": (
            lambda x, backend: ops.cls_probs([x, x + 1], [key, key], skip=1, backend=backend)[0],
            randn(2, 16),
        ),
        "row_scores": (lambda x, backend: ops.row_scores(x, key, skip=1, backend=backend), randn(2, 16)),
        "topk": (lambda x, backend: ops.topk(x, 3, backend=backend), scores),
        "compact": (lambda x, backend: ops.compact(x, indices, backend=backend), randn(9, 12)),
        "select": (lambda x, backend: ops.select(x[..., 0], x, 3, backend=backend)[0], randn(9, 12)),
        "compact_kv": (lambda x, backend: ops.compact_kv([x], [x], indices, backend=backend)[0][0], key),
        "merge_neighbors": (
            lambda x, backend: ops.merge_neighbors(x, *merged, neighbors=2, backend=backend)[0],
            x,
        ),
        "merge_nearest": (lambda x, backend: ops.merge_nearest(x, *merged, backend=backend)[0], x),
        "similarity": (lambda x, backend: ops.similarity(x, x[:, 2:], temperature=0.2, backend=backend), randn(9, 12)),
        "coverage": (lambda x, backend: ops.coverage(x, 3, backend=backend)[1], randn(9, 12)),
        "maxmin": (lambda x, backend: ops.maxmin(x, 3, backend=backend)[1], randn(9, 9)),
        "received": (lambda x, backend: ops.received(x, key, skip=1, backend=backend), randn(2, 10, 16)),
    }


DIFFERENTIABLE = ("compact", "select", "merge_neighbors", "merge_nearest")


def test_every_operation_is_called():
    assert tuple(calls()) == ops.OPS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ops.OPS)
def test_modes_of_autograd(op, backend):
    call, x = calls()[op]
    expected = call(x, backend)
    wants_gradient = x.clone().requires_grad_()
    with torch.no_grad():
        result = call(wants_gradient, backend)
        assert not result.requires_grad
        assert torch.equal(result, expected)
    with torch.inference_mode():
        assert torch.equal(call(x, backend), expected)
    if op == "cls_attention":
        with pytest.raises(ValueError, match="cls_attention: not differentiable, and an input requires a gradient"):
            call(wants_gradient, backend)
        return
    result = call(wants_gradient, backend)
    assert result.requires_grad == (op in DIFFERENTIABLE)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ops.OPS)
def test_empty_batch(op, backend):
    call, x = calls()[op]
    empty, nothing = calls(num_images=0)[op]
    result = empty(nothing, backend)
    assert result.shape == (0, *call(x, backend).shape[1:])


@pytest.fixture
def grids(monkeypatch):
    """Launches are noted and not made: kernel and grid. The tensors can be on "meta", of any size."""
    noted = []

    class Played:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            noted.append((self.name, grid))
            return lambda *args, **kwargs: None

    modules = {sys.modules[launcher.__module__] for launcher in dispatch._triton().launchers.values()}
    for module in {*modules, sys.modules["vtc_kernels.similarity"]}:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Played(name))
    return noted


@pytest.mark.parametrize(
    ("num_images", "num_heads", "num_tokens", "num_features"),
    [(70_000, 2, 600, 64), (2048, 32, 600, 128), (1, 70_000, 9, 16), (1, 1, 2**21 - 1, 4096), (1, 4096, 2**18, 1)],
)
def test_no_axis_of_a_grid_grows_beyond_its_limit(num_images, num_heads, num_tokens, num_features, grids):
    """CUDA takes 2^31 - 1 blocks along the first axis of a grid and 65,535 along the others."""
    launch = dispatch._triton().launchers

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    cache = [empty(num_images, num_heads, num_tokens, num_features, dtype=torch.float16) for _ in range(64)]
    hidden, scores = empty(num_images, num_tokens, num_features), empty(num_images, num_tokens)
    indices = empty(num_images, 4, dtype=torch.int64)
    if num_features <= 256:
        launch["cls_attention"](*cache[:3])
    launch["row_scores"](cache[0][:, :, 0], cache[0])
    launch["cls_probs"]([cache[0][:, :, 0]] * 3, cache[:3])
    launch["select"](scores[:, :600], hidden[:, :600], 4)
    launch["topk"](scores, 4)
    launch["compact"]([hidden, scores], indices)
    launch["compact_kv"](cache[:32], cache[32:], indices)
    launch["merge_nearest"](hidden, hidden, indices, scores)
    launch["merge_neighbors"](hidden, hidden, indices, scores, neighbors=2)
    launch["maxmin"](scores[:, :600, None].expand(-1, -1, min(600, num_tokens)), 4)
    launch["received"](*cache[:2])
    launch["similarity"](hidden[:, :600], hidden, temperature=0.2)
    launch["coverage"](scores[:, :600, None].expand(-1, -1, min(600, num_tokens)), 4)
    assert len({name for name, _ in grids}) == 19 - (num_features > 256)
    for name, grid in grids:
        assert grid[0] < 2**31, name
        assert all(blocks <= 65_535 for blocks in grid[1:]), f"{name}{grid}"

"""vtc.ops: the choice of a backend, and what is said about arguments that do not fit."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import kernels as kernel_helpers
from support.kernels import BACKENDS, DEVICE

from vtc import ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUERY, KEY = torch.randn(2, 3, 8), torch.randn(2, 3, 10, 8)
SCORES, ROWS, INDICES = torch.randn(2, 10), torch.randn(2, 10, 4), torch.tensor([[0, 9], [3, 4]])
MASK, POSITION = torch.arange(10).expand(2, -1) > 1, torch.tensor([9, 5])


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("VTC_BACKEND", raising=False)


@pytest.fixture
def compiled(monkeypatch):
    """As if the kernels had been imported without TRITON_INTERPRET=1."""
    monkeypatch.setattr(ops, "_triton", lambda: ops._Triton({}, False, ""))


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "vtc_kernels", None)
    ops._triton.cache_clear()
    yield
    ops._triton.cache_clear()


@pytest.mark.parametrize("op", ops.OPS)
def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(op):
    assert ops.backend_for(op, CUDA) == ("triton", "tensors on cuda")
    choice, reason = ops.backend_for(op, CPU)
    assert choice == "torch"
    assert "tensors on cpu" in reason


def test_fused_attention_is_taken_where_it_was_measured(monkeypatch):
    assert not ops.fused_is_faster(CUDA, torch.float16, 80) or ops.FUSED
    monkeypatch.setattr(ops, "FUSED", frozenset({((9, 0), torch.float16, 64)}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ops.fused_is_faster(CUDA, torch.float16, 64)
    assert not ops.fused_is_faster(CUDA, torch.float16, 80)
    assert not ops.fused_is_faster(CUDA, torch.bfloat16, 64)
    assert not ops.fused_is_faster(CUDA, torch.float16, 64, "torch")
    assert not ops.fused_is_faster(CPU, torch.float16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not ops.fused_is_faster(CUDA, torch.float16, 64)


def test_asking_for_a_backend():
    assert ops.backend_for("topk", CUDA, "torch") == ("torch", "backend='torch'")
    assert ops.backend_for("topk", CUDA, "triton") == ("triton", "backend='triton'")


def test_the_environment_replaces_auto_and_nothing_else(monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "torch")
    assert ops.backend_for("topk", CUDA) == ("torch", "VTC_BACKEND=torch")
    assert ops.backend_for("topk", CUDA, "triton")[0] == "triton"
    monkeypatch.setenv("VTC_BACKEND", "auto")
    assert ops.backend_for("topk", CUDA)[0] == "triton"
    monkeypatch.setenv("VTC_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"VTC_BACKEND must be one of auto, triton, torch, or unset; got 'cuda'"):
        ops.topk(SCORES, 2)
    assert ops.backend_for("topk", CPU, "torch")[0] == "torch"


@pytest.mark.usefixtures("compiled")
def test_triton_without_a_gpu_explains_itself(monkeypatch):
    with pytest.raises(
        ValueError, match=r"backend='triton' needs CUDA tensors, got tensors on cpu.*TRITON_INTERPRET=1"
    ):
        ops.compact(ROWS, INDICES, backend="triton")
    monkeypatch.setenv("VTC_BACKEND", "triton")
    with pytest.raises(ValueError, match="VTC_BACKEND=triton needs CUDA tensors"):
        ops.compact(ROWS, INDICES)


def test_triton_in_the_interpreter_says_so():
    if DEVICE.type == "cuda":
        pytest.skip("the kernels are compiled here")
    assert ops.backend_for("topk", CPU, "triton") == ("triton", "backend='triton', in Triton's interpreter")


@pytest.mark.usefixtures("without_triton")
def test_without_triton():
    choice, reason = ops.backend_for("topk", CUDA)
    assert choice == "torch"
    assert "cannot be imported" in reason
    assert torch.equal(ops.topk(SCORES, 10), torch.arange(10).expand(2, -1))
    with pytest.raises(ValueError, match=r"backend='triton' cannot run, .* cannot be imported .*Install triton"):
        ops.topk(SCORES, 10, backend="triton")


def test_the_reference_needs_no_triton():
    code = "import sys, torch, vtc.ops; vtc.ops.topk(torch.ones(1, 3), 2); sys.exit('vtc_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(ops, "_announced", set())
    with caplog.at_level(logging.INFO, logger="vtc"):
        for _ in range(2):
            ops.topk(SCORES, 2)
            ops.topk(SCORES.to(DEVICE), 2, backend="triton")
            ops.compact(ROWS, INDICES)
    said = [record.getMessage() for record in caplog.records if record.name == "vtc"]
    assert len(said) == 3
    assert said[0] == "topk uses torch: tensors on cpu; the Triton kernels need a GPU"
    assert said[1].startswith("topk uses triton: backend='triton'")
    assert said[2].startswith("compact uses torch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.backend_for("sort", CPU),
            "op must be one of cls_attention, row_scores, topk, compact, compact_kv, merge, got 'sort'",
        ),
        (lambda: ops.topk(SCORES, 2, backend="cuda"), "backend must be one of auto, triton, torch, got 'cuda'"),
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
        (
            lambda: ops.cls_attention(KEY, KEY, KEY, rows=KEY[0]),
            r"float32 \[B, H, N\] = \[2, 3, 10\], got torch.float32",
        ),
        (lambda: ops.cls_attention(KEY.clone().requires_grad_(), KEY, KEY), "not differentiable.*no_grad"),
        (lambda: ops.row_scores(QUERY[0], KEY), r"same B and D, got \[3, 8\] and \[2, 3, 10, 8\]"),
        (lambda: ops.row_scores(QUERY, KEY[:, :2]), r"multiple of key heads as query heads, got \[2, 3, 8\] and"),
        (lambda: ops.row_scores(QUERY, KEY, mask=MASK.int()), r"bool \[B, N\] = \[2, 10\], got torch.int32.*mask.bool"),
        (lambda: ops.row_scores(QUERY, KEY, mask=MASK[:, 1:]), r"got torch.bool \[2, 9\]"),
        (lambda: ops.row_scores(QUERY, KEY, position=POSITION.int()), r"int64 \[B\] = \[2\], got torch.int32"),
        (lambda: ops.row_scores(QUERY, KEY, mask=MASK.to("meta")), "mask on meta"),
        (lambda: ops.row_scores(QUERY.half(), KEY), "one floating-point dtype, got torch.float16 and torch.float32"),
        (lambda: ops.row_scores(QUERY.int(), KEY.int()), "one floating-point dtype, got torch.int32"),
        (lambda: ops.row_scores(QUERY[:, :0], KEY[:, :0]), "a head at least"),
        (lambda: ops.row_scores(QUERY, KEY, skip=10), "0 <= skip < N = 10, or no column is left; got 10"),
        (lambda: ops.row_scores(QUERY, KEY, skip=-1), "got -1"),
        (lambda: ops.row_scores(QUERY, KEY, skip=True), "got True"),
        (lambda: ops.row_scores(QUERY, KEY, scale=float("nan")), "finite number or None, got nan"),
        (lambda: ops.row_scores(QUERY, KEY, skip=1, out=SCORES), r"\[2, 9\], got torch.float32 \[2, 10\]"),
        (lambda: ops.row_scores(QUERY, KEY, out=SCORES.half()), "out must be float32"),
        (lambda: ops.row_scores(QUERY, KEY.to("meta")), "one device, got query on cpu, key on meta"),
        (lambda: ops.topk(SCORES[0], 2), r"floating-point \[B, N\], .*got torch.float32 \[10\]"),
        (lambda: ops.topk(SCORES.long(), 2), "got torch.int64"),
        (lambda: ops.topk(SCORES, 11), "1 <= k <= N = 10 .*got 11"),
        (lambda: ops.topk(SCORES, 0), "got 0"),
        (lambda: ops.topk(SCORES, 2.0), "got 2.0"),
        (lambda: ops.topk(SCORES, True), "got True"),
        (lambda: ops.topk(SCORES[None], 2, ensemble="median"), "one of sum, mean, max, min, got 'median'"),
        (lambda: ops.topk(SCORES.expand(0, 2, 10), 2), r"a layer and a head at least, got \[0, 2, 10\]"),
        (lambda: ops.topk(SCORES, 2, total=SCORES[:1]), r"float32 \[B, N\] = \[2, 10\], got torch.float32 \[1, 10\]"),
        (lambda: ops.topk(SCORES, 2, total=SCORES.double()), "got torch.float64"),
        (lambda: ops.compact(ROWS[0, 0], INDICES), r"x must be \[B, N, ...\].*got \[4\]"),
        (lambda: ops.compact([ROWS, ROWS[:, 1:]], INDICES), r"one B and N, got \[2, 10, 4\] and \[2, 9, 4\]"),
        (lambda: ops.compact([], INDICES), "x must be"),
        (lambda: ops.compact(ROWS, INDICES[:1]), r"\[B, K\] with B = 2, got \[1, 2\]"),
        (lambda: ops.compact(ROWS, INDICES.int()), r"must be int64, got torch.int32. Use indices.long\(\)"),
        (lambda: ops.compact(ROWS, INDICES + 1), r"\[0, N\) = \[0, 10\), got values from 1 to 10"),
        (lambda: ops.compact(ROWS, INDICES - 1), "got values from -1 to 8"),
        (lambda: ops.compact(ROWS.to("meta"), INDICES), r"one device, got indices on cpu, x\[0\] on meta"),
        (lambda: ops.compact_kv([KEY], [KEY, KEY], INDICES), "one of each per layer, got 1 and 2"),
        (lambda: ops.compact_kv([], [], INDICES), "got 0 and 0"),
        (lambda: ops.compact_kv([QUERY], [QUERY], INDICES), r"sequences of \[B, H, N, D\].*got 1 and 1: \[2, 3, 8\]"),
        (lambda: ops.compact_kv([KEY], [KEY[:, :, 1:]], INDICES), r"one N, got \[2, 3, 10, 8\] and \[2, 3, 9, 8\]"),
        (lambda: ops.compact_kv([KEY.to(torch.complex128)], [KEY], INDICES), "8 bytes, got torch.complex128"),
        (lambda: ops.compact_kv([KEY], [KEY], INDICES.int()), "must be int64, got torch.int32"),
        (lambda: ops.compact_kv([KEY], [KEY], INDICES + 1), "got values from 1 to 10"),
        (lambda: ops.compact_kv([KEY], [KEY.clone()], INDICES.flip(1), in_place=True), "must ascend without repeats"),
        (
            lambda: ops.compact_kv([KEY], [KEY.clone()], INDICES[:, :1].expand(-1, 2), in_place=True),
            "must ascend without repeats",
        ),
        (
            lambda: ops.compact_kv([KEY], [KEY], INDICES, in_place=True),
            r"keys\[0\] and values\[0\], which share memory",
        ),
        (
            lambda: ops.compact_kv([KEY], [KEY], INDICES.expand(6, 2, 2).reshape(2, 12) * 0, in_place=True),
            "at most N = 10",
        ),
        (lambda: ops.compact_kv([KEY], [KEY.to("meta")], INDICES), "tensor 1 on meta"),
        (lambda: ops.merge(ROWS, ROWS[:, 1:], INDICES, SCORES), r"one B and N, .*got \[2, 10, 4\] and \[2, 9, 4\]"),
        (lambda: ops.merge(ROWS, ROWS[:, :, :0], INDICES, SCORES), r"got \[2, 10, 4\] and \[2, 10, 0\]"),
        (lambda: ops.merge(ROWS, ROWS.double(), INDICES, SCORES), "bfloat16, got torch.float32 and torch.float64"),
        (lambda: ops.merge(ROWS, ROWS, INDICES.int(), SCORES), r"int64 \[B, K\] with B = 2 .*got torch.int32 \[2, 2\]"),
        (lambda: ops.merge(ROWS, ROWS, INDICES[:1], SCORES), r"got torch.int64 \[1, 2\]"),
        (lambda: ops.merge(ROWS, ROWS, INDICES[:, :0], SCORES), r"a target at least, got torch.int64 \[2, 0\]"),
        (lambda: ops.merge(ROWS, ROWS, INDICES, SCORES[:, 1:]), r"\[B, N\] = \[2, 10\], got torch.float32 \[2, 9\]"),
        (lambda: ops.merge(ROWS, ROWS, INDICES, SCORES.half()), "got torch.float16"),
        (lambda: ops.merge(ROWS, ROWS, INDICES, SCORES, neighbors=0), "at least 1, or None .*got 0"),
        (lambda: ops.merge(ROWS, ROWS, INDICES, SCORES, neighbors=2.0), "got 2.0"),
        (
            lambda: ops.merge(ROWS, ROWS, INDICES, SCORES, counts=POSITION.int()),
            r"int64 \[B\] = \[2\], got torch.int32",
        ),
        (
            lambda: ops.merge(ROWS, ROWS, INDICES, SCORES, counts=POSITION - 6),
            r"counts must lie in \[0, K \+ 1\) = \[0, 3\), got values from -1 to 3",
        ),
        (lambda: ops.merge(ROWS, ROWS, INDICES + 1, SCORES), r"targets must lie in .*got values from 1 to 10"),
        (lambda: ops.merge(ROWS, ROWS, INDICES, SCORES.to("meta")), "one device, got x on cpu, .*weight on meta"),
    ],
)
@pytest.mark.parametrize("environment", [None, "triton"])
def test_bad_arguments_are_explained(call, message, environment, monkeypatch):
    if environment and DEVICE.type == "cpu":  # the checks come before the choice, so on both backends
        monkeypatch.setenv("VTC_BACKEND", environment)
    with pytest.raises(ValueError, match=message):
        call()


# --- operators of torch.library ---------------------------------------------------------------------------------------


def samples():
    """Operator and arguments: one call of each `torch.ops.vtc.*`."""
    attention = [torch.randn(2, 2, 5, 8, device=DEVICE) for _ in range(3)]
    query, key, mask, position = (x.to(DEVICE) for x in (QUERY, KEY, MASK, POSITION))
    scores, rows, indices = (x.to(DEVICE) for x in (SCORES, ROWS, INDICES))
    empty = torch.zeros(2, 2, 5, device=DEVICE)
    return {
        "cls_attention": (*attention, None),
        "cls_attention_": (*attention, 0.5, empty),
        "row_scores": (query, key, None, 1, mask, position),
        "row_scores_": (query, key, None, 1, None, None, scores[:, 1:].contiguous()),
        "topk": (scores.expand(3, 2, 10), 4, "mean", scores.clone()),
        "compact": ([rows.clone().requires_grad_(), indices.repeat(1, 5)], indices),
        "compact_kv": ([key], [key.half()], indices),
        "compact_kv_": ([key.clone()], [key.clone()], indices),
        "merge": (rows.clone().requires_grad_(), rows.half(), indices, scores, 3, indices[:, 0] % 3),
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
        out, rows = ops.cls_attention(query, key, value)
        layers = torch.stack([rows, rows.flip(2)])
        ops.cls_attention(query, key, value, rows=layers[1])
    scores = ops.row_scores(query[:, :, 0], key, skip=1)
    scores = ops.row_scores(query[:, :, 1], key, skip=1, out=scores)
    indices = ops.topk(layers[..., 1:], 3, total=totals)
    kept, positions = ops.compact([hidden, torch.arange(9, device=DEVICE).expand(2, -1)], indices)
    (short,), (copy,) = ops.compact_kv([cache], [cache], indices)
    (front,), _ = ops.compact_kv([cache + 1], [cache * 2], ops.topk(scores, 2), in_place=True)
    merged, mix = ops.merge(hidden, hidden, indices, totals, neighbors=2)
    joined, _ = ops.merge(hidden, hidden, indices, totals, counts=indices[:, 0] * 0 + 2)
    return out, scores, totals, indices, kept.square() + merged[:, 1:], positions, short, copy, front, mix, joined


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

    program = torch.export.export(Select(), (SCORES, ROWS))
    assert {str(node.target) for node in program.graph.nodes if "vtc" in str(node.target)} == {
        "vtc.topk.default",
        "vtc.compact.default",
    }
    assert torch.equal(program.module()(SCORES, ROWS), ops.compact(ROWS, ops.topk(SCORES, 2)))


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
        if name[-1] == "_":
            continue
        moved = torch.utils._pytree.tree_map(lambda x: x.to("cuda:1") if isinstance(x, torch.Tensor) else x, arguments)
        actual = getattr(torch.ops.vtc, name)(*moved, "triton")
        for result in torch.utils._pytree.tree_leaves(actual):
            assert result.device == torch.device("cuda:1")


# --- what a GPU allows ------------------------------------------------------------------------------------------------


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

    for module in {sys.modules[launcher.__module__] for launcher in ops._triton().launchers.values()}:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Played(name))
    return noted


@pytest.mark.parametrize(
    ("num_images", "num_heads", "num_tokens", "num_features"),
    [(70_000, 2, 600, 64), (2048, 32, 600, 128), (1, 70_000, 9, 16), (1, 1, 2**21 - 1, 4096), (1, 4096, 2**18, 1)],
)
def test_no_axis_of_a_grid_grows_beyond_its_limit(num_images, num_heads, num_tokens, num_features, grids):
    """CUDA takes 2^31 - 1 blocks along the first axis of a grid and 65,535 along the others."""
    launch = ops._triton().launchers

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    cache = [empty(num_images, num_heads, num_tokens, num_features, dtype=torch.float16) for _ in range(64)]
    hidden, scores = empty(num_images, num_tokens, num_features), empty(num_images, num_tokens)
    indices = empty(num_images, 4, dtype=torch.int64)
    if num_features <= 256:
        launch["cls_attention"](*cache[:3])
    launch["row_scores"](cache[0][:, :, 0], cache[0])
    launch["topk"](scores, 4)
    launch["compact"]([hidden, scores], indices)
    for in_place in (False, True):
        launch["compact_kv"](cache[:32], cache[32:], indices, in_place=in_place)
    launch["merge"](hidden, hidden, indices, scores)
    launch["merge"](hidden, hidden, indices, scores, neighbors=2)
    assert len({name for name, _ in grids}) == 11 - (num_features > 256)
    for name, grid in grids:
        assert grid[0] < 2**31, name
        assert all(blocks <= 65_535 for blocks in grid[1:]), f"{name}{grid}"


def test_memory_that_a_test_reserves_on_a_gpu_is_asked_for_and_given_back(monkeypatch):
    done = []
    free = 9 * 2**30
    monkeypatch.setattr(kernel_helpers, "DEVICE", CUDA)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("freed"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * 2**30))
    kernel_helpers.reserves(5)(lambda what: done.append(what))("ran")
    assert done == ["freed", "ran", "freed"]
    with pytest.raises(pytest.skip.Exception, match=r"needs 9 GiB of GPU memory and some more, 9.0 GiB are free"):
        kernel_helpers.reserves(9)(done.append)("never")

    def too_late():
        raise torch.OutOfMemoryError

    with pytest.raises(pytest.skip.Exception, match="which another process has taken"):
        kernel_helpers.reserves(5)(too_late)()
    assert done == ["freed", "ran", "freed", "freed", "freed", "freed"]


def test_whoever_goes_beyond_int32_says_how_much_memory_that_takes():
    found = 0
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("beyond_int32"):
                assert any(ast.unparse(decorator).startswith("reserves(") for decorator in node.decorator_list), (
                    node.name
                )
                found += 1
    assert found >= 7

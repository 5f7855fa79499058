"""compact_kv: bit for bit the kept tokens of every layer's cache."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.kernels import (
    ALL_DTYPES,
    BACKENDS,
    DEVICE,
    LAYOUTS,
    bits,
    guarded_empty,
    in_layout,
    property_test,
    random_bytes,
    reserves,
)

from vtc import ops

KV_DTYPES = [dtype for dtype in ALL_DTYPES if dtype.itemsize <= 8]


def make(num_layers, num_images, num_heads, num_tokens, num_features, dtype=torch.float16, layout="contiguous"):
    """A cache of random bytes: keys and values, one tensor each per layer."""
    generator = torch.Generator().manual_seed(num_tokens)
    size = 2 * num_layers, num_images, num_heads, num_tokens, num_features
    memory = random_bytes(*size, dtype=dtype, generator=generator)
    cache = [in_layout(tensor.to(DEVICE), layout) for tensor in memory]
    return cache[:num_layers], cache[num_layers:]


def choose(num_images, num_tokens, num_kept):
    """Ascending unique indices, other ones for each image."""
    generator = torch.Generator().manual_seed(num_kept)
    rows = [torch.randperm(num_tokens, generator=generator)[:num_kept].sort().values for _ in range(num_images)]
    return torch.stack(rows).to(DEVICE)


def expected(cache, indices):
    """Row by row, in plain Python."""
    return [
        torch.stack([image[:, kept] for image, kept in zip(x, indices.tolist(), strict=True)]) if len(x) else x
        for x in cache
    ]


def check(keys, values, indices, backend):
    with guarded_empty():
        actual = ops.compact_kv(keys, values, indices, backend=backend)
    for side, results in zip((keys, values), actual, strict=True):
        for result, wanted in zip(results, expected(side, indices), strict=True):
            assert result.dtype == wanted.dtype
            assert result.shape == wanted.shape
            assert bits(result) == bits(wanted)


# layers, B, H, N, D, K. A program moves 4096 elements at a time: K around 4096 / D.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 2, 9, 8, 4),
    (1, 1, 2, 80, 128, 33),
    (1, 2, 1, 80, 128, 79),
    (1, 1, 1, 300, 64, 200),
    (3, 1, 2, 20, 80, 20),
    (1, 1, 1, 9, 1300, 5),
    (20, 1, 1, 5, 4, 2),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_hurt(shape, backend):
    *sizes, num_kept = shape
    indices = choose(shape[1], shape[3], num_kept)
    check(*make(*sizes), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_dtypes(dtype, backend):
    indices = choose(2, 9, 5)
    check(*make(1, 2, 2, 9, 8, dtype), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    indices = in_layout(choose(2, 40, 11), layout)
    check(*make(2, 2, 3, 40, 12, layout=layout), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_differ(backend):
    keys, values = make(2, 2, 2, 20, 16)
    other_keys, other_values = make(1, 2, 3, 20, 24, torch.float32, "transposed")
    indices = choose(2, 20, 7)
    check([keys[0], *other_keys, keys[1]], [values[0], *other_values, values[1]], indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_differ_in_their_dtype_alone(backend):
    keys, values = (make(2, 2, 2, 20, 16, dtype)[0] for dtype in (torch.float16, torch.float32))
    check(keys, values, choose(2, 20, 7), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_differ_in_their_strides_alone(backend):
    keys, _ = make(2, 2, 2, 20, 16)
    _, values = make(2, 2, 2, 20, 16, layout="transposed")
    check(keys, values, choose(2, 20, 7), backend)


def test_the_launcher_takes_strides_that_differ():
    """`vtc.ops` passes tensors of equal strides, but a compiler may change strides before the operator runs."""
    from vtc_kernels import compact_kv as module

    keys, _ = make(2, 2, 2, 20, 16)
    _, values = make(2, 2, 2, 20, 16, layout="transposed")
    indices = choose(2, 20, 7)
    kept = module.compact_kv(keys, values, indices)
    for results, tensors in zip(kept, (keys, values), strict=True):
        for result, wanted in zip(results, expected(tensors, indices), strict=True):
            assert bits(result) == bits(wanted)


def test_all_layers_take_one_launch_of_few_arguments(monkeypatch):
    """Triton looks at each argument of each launch: 64 pointers to caches cost more than all else."""
    from vtc_kernels import compact_kv as module

    arguments, real = [], module._compact_kv_kernel

    class Counting:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (arguments.append(len(args)), real[grid](*args, **kwargs))

    monkeypatch.setattr(module, "_compact_kv_kernel", Counting())
    keys, values = make(32, 1, 1, 5, 4)
    check(keys, values, choose(1, 5, 2), "triton")
    assert arguments == [18]


def test_the_table_of_a_captured_graph_has_the_same_addresses():
    """A copy from the host would be repeated at every replay, from memory that must not be freed."""
    from vtc_kernels.compact_kv import _table_of_arguments

    keys, values = make(3, 2, 2, 5, 4)
    tensors = [*keys, values[0][:, :, 1:], values[1]]
    assert _table_of_arguments(tensors).tolist() == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
def test_a_captured_graph_copies_at_every_replay():
    keys, values = make(2, 1, 2, 20, 16)
    indices = choose(1, 20, 7)
    ops.compact_kv(keys, values, indices, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = ops.compact_kv(keys, values, indices, backend="triton")
    for _ in range(2):
        keys[0].normal_()
        graph.replay()
        for result, x in zip((*kept[0], *kept[1]), (*keys, *values), strict=True):
            assert torch.equal(result, x.gather(2, indices[:, None, :, None].expand(-1, 2, -1, 16)))


def test_other_bytes_than_values():
    """Conjugated and negated views are lazy: the kernel gets their values. The dispatcher sees to it for `vtc.ops`."""
    from vtc_kernels.compact_kv import compact_kv

    memory = torch.randn(2, 1, 2, 7, 3, dtype=torch.complex64, device=DEVICE)
    indices = choose(1, 7, 4)
    for x in (memory.conj(), memory.conj().imag):
        assert x.is_conj() or x.is_neg()
        for result, wanted in zip(compact_kv([x[0]], [x[1]], indices), x, strict=True):
            assert torch.equal(result[0], wanted[:, :, indices[0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_tensor_and_expanded_heads(backend):
    keys, _ = make(1, 2, 1, 9, 4)
    expanded = keys[0].expand(2, 3, 9, 4)
    check([expanded, expanded], [expanded, expanded], choose(2, 9, 5), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unsorted_and_repeated_indices(backend):
    indices = torch.tensor([[4, 0, 4], [3, 2, 1]], device=DEVICE)
    check(*make(1, 2, 2, 5, 8), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_images", "num_heads", "num_kept"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_to_copy(num_images, num_heads, num_kept, backend):
    keys, values = make(1, num_images, num_heads, 5, 4)
    indices = torch.arange(num_kept, device=DEVICE).expand(num_images, -1)
    ((key,), (value,)) = ops.compact_kv(keys, values, indices, backend=backend)
    assert key.shape == value.shape == (num_images, num_heads, num_kept, 4)


@reserves(5)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_offsets_beyond_int32(axis):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    shape, strides = [2, 2, 2, 2], [8, 4, 2, 1]
    shape[axis], strides[axis] = 5, step
    cache = [torch.empty(4 * step + 64, dtype=torch.uint8, device=DEVICE).as_strided(shape, strides) for _ in range(2)]
    for x in cache:
        x.copy_(torch.arange(x.numel(), dtype=torch.uint8, device=DEVICE).view(shape))
    indices = torch.tensor([[shape[2] - 1]] * shape[0], device=DEVICE)
    check(cache[:1], cache[1:], indices, "triton")


@property_test
@given(
    num_layers=st.integers(1, 3),
    num_images=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    num_tokens=st.integers(1, 90),
    num_features=st.integers(1, 140),
    share=st.floats(0, 1),
    dtype=st.sampled_from(KV_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
@example(1, 1, 1, 90, 128, 0.97, torch.float16, "contiguous")
def test_any_shape(num_layers, num_images, num_heads, num_tokens, num_features, share, dtype, layout):
    indices = choose(num_images, num_tokens, min(num_tokens, 1 + int(share * num_tokens)))
    cache = make(num_layers, num_images, num_heads, num_tokens, num_features, dtype, layout)
    check(*cache, indices, "triton")


def test_launcher_never_reads_outside_its_input():
    from vtc_kernels.compact_kv import compact_kv

    keys, values = make(1, 1, 1, 9, 8)
    ((actual,), _) = compact_kv(keys, values, torch.tensor([[-1, 3, 9]], device=DEVICE))
    assert bits(actual[0, 0, 0]) == bits(actual[0, 0, 2]) == [0] * 16
    assert bits(actual[0, 0, 1]) == bits(keys[0][0, 0, 3])

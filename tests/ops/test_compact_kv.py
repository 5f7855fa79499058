"""compact_kv: bit for bit the kept rows of every layer's cache, also where source and target are the same memory."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.kernels import BACKENDS, DEVICE, LAYOUTS, guarded_empty, in_layout, property_test, reserves
from test_compact import ALL_DTYPES, bits, count_launches

from vtc import ops

KV_DTYPES = [dtype for dtype in ALL_DTYPES if dtype.itemsize <= 8]


def make(num_layers, num_images, num_heads, num_tokens, num_features, dtype=torch.float16, layout="contiguous"):
    """A cache of random bytes: keys and values, one tensor each per layer."""
    generator = torch.Generator().manual_seed(num_tokens)
    size = 2 * num_layers, num_images, num_heads, num_tokens, num_features * dtype.itemsize
    memory = torch.randint(0, 2 if dtype == torch.bool else 256, size, dtype=torch.uint8, generator=generator)
    cache = [in_layout(tensor.view(dtype).to(DEVICE), layout) for tensor in memory]
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


def check_in_place(keys, values, indices, backend):
    before = [x.clone() for x in (*keys, *values)]
    wanted = [*expected(keys, indices), *expected(values, indices)]
    new_keys, new_values = ops.compact_kv(keys, values, indices, in_place=True, backend=backend)
    count = indices.shape[1]
    for x, result, old, new in zip((*keys, *values), (*new_keys, *new_values), before, wanted, strict=True):
        assert result.data_ptr() == x.data_ptr()
        assert bits(result) == bits(x[:, :, :count]) == bits(new)
        assert bits(x[:, :, count:]) == bits(old[:, :, count:])


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
    check_in_place(*make(*sizes), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_dtypes(dtype, backend):
    indices = choose(2, 9, 5)
    check(*make(1, 2, 2, 9, 8, dtype), indices, backend)
    check_in_place(*make(1, 2, 2, 9, 8, dtype), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    indices = in_layout(choose(2, 40, 11), layout)
    check(*make(2, 2, 3, 40, 12, layout=layout), indices, backend)
    check_in_place(*make(2, 2, 3, 40, 12, layout=layout), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [0, 1, 63, 100])
def test_moving_in_place_never_reads_what_it_has_overwritten(first, backend):
    """Rows that all move by the same step: nearly every row that is read is also written."""
    num_kept = 170  # in several blocks of 64 rows
    indices = torch.arange(first, first + num_kept, device=DEVICE)[None]
    check_in_place(*make(1, 1, 1, 300, 64), indices, backend)
    indices = torch.arange(num_kept, device=DEVICE)[None] + (torch.arange(num_kept, device=DEVICE) >= first)
    check_in_place(*make(1, 1, 1, 300, 64), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_static_cache_that_is_longer_than_its_contents(backend):
    keys, values = make(2, 2, 2, 60, 16)
    indices = choose(2, 33, 12)  # of 33 tokens in use
    check_in_place(keys, values, indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_differ(backend):
    keys, values = make(2, 2, 2, 20, 16)
    other_keys, other_values = make(1, 2, 3, 20, 24, torch.float32, "transposed")
    indices = choose(2, 20, 7)
    check([keys[0], *other_keys, keys[1]], [values[0], *other_values, values[1]], indices, backend)
    check_in_place([keys[0], *other_keys, keys[1]], [values[0], *other_values, values[1]], indices, backend)


@pytest.mark.parametrize("in_place", [False, True])
def test_all_layers_take_one_launch(in_place, monkeypatch):
    launches = count_launches(monkeypatch, "_compact_kv_kernel")
    keys, values = make(32, 1, 1, 5, 4)
    ops.compact_kv(keys, values, choose(1, 5, 2), in_place=in_place, backend="triton")
    assert launches == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_unsorted_and_repeated_indices_out_of_place(backend):
    indices = torch.tensor([[4, 0, 4], [3, 2, 1]], device=DEVICE)
    check(*make(1, 2, 2, 5, 8), indices, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("num_images", "num_heads", "num_kept"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_to_copy(num_images, num_heads, num_kept, in_place, backend):
    keys, values = make(1, num_images, num_heads, 5, 4)
    indices = torch.arange(num_kept, device=DEVICE).expand(num_images, -1)
    ((key,), (value,)) = ops.compact_kv(keys, values, indices, in_place=in_place, backend=backend)
    assert key.shape == value.shape == (num_images, num_heads, num_kept, 4)


@reserves(5)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_offsets_beyond_int32(axis, in_place):
    """Elements 2^31 apart in memory that is reserved but, apart from these elements, never touched."""
    step = 2**29
    shape, strides = [2, 2, 2, 2], [8, 4, 2, 1]
    shape[axis], strides[axis] = 5, step
    cache = [torch.empty(4 * step + 64, dtype=torch.uint8, device=DEVICE).as_strided(shape, strides) for _ in range(2)]
    for x in cache:
        x.copy_(torch.arange(x.numel(), dtype=torch.uint8, device=DEVICE).view(shape))
    indices = torch.tensor([[shape[2] - 1]] * shape[0], device=DEVICE)
    (check_in_place if in_place else check)(cache[:1], cache[1:], indices, "triton")


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
    in_place=st.booleans(),
)
@example(1, 1, 1, 90, 128, 0.97, torch.float16, "contiguous", True)
def test_any_shape(num_layers, num_images, num_heads, num_tokens, num_features, share, dtype, layout, in_place):
    indices = choose(num_images, num_tokens, min(num_tokens, 1 + int(share * num_tokens)))
    cache = make(num_layers, num_images, num_heads, num_tokens, num_features, dtype, layout)
    (check_in_place if in_place else check)(*cache, indices, "triton")


def test_launcher_refuses_what_it_could_not_read_safely():
    from vtc_kernels.compact import compact_kv

    keys, values = make(2, 2, 2, 9, 8)
    indices = choose(2, 9, 3)
    with pytest.raises(ValueError, match="one each per layer, got 2 and 1"):
        compact_kv(keys, values[:1], indices)
    with pytest.raises(ValueError, match="one B and N"):
        compact_kv(keys, [values[0], values[1][:, :, :8]], indices)
    with pytest.raises(ValueError, match=r"indices must be int64 \[2, K\]"):
        compact_kv(keys, values, indices.int())
    with pytest.raises(ValueError, match="1, 2, 4 or 8 bytes"):
        compact_kv([keys[0].to(torch.complex128)], values[:1], indices)
    with pytest.raises(ValueError, match="in place at most N = 9 rows fit, got 10"):
        compact_kv(keys, values, torch.zeros(2, 10, dtype=torch.int64, device=DEVICE), in_place=True)
    with pytest.raises(ValueError, match="different devices"):
        compact_kv(keys, values, indices.to("meta"))


def test_launcher_never_reads_outside_its_input():
    from vtc_kernels.compact import compact_kv

    keys, values = make(1, 1, 1, 9, 8)
    ((actual,), _) = compact_kv(keys, values, torch.tensor([[-1, 3, 9]], device=DEVICE))
    assert bits(actual[0, 0, 0]) == bits(actual[0, 0, 2]) == [0] * 16
    assert bits(actual[0, 0, 1]) == bits(keys[0][0, 0, 3])


# --- tensors that share memory ----------------------------------------------------------------------------------------


def storage(*shape):
    return torch.arange(torch.Size(shape).numel(), device=DEVICE).to(torch.int16).view(shape)


def apart():
    """Caches in one storage that share none of it: a call's keys and values by what they are."""
    layers, layered = storage(6, 2, 3, 20, 8), storage(2, 3, 6, 20, 8)
    pairs, fused, wide = storage(2, 3, 20, 2, 8), storage(2, 20, 3, 3, 8), storage(2, 3, 20, 24)
    alone = storage(1, 3, 20, 8)
    return {
        "slices of a common cache": (list(layers[:3]), list(layers[3:])),
        "layers inside the heads": (list(layered.unbind(2)[:3]), list(layered.unbind(2)[3:])),
        "interleaved keys and values": ([pairs[..., 0, :]], [pairs[..., 1, :]]),
        "fused projection": ([fused[:, :, 1].transpose(1, 2)], [fused[:, :, 2].transpose(1, 2)]),
        "keys and values of different widths": ([wide[..., :16]], [wide[..., 16:]]),
        "two halves of the tokens": ([layers[0, :, :, :10]], [layers[0, :, :, 10:]]),
        "one image, expanded to one": ([alone.expand(1, -1, -1, -1)], [alone.clone()]),
        "strides of 0 along axes of size 1": ([alone.as_strided((1, 1, 20, 8), (0, 0, 8, 1))], [alone[:, 1:2]]),
        "nothing": ([layers[0, :, :0]], [layers[0, :, :0]]),
    }


def shared():
    """Caches with an element that has two places: a call's keys and values, and who is named."""
    x, other = storage(2, 3, 20, 8), storage(2, 3, 20, 8)
    one = storage(2, 1, 20, 8)
    pairs = storage(2, 3, 20, 2, 8)
    return {
        "expanded heads": ([other], [one.expand(-1, 3, -1, -1)], r"values\[0\] of shape \[2, 3, 10, 8\] with strides"),
        "windows": (
            [x.flatten().as_strided((2, 3, 20, 8), (480, 160, 4, 1))],
            [other],
            r"keys\[0\] of shape .* overlapping",
        ),
        "keys as values": ([x], [x], r"keys\[0\] and values\[0\], which share memory"),
        "a layer twice": ([x, x], [other, other.clone()], r"keys\[0\] and keys\[1\], which share"),
        "heads that overlap": ([x[:, :2]], [x[:, 1:]], r"keys\[0\] and values\[0\]"),
        "tokens that overlap": ([x[:, :, :11]], [x[:, :, 9:]], r"keys\[0\] and values\[0\]"),
        "every other token": ([x[:, :, ::2]], [x[:, :, :10]], r"keys\[0\] and values\[0\]"),
        "interleaved, one feature in common": ([pairs[..., 0, :]], [pairs.flatten(3)[..., 7:15]], r"keys\[0\] and val"),
        "rows that reach into the next head": (
            [x[:1, :2, :10]],
            [x.flatten().as_strided((1, 2, 10, 8), (480, 160, 8, 1), 15 * 8)],
            r"keys\[0\] and values\[0\]",
        ),
        "bytes of another type": ([x], [x.view(torch.bfloat16)], r"keys\[0\] and values\[0\]"),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", apart())
def test_slices_of_one_storage_move_in_place(name, backend):
    keys, values = apart()[name]
    check_in_place(keys, values, choose(keys[0].shape[0], keys[0].shape[2], 7), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shared())
def test_memory_that_would_move_twice_is_refused_in_place(name, backend):
    keys, values, message = shared()[name]
    indices = choose(keys[0].shape[0], 10, 7)
    keys, values = [x[:, :, :10] for x in keys], [x[:, :, :10] for x in values]
    before = [x.clone() for x in (*keys, *values)]
    with pytest.raises(ValueError, match=f"in place, .*{message}.* or use in_place=False"):
        ops.compact_kv(keys, values, indices, in_place=True, backend=backend)
    assert all(bits(x) == bits(old) for x, old in zip((*keys, *values), before, strict=True))
    check(keys, values, indices, backend)


@property_test
@given(data=st.data())
def test_no_layout_that_shares_memory_is_accepted(data):
    """Any two views of one storage, against a list of their elements' places."""
    memory = torch.zeros(2000, dtype=torch.int16, device=DEVICE)
    sizes, steps = st.lists(st.integers(1, 3), min_size=4, max_size=4), st.sampled_from([0, 1, 2, 3, 6, 9, 18, 27, 54])
    strides = st.lists(steps, min_size=4, max_size=4)
    size = data.draw(sizes)
    stride = data.draw(strides)
    a = memory.as_strided(size, stride)
    b = memory.as_strided(
        [size[0], *data.draw(sizes)[1:]], data.draw(st.just(stride) | strides), data.draw(st.integers(0, 90))
    )
    b = b[:, :, : a.shape[2]]
    a = a[:, :, : b.shape[2]]
    places = [place for x in (a, b) for place in ((where(x) + x.storage_offset()).tolist())]
    try:
        ops.compact_kv([a], [b], torch.zeros(a.shape[0], 1, dtype=torch.int64, device=DEVICE), in_place=True)
    except ValueError:
        return
    assert len(set(places)) == len(places)


def where(x):
    """Each element's place in the storage, from the first one's."""
    grids = torch.meshgrid(*(torch.arange(n) for n in x.shape), indexing="ij")
    return sum(grid * step for grid, step in zip(grids, x.stride(), strict=True)).flatten()

"""What the kernel tests share: the device, poisoned allocations, memory layouts, the error rule."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)

# Interpreted kernels take milliseconds a program, so examples are few; the same ones in every run. On a GPU nearly each
# of them is a kernel to compile.
property_test = settings(max_examples=20 if DEVICE.type == "cpu" else 4, deadline=None, derandomize=True, database=None)

_GUARD = 64  # canary elements on either side


@contextlib.contextmanager
def guarded_empty() -> Iterator[list[Tensor]]:
    """Inside, `torch.empty` gives memory of nothing but 1 bits, with canaries of the same around it.

    All ones is NaN in every float format, and -1 as an integer, which is no index. A launch that leaves an element
    unwritten shows in its result. A launch that writes beyond its output fails here, on exit. Yields the allocations.
    """
    empty = torch.empty
    buffers: list[Tensor] = []
    outputs: list[Tensor] = []

    def guarded(*size, **kwargs) -> Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        buffer = empty(shape.numel() + 2 * _GUARD, **kwargs)
        buffer.view(torch.uint8).fill_(255)
        buffers.append(buffer)
        outputs.append(buffer[_GUARD : _GUARD + shape.numel()].view(shape))
        return outputs[-1]

    torch.empty = guarded
    try:
        yield outputs
    finally:
        torch.empty = empty
    for buffer in buffers:
        for canary in (buffer[:_GUARD], buffer[-_GUARD:]):
            assert (canary.view(torch.uint8) == 255).all(), "a launch wrote outside its output"


LAYOUTS = ("contiguous", "tokens first", "slice", "transposed", "every other")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The values of `x` [B, ..., N, D] as a view of other memory, with NaN (or 1) outside the view."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "tokens first":  # [B, H, N, D] as a view of [B, N, H * D]: how attention gets its keys
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    if layout == "transposed":  # the last axis is not the fastest
        return x.mT.contiguous().mT
    pad, step = (3, 1) if layout == "slice" else (0, 2)
    size = [step * n + 2 * pad for n in x.shape]
    memory = torch.full(size, float("nan") if x.is_floating_point() else 1, dtype=x.dtype, device=x.device)
    view = memory[tuple(slice(pad, pad + step * n, step) for n in x.shape)]
    return view.copy_(x)


def reserves(gigabytes: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test that allocates this much and touches little of it: free on a CPU, real memory on a GPU.

    On a GPU the test is skipped if that much is not free. Afterwards the memory goes back to the driver, because
    PyTorch would keep it and other processes may need it.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def wrapped(*args, **kwargs) -> None:
            if DEVICE.type != "cuda":
                return test(*args, **kwargs)
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] / 2**30
            if free < gigabytes + 1:
                pytest.skip(f"needs {gigabytes} GiB of GPU memory and some more, {free:.1f} GiB are free")
            try:
                return test(*args, **kwargs)
            except torch.OutOfMemoryError:  # another process was faster
                pytest.skip(f"needs {gigabytes} GiB of GPU memory, which another process has taken")
            finally:
                torch.cuda.empty_cache()

        return wrapped

    return decorate


def in_orders(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, and the same with their features (the last axis) in three other orders.

    A sum over the features stays the same but for its rounding. In a single order, the rounding may be small by luck.
    """
    yield tensors
    for seed in range(3):
        order = torch.randperm(tensors[0].shape[-1], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        yield tuple(tensor[..., order] for tensor in tensors)


def assert_as_exact_as_pytorch(actual: Tensor, plain: Tensor | Iterable[Tensor], oracle: Tensor) -> None:
    """The error against the fp64 oracle is at most twice plain PyTorch's in fp32, plus two units in the last place.

    If there are several results of plain PyTorch, the worst one counts.
    """
    several = [plain] if isinstance(plain, Tensor) else plain
    error = (actual.double() - oracle).abs().max().item()
    floor = 2 * torch.finfo(torch.float32).eps * oracle.abs().max().item()
    bound = 2 * max((one.double() - oracle).abs().max().item() for one in several) + floor
    assert error <= bound, f"error {error:.3g} > {bound:.3g}"


def bits(x: Tensor) -> list[int]:
    """The bytes of a tensor, for results that must be copies."""
    return x.cpu().contiguous().flatten().view(torch.uint8).tolist()


def random_bytes(*size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits: NaN payloads, infinities and subnormals are among them."""
    *rest, last = size
    high = 2 if dtype == torch.bool else 256
    memory = torch.randint(0, high, (*rest, last * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return memory.view(dtype)


def count_launches(monkeypatch: pytest.MonkeyPatch, op: str) -> list[int]:
    """A list that grows by a 1 for each launch of the operation's kernel of the same name."""
    module, kernel = importlib.import_module(f"vtc_kernels.{op}"), f"_{op}_kernel"
    launches, real = [], getattr(module, kernel)

    class Counting:
        def __getitem__(self, grid):
            launches.append(1)
            return real[grid]

    monkeypatch.setattr(module, kernel, Counting())
    return launches


def merge_inputs(
    num_images: int,
    num_tokens: int,
    num_targets: int,
    width: int,
    num_features: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, key, targets in random order, weight. No weight is 0, so that a row of `mix` shows which tokens it has."""
    generator = torch.Generator().manual_seed(num_tokens + 7 * num_targets)
    x = torch.randn(num_images, num_tokens, width, generator=generator)
    key = torch.randn(num_images, num_tokens, num_features, generator=generator)
    targets = torch.rand(num_images, num_tokens, generator=generator).argsort(1)[:, :num_targets]
    weight = torch.rand(num_images, num_tokens, generator=generator) + 0.1
    tensors = (x.to(dtype), key.to(dtype), targets, weight)
    return tuple(in_layout(tensor.to(DEVICE), layout) for tensor in tensors)


def cosines(key: Tensor, targets: Tensor) -> Tensor:
    unit = key / key.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return torch.stack([image[kept] @ image.T for image, kept in zip(unit, targets, strict=True)])


def cosines_and_slack(key: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities in float64, and the distance below which rounding may swap two of them."""
    exact = cosines(key.double(), targets)
    slack = 2 * (cosines(key.float(), targets) - exact).abs().max() + 2 * torch.finfo(torch.float32).eps
    return exact, slack


def assert_is_merged(features: Tensor, mix: Tensor, ideal: Tensor, x: Tensor) -> None:
    """Shapes, and values as exact as plain PyTorch's, given the weights in float64."""
    assert features.shape == (len(x), ideal.shape[1], x.shape[2])
    assert features.dtype == x.dtype
    assert mix.shape == ideal.shape
    assert features.is_contiguous()
    assert mix.is_contiguous()
    assert ((mix == 0) == (ideal == 0)).all()
    assert_as_exact_as_pytorch(mix, ideal.float(), ideal)
    assert_as_exact_as_pytorch(features, ideal.to(x.dtype) @ x, ideal @ x.double())

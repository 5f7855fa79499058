"""What stands for CUDA graphs on a CPU: it records a function's operations, and replays them one by one.

It is as strict as a capture. It refuses what would wait for the device, what the host would copy to it, and tensors
that a replay could not find again. After each replay it overwrites all memory that a later replay may use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from vtc.hf.graphs import model as graphs
from vtc.hf.graphs.strict import require_capturable


class PlayedRecorder:
    """A `vtc.hf.graphs.capture.Recorder` for a CPU.

    Parameters
    ----------
    weights : callable
        The parameters and buffers, which functions may read, at the moment.
    """

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        self._weights = weights

    def begin(self) -> None:
        """Nothing runs on another stream."""

    def record(self, function: Callable[[], Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        """As `Recorder.record`."""
        function()
        operations = _Operations([*self._weights(), *inputs, *outputs])
        with _OnDevice(), operations:
            function()
        kept = {_storage(output) for output in outputs}
        changing = [each for each in inputs if _storage(each) not in kept]

        def replay() -> None:
            with torch.no_grad():
                operations.run()
                for each in (*operations.made, *changing):
                    _poison(each)

        return replay


def switch_on(model: Any, limit: int = 32, compile: bool = False) -> graphs.Graphs:
    """As `vtc.graphs`, for a model on a CPU."""
    base = model.base_model
    made = graphs.Graphs(base, limit, compile, recorder(base))
    graphs.switch_on(base, made)
    return made


def recorder(base: Any) -> Callable[[torch.device], PlayedRecorder]:
    """In place of `vtc.hf.graphs.model.recorder_of`, for the graphs of `base`, a LLaVA without its head."""
    model: Callable[[], Any] = weakref.ref(base)
    made = PlayedRecorder(lambda: [*model().parameters(), *model().buffers()])

    def of(device: torch.device) -> PlayedRecorder:
        return made if device.type == "cpu" else graphs.recorder_of(device)  # type: ignore[return-value]

    return of


class _Operations(TorchDispatchMode):
    """Notes the operations that run inside. Only those that start from `known` memory can run again."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known, self._kept = {_storage(each) for each in known}, list(known)
        self._made: dict[int, Tensor] = {}
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[int, Tensor]]] = []

    @property
    def made(self) -> list[Tensor]:
        """All memory that the operations have made, as flat tensors."""
        return [torch.empty(0, dtype=each.dtype).set_(each.untyped_storage()) for each in self._made.values()]

    def run(self) -> None:
        """Run all operations again, in the same memory."""
        for function, args, kwargs, results in self._calls:
            found = _tensors(function(*args, **kwargs))
            for number, result in results.items():
                result.copy_(found[number])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        require_capturable(func, args, kwargs)
        if name == "lift_fresh":
            raise RuntimeError("a constant of the host is copied to the device")
        for each in _tensors((args, kwargs)):
            if each.numel() and _storage(each) not in self._known and _storage(each) not in self._made:
                raise RuntimeError(f"aten.{name} reads a tensor {list(each.shape)} that is no input and no weight")
        out = func(*args, **kwargs)
        results, given = _tensors(out), {_storage(each) for each in _tensors((args, kwargs))}
        self._kept += results  # else others could get their memory
        # Views show what others write. What an operation returns of its own is written anew.
        new = {number: each for number, each in enumerate(results) if _storage(each) not in given}
        for each in new.values():
            if _storage(each) not in self._known:
                self._made.setdefault(_storage(each), each)
        if new or any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments):
            self._calls.append((func, args, kwargs, new))
        return out


class _OnDevice(TorchFunctionMode):
    """Refuses what a CPU does without an operation: reads, and new tensors without a device, which would be copied."""

    READS = frozenset((Tensor.tolist, Tensor.numpy, Tensor.cpu))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.READS:
            raise RuntimeError(f"{func.__name__} waits for the device")
        if func in _device_constructors() and kwargs.get("device") is None:
            raise RuntimeError(f"torch.{func.__name__}() without a device makes a tensor on the host")
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _poison(tensor: Tensor) -> None:
    """Fill with what must not be read: NaN, or numbers too large for an index."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 2)

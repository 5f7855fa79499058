"""Whether a module is still the one whose calls were recorded."""

from __future__ import annotations

import operator
import os
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_OWN = ("torch", "transformers", "vtc")  # whose modules keep what changes their forward() in tensors and configs
_DENSE = (Tensor, nn.Parameter)
_PLAIN = (bool, int, float, str, type(None))
_training = operator.attrgetter("training")
_compiled = operator.attrgetter("_compiled_call_impl")


class State:
    """What recorded calls of `modules` depend on besides their arguments: modules and tensors, and where they are.

    A tensor that is changed in place stays the same, and a replay reads its new values. The checks run before every
    call and look at every module and tensor, so they are written for speed. Plain attributes of modules of PyTorch and
    transformers, and their classes, are taken to stay as they are.

    `replaced` is whether the `forward` of `modules` themselves was replaced by the graphs'.
    """

    def __init__(self, modules: Iterable[nn.Module], replaced: bool = False) -> None:
        self._roots = list(modules)
        self._modules = [each for root in self._roots for each in root.modules()]
        held: Any = [(own._modules, own._parameters, own._buffers) for own in self._modules]
        self._dicts: list[dict[str, Any]] = [each for each in chain.from_iterable(held) if each]
        self._known = list(_values(self._dicts))  # alive, so that no other object gets their ids
        self._ids = list(map(id, self._known))
        tensors = [each for each in self._known if isinstance(each, Tensor)]
        self._dense = [each for each in tensors if type(each) in _DENSE and each.layout == torch.strided]
        self._others = [each for each in tensors if type(each) not in _DENSE or each.layout != torch.strided]
        self._hooks = [hooks for own in self._modules for hooks in (own._forward_hooks, own._forward_pre_hooks)]
        self._own = [vars(own) for own in self._modules if not (replaced and own in self._roots)]
        self._foreign = [own for own in self._modules if type(own).__module__.partition(".")[0] not in _OWN]
        self._before = self._now()

    def _now(self) -> tuple[Any, ...]:
        """What may change of the known modules and tensors."""
        return (
            list(map(Tensor.data_ptr, self._dense)),
            list(map(_place, self._others)),
            list(map(_training, self._modules)),
            list(map(_compiled, self._modules)),
            list(map(_settings, self._foreign)),
            list(map(_depth, self._roots)),
        )

    def is_of(self, modules: list[nn.Module]) -> bool:
        """Whether these are the modules."""
        return len(modules) == len(self._roots) and all(map(operator.is_, modules, self._roots))

    def has_changed(self) -> bool:
        """Whether a module or a tensor is another one or has moved, or a module of another library has new settings."""
        return list(map(id, _values(self._dicts))) != self._ids or self._now() != self._before

    def reason(self) -> str | None:
        """Why no call of the modules can be replayed now, or None."""
        if any(map(_training, self._roots)):
            return "it is in training mode; use model.eval()"
        if nn_module._has_any_global_hook():
            return "there are hooks on all modules"
        if any(map(_is_hook, _values(filter(None, self._hooks)))):
            return "there are hooks on its modules"
        if any(map(operator.contains, self._own, repeat("forward"))):
            return "the forward() of a module was replaced, as accelerate does to move weights"
        return None


def flags() -> Hashable:
    """What decides, besides a model, which kernels PyTorch and VTC run."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("VTC_BACKEND"),
    )


def _place(tensor: Tensor) -> Any:
    """Where a tensor is that may hold others, as a quantized weight does, or has no memory of its own."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    inner = [_place(getattr(tensor, name)) for name in names]
    return inner or (id(tensor) if tensor.layout != torch.strided else tensor.data_ptr())


def _depth(module: nn.Module) -> int | None:
    """How many of its layers a model runs."""
    return getattr(getattr(module, "config", None), "num_hidden_layers", None)


def _values(dicts: Iterable[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _is_hook(hook: Any) -> bool:
    """Whether a hook may do something. Those of transformers return what a call asks for, and that is not replayed."""
    return not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module, such as which adapters are active or merged."""
    return {name: _copy(value) for name, value in vars(module).items() if not name.startswith("_forward")}


def _copy(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_copy(each) for each in value]
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items() if not isinstance(each, nn.Module)}
    return value if isinstance(value, _PLAIN) else id(value)

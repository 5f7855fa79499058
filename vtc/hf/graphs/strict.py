"""What a capture of a CUDA graph refuses, refused before one begins: a capture that fails may break later ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "_unique2", "unique_consecutive"),
    *("unique_dim", "repeat_interleave"),
}


class Strict(TorchDispatchMode):
    """Inside, what would wait for the device, or copy between it and the host, raises RuntimeError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        require_capturable(func, args, kwargs)
        return func(*args, **kwargs)


def require_capturable(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError for a call of an operator that a capture refuses.

    `repeat_interleave` counts if the repeats are a tensor; so does an index that is a mask.
    """
    name = func.overloadpacket.__name__
    if name in WAITS or _is_masked(name, args):
        raise RuntimeError(f"aten.{name} waits for the device")
    if name in ("_to_copy", "copy_"):
        source = args[-1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device")
        if isinstance(source, Tensor) and target is not None and source.device.type != target.type:
            raise RuntimeError(f"a tensor {list(source.shape)} is copied from {source.device.type} to {target.type}")


def _is_masked(name: str, args: Sequence[Any]) -> bool:
    """Whether an operator reads or writes where a mask is true, and so has to count."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(
        index is not None and not index.dtype.is_floating_point and index.element_size() == 1 for index in args[1]
    )

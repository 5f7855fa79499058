"""The kept tokens of a KV cache, all layers at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, equal
from bench.workloads.base import Shape, Workload, compiled, random_indices, random_tensor
from vtc import ops, reference


class CompactKV(Workload):
    sizes = "BTNLGF"

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """The caches of B prompts: the patches of all T tiles lie in one sequence."""
        count = shape["T"] * (shape["N"] - 1)
        size = shape["B"], shape["G"], count, shape["F"]
        tensors = [random_tensor(*size, dtype=dtype, device=device, seed=seed) for seed in range(2 * shape["L"])]
        return (
            tensors[: shape["L"]],
            tensors[shape["L"] :],
            random_indices(shape["B"], count, shape["T"] * shape["K"], device),
        )

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """keys and values of L layers read and written: 4·L·B·G·T·K·F·size, indices: 8·B·T·K."""
        return shape["B"] * shape["T"] * shape["K"] * (4 * shape["L"] * shape["G"] * shape["F"] * size + 8)

    def needs_bytes(self, shape: Shape, size: int) -> int:
        return 2 * shape["L"] * shape["B"] * shape["G"] * shape["T"] * shape["N"] * shape["F"] * size

    def providers(self) -> dict[str, Callable[..., Any]]:
        def gather(keys: list[Tensor], values: list[Tensor], indices: Tensor) -> Any:
            index = indices[:, None, :, None].expand(-1, keys[0].shape[1], -1, keys[0].shape[3])
            return tuple(x.gather(2, index) for x in keys), tuple(x.gather(2, index) for x in values)

        return {
            "triton": functools.partial(ops.compact_kv, backend="triton"),
            "reference": reference.compact_kv,
            "compiled": compiled(reference.compact_kv),
            "gather": gather,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        keys, values, indices = inputs
        for x, got in zip((*keys, *values), (*result[0], *result[1]), strict=True):
            equal("cache", got, reference.compact_kv([x], [x], indices)[0][0])
        return []

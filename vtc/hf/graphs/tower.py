"""What the vision tower's side does with views, as a recorded function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from vtc.hf.graphs.capture import Recorder
from vtc.hf.graphs.memory import Memory


class ViewsGraph:
    """A function of views `[T, 3, height, width]` that returns a tree of tensors and of values that never change.

    Parameters
    ----------
    function : callable
        It is called three times.
    views : Tensor
        Of the first such call.
    """

    def __init__(self, recorder: Recorder, memory: Memory, function: Callable[[Tensor], Any], views: Tensor) -> None:
        self.views = memory.take("views", tuple(views.shape), views.dtype)
        self.views.copy_(views)
        leaves, self._tree = pytree.tree_flatten(function(self.views))
        self._leaves = [  # a tensor's place in memory, or the value
            memory.take(f"of views, {number}", tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
            for number, leaf in enumerate(leaves)
        ]
        self._outputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._replay = recorder.record(functools.partial(self._run, function), [self.views], self._outputs)

    def _run(self, function: Callable[[Tensor], Any]) -> None:
        found = [leaf for leaf in pytree.tree_leaves(function(self.views)) if isinstance(leaf, Tensor)]
        for output, each in zip(self._outputs, found, strict=True):
            output.copy_(each)

    def __call__(self, views: Tensor) -> Any:
        """The same as `function(views)`, in memory of its own."""
        self.views.copy_(views)
        self._replay()
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._tree)

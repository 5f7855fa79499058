"""What the vision tower's side computes of views, replayed where it can be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from vtc.hf.graphs.recorded import Recorded, Refused, Unrecordable
from vtc.hf.graphs.tower import ViewsGraph


class _Call(threading.local):
    """The call of this thread; `is_refused` holds for the calls inside it, too."""

    is_refused = False


class VisionCalls:
    """In place of functions of views."""

    def __init__(self, recorded: Recorded, compiled: Callable[[Any], Any]) -> None:
        self._recorded, self._compiled, self._call = recorded, compiled, _Call()

    def __call__(self, key: Hashable, modules: list[Any], function: Callable[[Tensor], Any], views: Tensor) -> Any:
        """`function(views)`, a tree of tensors and other values; `key` is what it depends on besides `modules`."""
        recorded, now = self._recorded, self._call
        if recorded.is_recording or now.is_refused:
            return function(views)
        with recorded.lock:
            try:
                place = recorded.require("vision", modules, views.device)
                graph = recorded.get(
                    ("views", key, views.shape, views.dtype),
                    lambda: ViewsGraph(*place, self._compiled(function), views),
                )
                found = graph(views)
                recorded.count("vision")
                return found
            except Refused as why:
                recorded.refuse("vision tower", str(why))
                now.is_refused = not isinstance(why, Unrecordable)  # else a part of the function may be replayed
        try:
            return function(views)
        finally:
            now.is_refused = False

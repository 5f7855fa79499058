"""What the vision tower's side computes of views, replayed where it can be."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from vtc.hf.graphs.recorded import Recorded, Refused
from vtc.hf.graphs.tower import ViewsGraph


def replayed(
    recorded: Recorded, key: Hashable, modules: list[Any], function: Callable[[Tensor], Any], views: Tensor
) -> Any:
    """`function(views)`, a tree of tensors and other values; `key` is what it depends on besides `modules`."""
    if recorded.is_recording:
        return function(views)
    with recorded.lock:
        try:
            recorded.require_state("vision", modules)
            place = recorded.place(views.device)
            graph = recorded.get(
                ("views", key, views.shape, views.dtype),
                lambda: ViewsGraph(place.recorder, place.memory, function, views),
            )
            found = graph(views)
            recorded.count("vision")
            return found
        except Refused as why:
            recorded.refuse("vision tower", str(why))
    return function(views)

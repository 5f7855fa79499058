"""What VTC replaces in transformers: `generate`, `forward` and `get_image_features` of the LLaVA classes. Nothing else.

Each is guarded: the guard hands the call to the stock method at once unless the model's vision tower has the attention
"vtc". README.md beside this file says why the classes are guarded and not the instances.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vtc.hf import attention, conversation, generate, names
from vtc.hf.families import FAMILIES
from vtc.hf.settings import is_on


def install(module: ModuleType) -> None:
    """Put the guards on the classes of the family whose module transformers has just imported, once on each class."""
    names.warn_if_untested()
    family = next(family for family in FAMILIES.values() if family.module == module.__name__)
    base, head = (getattr(module, name) for name in family.classes)
    if hasattr(base.forward, "_vtc_guard") or not names.is_supported():
        return
    for visual in family.inputs:
        _guard(base, visual.get, functools.partial(generate.get_features, visual))
    _guard(base, "forward", generate.forward)
    _guard(head, "forward", generate.forward)
    _guard(head, "generate", generate.generate)


def _guard(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """For models that compress, replace a method by `ours(stock, self, call)`; call holds the arguments by name."""
    stock = getattr(owner, name)
    parameters = inspect.signature(stock).parameters.values()
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(stock)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(positional, args, strict=False))
        wrong = len(args) > len(positional) or given.keys() & kwargs.keys()  # the stock method raises the error
        caches = (given.get(word, kwargs.get(word)) for word in names.CACHE_WORDS)
        if wrong or not (is_on(self) or any(map(conversation.has_note, caches))):
            return stock(self, *args, **kwargs)

        def stock_method(**call: Any) -> Any:
            return stock(self, **names.stock_call(call))

        return ours(stock_method, self, names.read_call(given | kwargs))

    guarded._vtc_guard = True  # type: ignore[attr-defined]
    setattr(owner, name, guarded)


attention.register()

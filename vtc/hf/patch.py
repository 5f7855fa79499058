"""What VTC replaces in transformers: `generate`, `forward` and `get_image_features` of the LLaVA classes. Nothing else.

Each is guarded: the guard hands the call to the stock method at once unless a `vtc.compress` block is open, the vision
tower has the attention "vtc", or the KV cache holds a compressed conversation. README.md beside this file says why the
classes are guarded and not the instances.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vtc.hf import attention, conversation, generate, names, settings
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
    _guard(head, "generate", _generate)


def _generate(stock: generate.Stock, model: Any, call: generate.Call) -> Any:
    with settings.held(model.base_model):
        return generate.generate(stock, model, call)


def _guard(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """For models that compress, replace a method by `ours(stock, self, call)`; call holds the arguments by name."""
    stock = getattr(owner, name)
    parameters = inspect.signature(stock).parameters.values()
    new_word, old_word = names.CACHE_WORDS
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(stock)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(positional, args, strict=False))
        wrong = len(args) > len(positional) or given.keys() & kwargs.keys()  # the stock method raises the error
        if wrong:
            return stock(self, *args, **kwargs)
        call = given | kwargs
        cache = call.get(new_word) if call.get(old_word) is None else call[old_word]
        if not is_on(self) and (cache is None or not conversation.has_note(cache)):
            if not torch.compiler.is_compiling() and (settings.OPEN or settings.CONTEXT.blocks):
                settings.warn_outside(self.base_model, call)
            return stock(self, *args, **kwargs)

        def stock_method(**call: Any) -> Any:
            return stock(self, **names.stock_call(call))

        return ours(stock_method, self, names.read_call(call))

    guarded._vtc_guard = True  # type: ignore[attr-defined]
    setattr(owner, name, guarded)


attention.register()

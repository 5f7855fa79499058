"""What VTC replaces in transformers: `generate`, `forward` and `get_image_features` of the LLaVA classes. Nothing else.

Each is guarded: the guard hands the call to the stock method at once unless a `vtc.compress` block is open, the vision
tower has the attention "vtc", or the KV cache holds a compressed conversation. `forward()` without images and without
such a cache is always the stock method. README.md beside this file says why the classes are guarded and not the
instances.
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
from vtc.hf.graphs.model import of as graphs_of
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
    images = ("mm_encoder_outputs", *(visual.pixels for visual in family.inputs))
    _guard(base, "forward", generate.forward, images)
    _guard(head, "forward", generate.forward, images)
    _guard(head, "generate", _generate)


def _generate(stock: generate.Stock, model: Any, call: generate.Call) -> Any:
    base = model.base_model
    run = functools.partial(generate.generate, stock, model, call)
    with settings.held(base):
        if (graphs := graphs_of(base)) is None:
            return run()
        mask = call.get("attention_mask")
        own_masks = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)
        return graphs.generate(run, call.get("cache"), generate.new_tokens(model, call), own_masks)


def _guard(owner: type, name: str, ours: Callable[..., Any], images: tuple[str, ...] = ()) -> None:
    """For models that compress, replace a method by `ours(stock, self, call)`; call holds the arguments by name.

    If `images` are given, a call without these arguments and without a noted cache is stock's: a decoding step of
    `generate()` pays for the look-up of an attribute, whether the model compresses or not.
    """
    stock = getattr(owner, name)
    signature = inspect.signature(stock)
    new_word, old_word = names.CACHE_WORDS
    positional = [p.name for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(stock)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = kwargs
        if args:
            given = dict(zip(positional, args, strict=False))
            wrong = len(args) > len(positional) or given.keys() & kwargs.keys()  # the stock method raises the error
            if wrong:
                return stock(self, *args, **kwargs)
            call = given | kwargs
        cache, old = call.get(new_word), call.get(old_word)
        has_two_caches = cache is not None and old is not None
        cache = cache if old is None else old
        has_note = cache is not None and hasattr(cache, conversation.NOTE)
        if images and not has_note and not has_two_caches:
            for image in images:
                if call.get(image) is not None:
                    break
            else:
                return stock(self, *args, **kwargs)
        if not has_note and not is_on(self):
            if not torch.compiler.is_compiling() and (settings.OPEN or settings.CONTEXT.blocks):
                settings.warn_outside(self.base_model, call)
            return stock(self, *args, **kwargs)

        def stock_method(**call: Any) -> Any:
            return stock(self, **names.stock_call(call))

        return ours(stock_method, self, names.read_call(call))

    @functools.wraps(stock)
    def unguarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs)

    # generate() asks for the signature six times a call, and Python would put it together anew each time. It is on what
    # the guard wraps: whoever wraps the guard of an instance copies its attributes, and this signature has `self`.
    unguarded.__signature__ = signature  # type: ignore[attr-defined]
    guarded.__wrapped__ = unguarded  # type: ignore[attr-defined]
    guarded._vtc_guard = True  # type: ignore[attr-defined]
    setattr(owner, name, guarded)


attention.register()

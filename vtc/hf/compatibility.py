"""Which method works with which model and vision tower, and why not."""

from __future__ import annotations

from typing import Any

import torch

from vtc.hf import prune_limits
from vtc.hf.families import Family
from vtc.hf.towers import TowerSpec
from vtc.methods import METHODS, Method, class_of


def family_refusal(family: Family, method: str | Method) -> str | None:
    """Why `method` does not work with a family of models, as a clause, or None if it does."""
    about = class_of(method)
    if not family.is_one_view and about.prunes == ("language",):
        return f"prunes inside the language model, which cannot tell the tiles of an image of {family.name} apart"
    by_view = about.per_view and not (family.has_frames and about.needs.keys)  # the keys of a frame are not pooled
    if not family.is_one_view and not about.keeps_patches() and not by_view and about.prunes:
        return f"makes new tokens of an image's patches, and a {family.name} image or video has several views"
    if family.stacked and about.adaptive:
        return f"gives images different numbers of tokens, and {family.name} takes the same number from each"
    return None


def tower_refusal(tower: TowerSpec, method: str | Method) -> str | None:
    """Why `method` does not work with a vision tower, as a clause, or None if it does."""
    about = class_of(method)
    if about.needs_cls() and not tower.cls:
        return f"needs a vision tower with a [CLS] token, and {tower.name} has none"
    if about.needs.grid and tower.registers:
        return f"needs a grid of patches, and {tower.name} puts register tokens among them"
    return None


def methods_of(family: Family | None = None, tower: TowerSpec | None = None) -> tuple[str, ...]:
    """The methods that work with a family, a tower, or both."""
    return tuple(
        name
        for name in METHODS
        if not (family and family_refusal(family, name)) and not (tower and tower_refusal(tower, name))
    )


def require(base: Any, config: Any, family: Family, tower: TowerSpec) -> None:
    """Raise ValueError if the model `base` does not support the settings `config`."""
    if not torch.compiler.is_compiling():
        require_stock_methods(base, family)
        tower.attentions_of(base.vision_tower)
    if refusal := tower_refusal(tower, config.method) or family_refusal(family, config.method):
        work = methods_of(family, tower)
        raise ValueError(
            f"method {config.name!r} {refusal}; methods that work with it: {', '.join(map(repr, work))}, e.g. "
            f"vtc.configure(model, method={work[0]!r})"
        )
    if config.prunes_inside:
        if not family.is_one_view:
            raise ValueError(
                f"{prune_limits.asked(config)} needs models with one view per image, and {family.name} has several; "
                f"{prune_limits.instead(config)}"
            )
        prune_limits.require(base.language_model, config)


def require_stock_methods(base: Any, family: Family) -> None:
    """Raise ValueError if the model `base` has methods of its own where VTC replaces those of transformers.

    A `forward` of its own may call the one of transformers, so it is accepted.
    """
    cls: Any = next(
        cls for cls in type(base).__mro__ if (cls.__module__, cls.__name__) == (family.module, family.classes[0])
    )
    if not hasattr(cls.forward, "_vtc_guard"):
        raise ValueError(
            f"{cls.__name__} was defined before VTC could guard it; import vtc before the model is built, or call "
            "vtc.enable(model)"
        )
    for name in (*(visual.get for visual in family.inputs), "get_placeholder_mask", "pack_image_features"):
        own, stock = getattr(base, name, None), getattr(cls, name, None)
        if getattr(own, "__func__", own) is not stock and not hasattr(own, "_vtc_guard"):
            raise ValueError(
                f"{type(base).__name__} has a {name}() of its own, which VTC would not call; use the one of "
                f"{cls.__name__}, or vtc.disable(model)"
            )

"""Methods of visual token compression, one published method a file, and the registry of them all.

A method is a frozen dataclass: its fields are its parameters, its class attributes say what it asks of the models and
where it prunes (`vtc.methods.base`). `compress` is a function of tensors: it takes what the vision tower left for it
and gives the rows for the projector. Nothing here knows a model, waits for a GPU, or loops over images or tokens.
"""

from __future__ import annotations

from typing import Any

from vtc.methods.base import Method, Needs, Tokens, Tower, keep_patches, prompt_indices
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.none import Nothing
from vtc.methods.pool import Pool
from vtc.methods.prumerge import PruMerge, PruMergePlus
from vtc.methods.random import Random
from vtc.methods.visionzip import VisionZip
from vtc.methods.vtc_cls import VTCCLS

__all__ = ["METHODS", "Method", "Needs", "Tokens", "Tower", "build", "keep_patches", "prompt_indices"]

METHODS: dict[str, type[Method]] = {
    VTCCLS.name: VTCCLS,
    FasterVLM.name: FasterVLM,
    VisionZip.name: VisionZip,
    PruMerge.name: PruMerge,
    PruMergePlus.name: PruMergePlus,
    FastV.name: FastV,
    Random.name: Random,
    Pool.name: Pool,
    Nothing.name: Nothing,
}


PLACES = {"tower": "before the projector", "language": "in the language model"}


def table() -> list[tuple[str, ...]]:
    """Of each method: its name, what it scores, whether it needs [CLS], where it prunes, its paper or "-"."""
    return [
        (
            name,
            method.scores,
            "yes" if method.needs_cls() else "no",
            ", ".join(PLACES[place] for place in method.prunes) or "nowhere",
            method.paper or "-",
        )
        for name, method in METHODS.items()
    ]


def build(name: str, **options: Any) -> Method:
    """The method `name` with those of `options` that are parameters of it, such as the fields of a `VTCConfig`.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    fields = METHODS[
        name
    ].__match_args__  # its fields; compilers trace through this, and not through dataclasses.fields
    return METHODS[name](**{option: value for option, value in options.items() if option in fields})

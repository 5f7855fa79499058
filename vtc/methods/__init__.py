"""Methods of visual token compression: one published method per file, and the registry of them all.

A method is a frozen dataclass. Its fields are its options, and it checks their values itself. Its class attributes say
what it needs from the vision tower and where it prunes (`vtc.methods.base`). `reduce` is a function of tensors: it
takes the outputs of the vision tower and returns the features for the projector. A method knows no model, never
synchronises with the GPU, and does not loop over images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtc.methods.base import Method, Needs, Question, Ranking, Tokens, VisionOutputs, keep_patches
from vtc.methods.cdpruner import CDPruner
from vtc.methods.coverage import Coverage
from vtc.methods.dart import DART
from vtc.methods.divprune import DivPrune
from vtc.methods.downsample import Downsample
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.hiprune import HiPrune
from vtc.methods.mmtok import MMTok
from vtc.methods.none import Nothing
from vtc.methods.pool import Pool
from vtc.methods.prumerge import PruMerge, PruMergePlus
from vtc.methods.random import Random
from vtc.methods.received import Received
from vtc.methods.scope import Scope
from vtc.methods.visionzip import VisionZip
from vtc.methods.vispruner import VisPruner
from vtc.methods.vtc_cls import VTCCLS

__all__ = [
    "METHODS",
    "Method",
    "Needs",
    "Question",
    "Ranking",
    "Tokens",
    "VisionOutputs",
    "build",
    "check_options",
    "class_of",
    "keep_patches",
    "table",
]

METHODS: dict[str, type[Method]] = {
    VTCCLS.name: VTCCLS,
    FasterVLM.name: FasterVLM,
    VisionZip.name: VisionZip,
    PruMerge.name: PruMerge,
    PruMergePlus.name: PruMergePlus,
    Coverage.name: Coverage,
    Scope.name: Scope,
    MMTok.name: MMTok,
    DivPrune.name: DivPrune,
    CDPruner.name: CDPruner,
    VisPruner.name: VisPruner,
    HiPrune.name: HiPrune,
    Received.name: Received,
    FastV.name: FastV,
    DART.name: DART,
    Random.name: Random,
    Pool.name: Pool,
    Downsample.name: Downsample,
    Nothing.name: Nothing,
}


PLACES = {"tower": "before the projector", "language": "in the language model"}


def table() -> list[tuple[str, ...]]:
    """For each method: its name, what it scores, whether it needs [CLS], where it prunes, its paper or "-"."""
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


def class_of(method: str | Method) -> type[Method]:
    """The class of a method that is given by its name, or as an object.

    Raises
    ------
    ValueError
        If there is no such method, or the object has no name of its own.
    """
    if isinstance(method, Method):
        cls = type(method)
        if METHODS.get(getattr(cls, "name", ""), cls) is not cls or not isinstance(getattr(cls, "name", None), str):
            got = f"name={cls.name!r}, which is another's" if hasattr(cls, "name") else "none"
            raise ValueError(f"a method needs a name of its own, a string, and {cls.__name__} has {got}; give it one")
        return cls
    if not isinstance(method, str) or method not in METHODS:
        other = "" if isinstance(method, str) else ", or an object of a subclass of vtc.methods.Method"
        hint = f"; use {method.__name__}()" if isinstance(method, type) and issubclass(method, Method) else ""
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}{other}, got {method!r}{hint}")
    return METHODS[method]


def build(name: str, *, backend: str = "auto", **options: Any) -> Method:
    """The method `name` with the given options; the others keep their defaults.

    Raises
    ------
    ValueError
        If there is no such method, if an option is not one of the method's, or if its value is not accepted.
    """
    check_options(name, options)
    return METHODS[name](backend=backend, **options)


def check_options(method: str | Method, options: Mapping[str, Any]) -> None:
    """Raise ValueError if there is no such `method`, or if a name in `options` is not an option of it."""
    about = class_of(method)
    name, own = about.name, about.options()
    for option, value in options.items():
        if option in own:
            continue
        has = f"options are {', '.join(own)}" if own else "options are none"
        if owners := [other for other, method in METHODS.items() if option in method.options()]:
            raise ValueError(
                f"{option} is an option of {' and '.join(map(repr, owners))}, and the method is {name!r}, whose {has}; "
                f"use vtc.configure(model, method={owners[0]!r}, {option}={value!r})"
            )
        raise ValueError(f"unknown option {option!r} of method {name!r}, whose {has}; leave it out")

"""What is compared: a method with its options and a number of tokens, or a baseline."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtc.config import SHARED, VTCConfig
from vtc.methods import METHODS, Method, build, class_of

NONE = "none"  # the uncompressed, stock model
FLOOR = "floor"  # no visual token at all: the prompt without its image


@dataclass(frozen=True)
class Setting:
    """One way to answer. `options` are fields of `VTCConfig` and options of the method, without the method.

    The method is a name or an object, as in `VTCConfig`; the options of an object that are not its defaults are among
    `options`, too.

    Raises
    ------
    ValueError
        If `VTCConfig` does not accept them, or a baseline has options.
    """

    method: str | Method = NONE
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {k: v for k, v in self.options.items() if v is not None})
        if self.method == FLOOR or self.method == NONE:
            if self.options:
                raise ValueError(f"{self.method!r} is a baseline without options, got {', '.join(self.options)}")
        else:
            config = VTCConfig.of(method=self.method, **self.options)
            object.__setattr__(self, "method", config.method)
            own = config.method.given() if isinstance(config.method, Method) else config.options
            if config.schedule is not None:  # as it comes back from a record
                own = {"schedule": config.to_dict()["schedule"], **own}
            object.__setattr__(self, "options", {**self.options, **own})

    @property
    def compresses(self) -> bool:
        """Whether the model runs in a block of `vtc.compress`."""
        return self.method not in (NONE, FLOOR)

    @property
    def name(self) -> str:
        """The name of the method, or of the baseline."""
        return self.method if isinstance(self.method, str) else self.method.name

    @property
    def keep(self) -> int | float | None:
        """The number of tokens, or the share of them, that was asked for."""
        return self.options.get("keep", self.options.get("ratio"))

    @property
    def label(self) -> str:
        """A name that tells settings apart and is fit for a folder."""
        parts = [self.name]
        if self.keep is not None:
            parts.append(f"{self.keep:g}" if isinstance(self.keep, float) else str(self.keep))
        given = {name: value for name, value in self.options.items() if name not in ("keep", "ratio")}
        if "schedule" in given:
            given["schedule"] = "+".join("-".join(map(str, stage)) for stage in given["schedule"])
        rest = (f"{name}={_short(value)}" for name, value in given.items())
        return re.sub(r"[^\w.+=-]", "_", "-".join([*parts, *rest]))

    def fingerprint(self) -> dict[str, Any]:
        """Everything of it that can change an answer, defaults included, so that a changed default is noticed.

        Of a method object, also a digest of its class's source, so that answers of an earlier version are not reused.
        """
        if not self.compresses:
            return {"method": self.name}
        config = VTCConfig.of(method=self.method, **self.options)
        method = config.build_method()
        own = {name: getattr(method, name) for name in method.options()}
        found = {**config.to_dict(), "method": self.name, "prune_layer": config.prune_after, **own}
        return found if isinstance(self.method, str) else found | {"code": _code(type(self.method))}


def _short(value: Any) -> str:
    """`value` as text, or a digest of one that is too long for a folder's name."""
    text = str(value)
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:8]


def _code(cls: type) -> str | None:
    """A digest of the source of a class; None where there is none, as in an interactive session."""
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def ignores_keep(method: str | Method, options: Mapping[str, Any]) -> bool:
    """Whether the number of tokens is not the method's to choose, with these options."""
    if method in (NONE, FLOOR):
        return True
    if isinstance(method, str):
        if method not in METHODS:  # a method object's name in the records of an earlier run
            return False
        method = build(method, **{k: v for k, v in options.items() if k in METHODS[method].options()})
    return "keep" in method.without_effect()


def sweep(methods: Sequence[str | Method], keeps: Sequence[int | None], **options: Any) -> list[Setting]:
    """Every method at every number of tokens; once, if it ignores that number.

    An option goes to every method that has it. A number of tokens that is None is left to the options.

    Raises
    ------
    ValueError
        For an unknown method, or an option that no method has.
    """
    settings, used = [], set()
    for method in methods:
        if method in (NONE, FLOOR):
            settings.append(Setting(method))
            continue
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join([*METHODS, FLOOR])}")
        own = {k: v for k, v in options.items() if k in (*SHARED, *class_of(method).options())}
        used |= set(own)
        for keep in [None] if ignores_keep(method, own) else keeps:
            settings.append(Setting(method, {"keep": keep, **own}))
    if unused := sorted(name for name, value in options.items() if name not in used and value is not None):
        names = [method if isinstance(method, str) else method.name for method in methods]
        raise ValueError(f"no method of {', '.join(names)} has the option(s) {', '.join(unused)}")
    return settings

"""What is compared: a method with its options and a number of tokens, or a baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtc.config import VTCConfig

NONE = "none"  # the uncompressed, stock model
FLOOR = "floor"  # no visual token at all: the prompt without its image
IGNORE_KEEP = ("none", "floor", "prumerge")  # the number of tokens is not theirs to choose


@dataclass(frozen=True)
class Setting:
    """One way to answer. `options` are fields of `VTCConfig` and options of the method, without the method.

    Raises
    ------
    ValueError
        If `VTCConfig` does not accept them, or a baseline has options.
    """

    method: str = NONE
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {k: v for k, v in self.options.items() if v is not None})
        if self.method == FLOOR or self.method == NONE:
            if self.options:
                raise ValueError(f"{self.method!r} is a baseline without options, got {', '.join(self.options)}")
        else:
            VTCConfig.of(method=self.method, **self.options)

    @property
    def compresses(self) -> bool:
        """Whether the model runs in a block of `vtc.compress`."""
        return self.method not in (NONE, FLOOR)

    @property
    def keep(self) -> int | float | None:
        """The number of tokens, or the share of them, that was asked for."""
        return self.options.get("keep", self.options.get("ratio"))

    @property
    def label(self) -> str:
        """A name that tells settings apart and is fit for a folder."""
        parts = [self.method]
        if self.keep is not None:
            parts.append(f"{self.keep:g}" if isinstance(self.keep, float) else str(self.keep))
        rest = (f"{name}={value}" for name, value in self.options.items() if name not in ("keep", "ratio"))
        return re.sub(r"[^\w.+=-]", "_", "-".join([*parts, *rest]))

    def fingerprint(self) -> dict[str, Any]:
        """Everything of it that can change an answer, defaults included, so that a changed default is noticed."""
        if not self.compresses:
            return {"method": self.method}
        config = VTCConfig.of(method=self.method, **self.options)
        method = config.build_method()
        own = {name: getattr(method, name) for name in method.options()}
        return {**config.to_dict(), "prune_layer": config.prune_after, **own}


def sweep(methods: Sequence[str], keeps: Sequence[int | None], **options: Any) -> list[Setting]:
    """Every method at every number of tokens; once, if it ignores that number.

    An option goes to every method that has it. A number of tokens that is None is left to the options.

    Raises
    ------
    ValueError
        For an unknown method, or an option that no method has.
    """
    from vtc.config import SHARED
    from vtc.methods import METHODS

    settings, used = [], set()
    for method in methods:
        if method in (NONE, FLOOR):
            settings.append(Setting(method))
            continue
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join([*METHODS, FLOOR])}")
        own = {k: v for k, v in options.items() if k in (*SHARED, *METHODS[method].options())}
        used |= set(own)
        for keep in keeps[:1] if method in IGNORE_KEEP else keeps:
            settings.append(Setting(method, {"keep": keep, **own}))
    if unused := sorted(name for name, value in options.items() if name not in used and value is not None):
        raise ValueError(f"no method of {', '.join(methods)} has the option(s) {', '.join(unused)}")
    return settings

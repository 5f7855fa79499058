"""No compression: the model as it is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vtc.methods.base import Method, Tokens, Tower


@dataclasses.dataclass(frozen=True)
class Nothing(Method):
    """All N patches of the feature layer, whatever `keep` is."""

    name: ClassVar[str] = "none"
    scores: ClassVar[str] = "nothing: all stay"
    paper: ClassVar[str] = ""
    prunes: ClassVar[tuple[str, ...]] = ()
    operations: ClassVar[tuple[str, ...]] = ()
    chooses: ClassVar[bool] = False

    def capacity(self, num_tokens: int, keep: int) -> int:
        return num_tokens

    def compress(self, tower: Tower, keep: int) -> Tokens:
        return Tokens(tower.patches)

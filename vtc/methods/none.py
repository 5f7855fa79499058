"""No compression: the stock model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vtc.methods.base import Method, Tokens, VisionOutputs


@dataclasses.dataclass(frozen=True)
class Nothing(Method):
    """All N patches of the feature layer stay; `keep` is ignored. It has no options."""

    name: ClassVar[str] = "none"
    scores: ClassVar[str] = "nothing: all stay"
    paper: ClassVar[str] = ""
    prunes: ClassVar[tuple[str, ...]] = ()
    operations: ClassVar[tuple[str, ...]] = ()
    selects: ClassVar[bool] = False

    def without_effect(self) -> dict[str, str]:
        return super().without_effect() | dict.fromkeys(
            ("keep", "ratio", "tiles", "positions", "kv"), "all tokens stay"
        )

    def num_outputs(self, num_tokens: int, keep: int) -> int:
        return num_tokens

    def reduce(self, outputs: VisionOutputs, keep: int) -> Tokens:
        return Tokens(outputs.patches)

"""VTC-CLS: keep the patches that the [CLS] token attends to, over several layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vtc import ops
from vtc.methods.base import Method, Needs, Ranking, VisionOutputs
from vtc.methods.checks import check_integer, check_one_of


@dataclasses.dataclass(frozen=True)
class VTCCLS(Method):
    """[CLS] attention, mean over heads, combined over the layers that end at the feature layer (arXiv 2412.05819).

    ::

        s[n] = ensemble_l  1/H Σ_h softmax_j(q_lh[CLS] · k_lh[j] / √d)[n]      j over all 1 + N keys

    The K patches with the largest s stay, in their order. They can be selected before the projector, or after a layer
    of the language model. The tower's last layer is never scored: if it is the feature layer, the scored layers end
    before it.

    The layers are VTC's choice. The authors recommend none, and their programs sum the layers 16 to 22 of LLaVA-1.5
    by default: `start_layer=16`.

    Parameters
    ----------
    ensemble : {"sum", "mean", "max", "min"}
        How the layers are combined. Default "sum". The paper finds "sum" (or "mean") better than "max" or "min".
    ensemble_layers : int
        Number of scored layers. They end at the feature layer. Default 3.
    start_layer : int, optional
        The first scored layer, counted from 0; it overrides `ensemble_layers`. Default None: not used. 16 is the
        default of the authors' programs.
    """

    name: ClassVar[str] = "vtc-cls"
    scores: ClassVar[str] = "[CLS] attention, several vision layers"
    paper: ClassVar[str] = "arXiv 2412.05819"
    needs: ClassVar[Needs] = Needs(cls_probs=True)
    prunes: ClassVar[tuple[str, ...]] = ("tower", "language")

    ensemble: str = "sum"
    ensemble_layers: int = 3
    start_layer: int | None = None

    def check(self) -> None:
        check_one_of("ensemble", self.ensemble, ops.ENSEMBLES)
        check_integer("ensemble_layers", self.ensemble_layers, 1)
        if self.start_layer is not None:
            check_integer("start_layer", self.start_layer, 0)

    def without_effect(self) -> dict[str, str]:
        if self.start_layer is None:
            return super().without_effect()
        return super().without_effect() | {"ensemble_layers": "start_layer names the first scored layer"}

    def scored_layers(self, end: int, depth: int) -> range:
        end = min(end, depth - 1)
        first = end - self.ensemble_layers if self.start_layer is None else self.start_layer
        if not 0 <= first < end:
            raise ValueError(
                f"cannot score vision layers {first} to {end - 1}: scored layers end at the feature layer, or before "
                f"the tower's last, here at {end - 1}, counted from 0; use ensemble_layers 1 to {end} or start_layer "
                f"0 to {end - 1}, got ensemble_layers={self.ensemble_layers}, start_layer={self.start_layer}"
            )
        return range(first, end)

    def ranking(self, outputs: VisionOutputs) -> Ranking:
        return Ranking(self.require(outputs, "cls_probs"), self.ensemble)

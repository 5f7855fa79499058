"""vLLM's own vision towers, CLIP and SigLIP: hooks read the queries and keys, and the attention runs as always."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vtc.hf.towers import tower_of
from vtc.methods import VisionOutputs
from vtc.plan import Plan
from vtc.scores import ClsScores
from vtc.vllm.model import mean_over_ranks


class Tower:
    """A vision tower of vLLM with hooks on those of its attention modules that the plan's method needs.

    Parameters
    ----------
    tower : Module
        vLLM's CLIPVisionModel or SiglipVisionModel, loaded up to the feature layer.
    plan : Plan
    projector : callable
        For a method that chooses by projected patches.
    select_layers : list of int, optional
        The feature layers, of a model with several.
    """

    def __init__(self, tower: Any, plan: Plan, projector: Any, select_layers: Any = None) -> None:
        self.tower, self.plan, self.projector, self.select_layers = tower, plan, projector, select_layers
        self.cls = tower_of(tower.vision_model.config).cls
        self.attentions = [layer.self_attn for layer in tower.vision_model.encoder.layers]
        self.over_ranks = mean_over_ranks(self.attentions[0].tp_size)
        self.scores: ClsScores | None = None  # of the pass that runs
        attention: Any
        for attention in self._scores().modules:
            attention.attn.register_forward_pre_hook(functools.partial(self._read, attention))

    def _scores(self) -> ClsScores:
        plan, needs = self.plan, self.plan.method.required
        scored = [self.attentions[number] for number in plan.scored]
        compared = scored[-1] if needs.keys == "feature" else None
        receiving = [self.attentions[number] for number in plan.received]
        return ClsScores(plan.config, scored if needs.cls_probs else [], compared, receiving, self.cls, self.over_ranks)

    def _read(self, attention: Any, _module: Any, args: tuple[Tensor, ...]) -> None:
        """Read the query and key `[B, 1 + N, H * D]` of this rank's heads."""
        if (scores := self.scores) is None:
            return
        heads = attention.num_heads_per_partition
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in args[:2])
        scores.read(attention, query, key, attention.scale)
        if scores.is_scored(attention):
            scores.note(query, key, attention.scale)

    def __call__(self, views: Tensor) -> VisionOutputs:
        """The outputs of views `[T, 3, height, width]` that the method needs."""
        scores = self.scores = self._scores()
        try:
            hidden = self.tower(views, select_layers=self.select_layers, feature_select_strategy="full")
        finally:
            self.scores = None
        if not scores.is_complete:
            raise ValueError(
                f"the vision tower, a {type(self.tower).__name__} of vLLM, did not call the attention of its layers, "
                "which VTC scores; use a version of vLLM that VTC was tested with"
            )
        needs = self.plan.method.required
        vision = VisionOutputs(
            hidden,
            self.plan.grid,
            scores.cls_probs,
            scores.keys,
            pixel_values=views if needs.pixels else None,
            cls=self.cls,
            received=scores.received,
        )
        return vision._replace(projected=self.projector(vision.patches)) if needs.projected else vision

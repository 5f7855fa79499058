"""What the vision tower sees of a call's images: whole images, tiles, or frames of a video.

A view is what one pass of the tower sees. There is a class for each of the three. It finds the views, counts the
placeholders of each image and how many of them stay, and encodes the views.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtc import ops
from vtc.config import VTCConfig, kept_count
from vtc.hf import compatibility, encode
from vtc.hf.families import VisualInput
from vtc.hf.settings import Settings
from vtc.hf.tiles import Tiling, flat_tiles, tilings
from vtc.hf.towers import tower_of
from vtc.plan import Plan, share_out


@dataclasses.dataclass
class ImageOutputs(BaseModelOutputWithPooling):
    """Encoded images, as transformers hands them on in `mm_encoder_outputs`.

    Attributes
    ----------
    last_hidden_state : Tensor[images, K, D]
        Projected features; rows beyond an image's own count are padding.
    pooler_output : list of Tensor[K, D]
        Of each image; for a stacked family the tensor.
    kept_indices : Tensor[images, K], int64, or None
        If the images have all N tokens: the patches that stay after `prune_layer`. None if the method selects them
        inside the language model.
    """

    kept_indices: Tensor | None = None


def plan_of(settings: Settings, layout: str | None = None, views: Tensor | None = None, **given: Any) -> Plan:
    """The settings applied to the model, and to `views` `[T, 3, height, width]` if they are known.

    `layout` is a name in `LAYOUTS`, by default that of the model's images. `given` are the arguments of `Plan.of` that
    a call may change.

    Raises
    ------
    ValueError
        If this model does not support the settings, or the views have another shape.
    """
    base, config = settings.base, settings.config
    spec = tower_of(base.vision_tower.config)
    kind = LAYOUTS[layout or settings.family.inputs[0].layout]
    num_registers = spec.num_registers(base.vision_tower.config)
    compatibility.require(base, config, settings.family, spec)
    if kind.needs_grid and num_registers:
        raise ValueError(f"{spec.name} puts register tokens among the patches, and {kind.layout} cannot have them")
    if views is not None and views.ndim != 4:
        raise ValueError(f"pixel_values must be [images, 3, height, width], got shape {tuple(views.shape)}")
    return Plan.of(
        config,
        base.config,
        vision=base.vision_tower.config,
        has_cls=spec.cls,
        num_registers=num_registers,
        size=None if views is None else views.shape[-2:],
        pool=kind.pool_of(base.config),
        shares_keep=kind.shares_keep,
        **given,
    )


def require(base: Any, config: VTCConfig) -> None:
    """Raise ValueError if the model `base` does not support `config`."""
    if config.compresses:
        plan_of(Settings.of(base)._replace(config=config))


@dataclasses.dataclass
class Views:
    """The images or videos of one call.

    Attributes
    ----------
    settings : Settings
    plan : Plan
        For each view.
    views : Tensor[T, 3, height, width]
    counts : list of (int, int)
        Of each image: N placeholders, and how many of them stay; an upper bound until an adaptive method has run.
    """

    settings: Settings
    plan: Plan
    views: Tensor
    counts: list[tuple[int, int]]
    layout: ClassVar[str]
    needs_grid: ClassVar[bool] = True  # tokens have to be patches in rows and columns, without registers
    shares_keep: ClassVar[bool] = False  # the views of an image share its K

    @classmethod
    def pool_of(cls, config: Any) -> int:
        """pool x pool patches become one before the selection."""
        return 1

    @classmethod
    def of(cls, settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Views:
        """Read the arguments of a call, or raise ValueError."""
        raise NotImplementedError

    def project(self) -> Tensor:
        """Encode: the projected features `[images, K, D]` of the tokens that stay. An adaptive method sets `counts`."""
        raise NotImplementedError

    def encode(self) -> ImageOutputs:
        """Encode: each image's tokens that stay; with `prune_layer` all tokens, and the indices of those to keep."""
        indices = None
        if self.plan.config.prune_after:
            features, indices = self._project_all()
        else:
            features = self.project()
        each: Any = features
        if not self.settings.family.stacked:
            each = [own[:count] for own, (_, count) in zip(features, self.counts, strict=True)]
        return ImageOutputs(last_hidden_state=features, pooler_output=each, kept_indices=indices)

    def _project_all(self) -> tuple[Tensor, Tensor | None]:
        """For `prune_layer` > 0: projected features `[images, N, D]` of all patches, and the indices `[images, K]`."""
        plan = self.plan
        vision, used = encode.run_tower(self.settings, self.views, plan)
        inside = plan.method.prunes_only_language()  # selected in the language model
        indices = None if inside else plan.method.select(vision, plan.num_kept)[0]
        encode.count(self.settings, plan, used, len(self.views), plan.num_tokens, plan.num_kept)
        self.counts = [(plan.num_tokens, plan.num_tokens)] * len(self.views)
        features: Tensor = self.settings.base.multi_modal_projector(vision.patches)
        return features, indices


class Whole(Views):
    """An image is one view."""

    layout, needs_grid = "whole", False

    @classmethod
    def of(cls, settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Whole:
        if call.get("image_sizes") is not None:
            raise ValueError("image_sizes is for towers that take images of any size, which VTC does not support")
        pixels = call[visual.pixels]
        plan = plan_of(settings, cls.layout, pixels, **_given(call))
        return cls(settings, plan, pixels, [(plan.num_tokens, plan.num_outputs)] * len(pixels))

    def project(self) -> Tensor:
        tokens, counts = encode.reduce(self.settings, self.views, self.plan)
        features = tokens.features
        if tokens.counts is not None:
            self.counts = [(self.plan.num_tokens, count) for count in counts]
            features = features[:, : max(counts)]
        projected: Tensor = self.settings.base.multi_modal_projector(features)
        return projected


class Frames(Views):
    """A video has several views, and the same number of tokens of each stays."""

    layout = "frames"

    @classmethod
    def pool_of(cls, config: Any) -> int:
        stride: int = config.spatial_pool_stride
        return stride

    @classmethod
    def of(cls, settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Frames:
        pixels = call[visual.pixels]
        if pixels.ndim != 5:
            raise ValueError(
                f"{visual.pixels} must be [videos, frames, 3, height, width], got shape {tuple(pixels.shape)}"
            )
        plan, frames = plan_of(settings, cls.layout, pixels[0], **_given(call)), pixels.shape[1]
        counts = [(frames * plan.num_tokens, frames * plan.num_outputs)] * len(pixels)
        return cls(settings, plan, pixels.flatten(0, 1), counts)

    def project(self) -> Tensor:
        tokens, _ = encode.reduce(self.settings, self.views, self.plan)
        projected: Tensor = self.settings.base.multi_modal_projector(tokens.features)
        return projected.reshape(len(self.counts), -1, projected.shape[-1])


@dataclasses.dataclass
class Tiles(Views):
    """An image is a base image and tiles, which share its K."""

    tiles: list[Tiling]
    layout, shares_keep = "tiles", True

    @classmethod
    def of(cls, settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Tiles:
        sizes = call.get("image_sizes")
        if sizes is None:
            raise ValueError("image_sizes is needed to know an image's tiles; pass on what the processor returned")
        tiles = tilings(settings, sizes)
        views = flat_tiles(call[visual.pixels], tiles, visual.pixels)
        plan = plan_of(settings, cls.layout, views, **_given(call))
        counts = [(len(tiling.layout), kept_count(plan.config, len(tiling.layout))) for tiling in tiles]
        return cls(settings, plan, views, counts, tiles)

    def project(self) -> Tensor:
        base, plan, backend = self.settings.base, self.plan, self.plan.config.backend
        vision, used = encode.run_tower(self.settings, self.views, plan)
        features, scores = vision.patches, plan.method.select(vision, 1)[1]  # [T, N, D], [T, N]
        selected, first = [], 0
        for tiling, (tokens, kept) in zip(self.tiles, self.counts, strict=True):
            ranking = share_out(scores[first : first + tiling.num_tiles], tiling.layout, plan.config.tiles)
            layout = tiling.layout.to(features.device)
            numbers = layout[ops.topk(ranking[None], kept, backend=backend)[0]]
            selected.append(torch.where(numbers < 0, numbers, numbers + first * plan.num_tokens))
            first += tiling.num_tiles
            encode.count(self.settings, plan, used, 1, tokens, kept)
        numbers = torch.cat(selected)
        keeps_all = all(tokens == kept for tokens, kept in self.counts)
        if keeps_all:  # exactly what the stock model computes
            features = base.multi_modal_projector(features)
        visual = ops.compact(features.flatten(0, 1)[None], numbers.clamp(min=0)[None], backend=backend)[0]
        if not keeps_all:
            visual = base.multi_modal_projector(visual)
        visual = torch.where(numbers[:, None] < 0, base.image_newline.to(visual), visual)
        return torch.nn.utils.rnn.pad_sequence(visual.split([kept for _, kept in self.counts]), batch_first=True)


LAYOUTS: dict[str, type[Views]] = {each.layout: each for each in (Whole, Tiles, Frames)}


def views_of(settings: Settings, call: dict[str, Any]) -> dict[VisualInput, Views]:
    """The images and videos among the arguments of a call."""
    return {each: LAYOUTS[each.layout].of(settings, each, call) for each in settings.family.inputs_of(call)}


def _given(call: dict[str, Any]) -> dict[str, Any]:
    layer = call.get("vision_feature_layer", call.get("vision_feature_layers"))
    return {"feature_layer": layer, "strategy": call.get("vision_feature_select_strategy")}

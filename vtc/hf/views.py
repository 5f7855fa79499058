"""What the vision tower sees of a call's images: whole images, tiles, or frames of a video.

A view is what one pass of the tower sees. There is a class for each of the three. It finds the views, counts the
placeholders of each image and how many of them stay, and encodes the views.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtc import ops
from vtc.config import VTCConfig
from vtc.hf import compatibility, encode
from vtc.hf.families import VisualInput, family_of
from vtc.hf.lone_image import LoneImage
from vtc.hf.prompt import Kept, Patches, Prompt
from vtc.hf.question import question_of, repeated
from vtc.hf.settings import Settings
from vtc.hf.tiles import tilings
from vtc.hf.towers import INTERPOLATION, TowerSpec, tower_of
from vtc.methods import Question
from vtc.plan import Plan, patch_grid
from vtc.tiles import Tiling, best_places, flat_tiles, is_whole, kept_of_tiles, kept_of_view, numbers_of, reduce_each


@dataclasses.dataclass
class ImageOutputs(BaseModelOutputWithPooling):
    """Encoded images, as transformers hands them on in `mm_encoder_outputs`.

    Attributes
    ----------
    last_hidden_state : Tensor[images, K, D]
        Projected features; rows beyond an image's own count are padding.
    pooler_output : list of Tensor[K, D]
        Of each image; for a stacked family and for videos the tensor.
    selections : tuple of Tensor[images, K], int64, or None
        For each stage inside the language model, which of an image's tokens before it stay. None if the method selects
        them there itself.
    is_counted : bool
        Whether the prompt of this call was shortened to these features. It holds for one prefill: a caller may keep the
        outputs, and pass them with another prompt. It is no field: parts that transformers cuts lack it.
    """

    selections: tuple[Tensor, ...] | None = None
    is_counted = False  # without an annotation, so it is no field


# Arguments of a call that the stock model hands on to its vision tower, and that change what the tower computes.
TOWER_ARGUMENTS = (INTERPOLATION, "bool_masked_pos")


def plan_of(
    settings: Settings,
    layout: str | None = None,
    views: Tensor | None = None,
    tower_arguments: dict[str, Any] | None = None,
    **given: Any,
) -> Plan:
    """The settings applied to the model, and to `views` `[T, 3, height, width]` if they are known.

    `layout` is a name in `LAYOUTS`, by default that of the model's images. `tower_arguments` go to the vision tower.
    `given` are the arguments of `Plan.of` that a call may change.

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
    if views is not None:
        _require_size(base, views, tower_arguments or {})
    plan = Plan.of(
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
    if plan.method.view_grid(plan.grid, plan.num_kept) != plan.grid:
        _require_interpolation(base.vision_tower, spec, config)
    return plan


def require(base: Any, config: VTCConfig) -> None:
    """Raise ValueError if the model `base` does not support `config`."""
    if config.compresses:
        plan_of(Settings(base, family_of(base), config))


def require_pixels(settings: Settings, pixels: Any, name: str = "pixel_values", layout: str = "whole") -> None:
    """Raise ValueError if `pixels`, the argument `name` of a call, is no tensor of a shape that `layout` takes."""
    shapes = LAYOUTS[layout].shapes
    expected = f"{name} must be {' or '.join(shapes)}"
    if not isinstance(pixels, Tensor):
        raise ValueError(
            f"{expected}, got a {type(pixels).__name__}; pass the tensor that the processor returns with "
            "return_tensors='pt'"
        )
    channels = settings.base.config.vision_config.num_channels
    if pixels.ndim not in [shape.count(",") + 1 for shape in shapes] or pixels.shape[-3] != channels:
        raise ValueError(f"{expected}, got shape {tuple(pixels.shape)}")
    if 0 in pixels.shape:
        raise ValueError(f"{name} of shape {tuple(pixels.shape)} holds no image; leave it out, or pass an image")


def _require_size(base: Any, views: Tensor, tower_arguments: dict[str, Any]) -> None:
    """Raise ValueError if the vision tower has no position embeddings for views of this size."""
    vision, option = base.config.vision_config, INTERPOLATION
    if math.prod(patch_grid(vision, views.shape[-2:])) == math.prod(patch_grid(vision)) or tower_arguments.get(option):
        return
    if option in inspect.signature(base.vision_tower.forward).parameters:  # the other towers always interpolate
        height, width = views.shape[-2:]
        raise ValueError(
            f"images of {height} x {width} pixels do not fit the vision tower, which takes {vision.image_size}; resize "
            f"them as the model's processor does, or pass {option}=True to forward() or get_image_features()"
        )


def _require_interpolation(tower: Any, spec: TowerSpec, config: VTCConfig) -> None:
    """Raise ValueError if the vision tower takes images of one size only."""
    if spec.interpolation and spec.interpolation not in inspect.signature(tower.forward).parameters:
        raise ValueError(
            f"method {config.name!r} makes images smaller, and the vision tower, a {type(tower).__name__}, has no "
            f"{spec.interpolation} in its forward(); use the {spec.name} of transformers, or another method"
        )


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
    tower_arguments : dict
        Of the call, for the vision tower; see `TOWER_ARGUMENTS`.
    kept : Tensor, bool, or Patches or a function that make it, or None
        Of each placeholder, image after image, whether its patch stays. None before `encode`, and if tokens are no
        patches.
    question : Question or None
        Of each view, for a method that needs it. None before `ask`.
    later : tuple of Tensor[images, K], int64
        For each later stage of a schedule, which of an image's tokens before it stay.
    """

    settings: Settings
    plan: Plan
    views: Tensor
    counts: list[tuple[int, int]]
    tower_arguments: dict[str, Any]
    kept: Kept = dataclasses.field(default=None, init=False)
    question: Question | None = dataclasses.field(default=None, init=False)
    later: tuple[Tensor, ...] = dataclasses.field(default=(), init=False)
    layout: ClassVar[str]
    shapes: ClassVar[tuple[str, ...]]  # of the pixels
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
        """Encode: the projected features `[images, K, D]` of the tokens that stay. Sets `kept`, and maybe `counts`."""
        raise NotImplementedError

    @property
    def views_of_images(self) -> list[int]:
        """How many views each image has."""
        return [1] * len(self.counts)

    def ask(self, prompt: Prompt | LoneImage, sizes: Mapping[int, Sequence[int]], token: int) -> None:
        """Set `question` from the prompt with these images, whose placeholder is `token`; see `question_of`."""
        if self.plan.method.needs.question:
            self.question = repeated(question_of(self.settings, prompt, sizes, token), self.views_of_images)

    def _reduce(self) -> tuple[Tensor, list[int] | None]:
        """The projected tokens `[T, K, D]` of the views, and how many each has if they differ. Sets `kept`."""
        projector = self.settings.base.multi_modal_projector
        tokens, counts, projected = encode.reduce(
            self.settings, self.views, self.plan, self.tower_arguments, self.question, projector
        )
        if self.plan.method.keeps_patches() and tokens.indices is not None:
            self.kept = Patches(tokens.indices, self.plan.num_tokens)
            if self.plan.config.schedule and tokens.scores is not None:
                self.later = self._nested(tokens.indices, tokens.scores)
        return cast("Tensor", projected), None if tokens.counts is None else counts

    def _nested(self, indices: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        """For each later stage, the places `[images, K]` of the largest scores among the tokens of the one before."""
        stages, config = [], self.plan.config
        for _, keep in (config.schedule or ())[1:]:
            scores = scores.gather(1, indices)
            indices = ops.topk(scores, keep, backend=config.backend)
            stages.append(indices)
        return tuple(stages)

    def encode(self) -> ImageOutputs:
        """Encode: each image's tokens that stay; with `prune_layer` all tokens, and which of them to keep."""
        selections: tuple[Tensor, ...] | None
        if self.plan.config.prune_after:
            features, selections = self._project_all()
        else:
            features = self.project()
            selections = self.later
        each: Any = features
        if not (self.settings.family.stacked or self.layout == "frames"):
            each = [own[:count] for own, (_, count) in zip(features, self.counts, strict=True)]
        return ImageOutputs(last_hidden_state=features, pooler_output=each, selections=selections)

    def _project_all(self) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """For `prune_layer` > 0: projected features `[images, N, D]` of all patches, and each stage's selection."""
        plan, settings = self.plan, self.settings
        inside = plan.method.prunes_only_language()  # selected in the language model

        def run(views: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None, list[str]]:
            vision, used = encode.run_tower(settings, views, plan, self.tower_arguments, self.question)
            selections = None
            if not inside:
                indices, scores = plan.method.selected(vision, plan.num_kept)
                selections = (indices, *self._nested(indices, scores))
            return settings.base.multi_modal_projector(vision.patches), selections, used

        if self.question is None and encode.is_replayable(plan.method):
            found = encode.recorded(settings, "project all", plan, self.tower_arguments, run, self.views)
        else:
            found = run(self.views)
        features, selections, used = found
        encode.count(settings, plan, used, len(self.views), plan.num_tokens, plan.num_kept)
        self.counts = [(plan.num_tokens, plan.num_tokens)] * len(self.views)
        return features, selections


class Whole(Views):
    """An image is one view."""

    layout, needs_grid, shapes = "whole", False, ("[images, 3, height, width]",)

    @classmethod
    def of(cls, settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Whole:
        if call.get("image_sizes") is not None:
            raise ValueError("image_sizes is for towers that take images of any size, which VTC does not support")
        pixels = call[visual.pixels]
        plan, extra = plan_of(settings, cls.layout, pixels, **_given(call)), _tower_arguments(call)
        return cls(settings, plan, pixels, [(plan.num_tokens, plan.num_outputs)] * len(pixels), extra)

    def project(self) -> Tensor:
        projected, counts = self._reduce()
        if counts is not None:
            self.counts = [(self.plan.num_tokens, count) for count in counts]
        return projected


class Frames(Views):
    """A video has several views, and the same number of tokens of each stays."""

    layout, shapes = "frames", ("[videos, frames, 3, height, width]",)

    @classmethod
    def pool_of(cls, config: Any) -> int:
        stride: int = config.spatial_pool_stride
        return stride

    @classmethod
    def of(cls, settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Frames:
        pixels = call[visual.pixels]
        rows, columns = patch_grid(settings.base.config.vision_config, pixels.shape[-2:])
        if rows != columns:
            raise ValueError(f"frames must be square, {visual.pixels} has {rows} rows and {columns} columns of patches")
        plan, frames = plan_of(settings, cls.layout, pixels[0], **_given(call)), pixels.shape[1]
        counts = [(frames * plan.num_tokens, frames * plan.num_outputs)] * len(pixels)
        return cls(settings, plan, pixels.flatten(0, 1), counts, _tower_arguments(call))

    @property
    def views_of_images(self) -> list[int]:
        return [len(self.views) // len(self.counts)] * len(self.counts)

    def project(self) -> Tensor:
        projected, _ = self._reduce()
        return projected.reshape(len(self.counts), -1, projected.shape[-1])


@dataclasses.dataclass
class Tiles(Views):
    """An image is a base image and tiles, which share its K: by their scores, or each gets the same number."""

    tiles: list[Tiling]
    layout, shares_keep = "tiles", True
    shapes = ("[images, tiles, 3, height, width]", "[tiles, 3, height, width]")

    @classmethod
    def of(cls, settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Tiles:
        sizes = call.get("image_sizes")
        if sizes is None:
            raise ValueError("image_sizes is needed to know an image's tiles; pass on what the processor returned")
        tiles = tilings(settings, sizes)
        views = flat_tiles(call[visual.pixels], tiles, visual.pixels)
        plan, vision = plan_of(settings, cls.layout, views, **_given(call)), settings.base.config.vision_config
        if plan.grid != patch_grid(vision):
            raise ValueError(
                f"tiles of {views.shape[-2]} x {views.shape[-1]} pixels do not fit {settings.family.name}, which puts "
                f"tiles of {vision.image_size} together; use the model's processor"
            )
        sizes = [len(tiling.layout) for tiling in tiles]
        counts = [(n, kept_of_tiles(plan, n, tiling.num_tiles)) for n, tiling in zip(sizes, tiles, strict=True)]
        return cls(settings, plan, views, counts, _tower_arguments(call), tiles)

    @property
    def views_of_images(self) -> list[int]:
        return [tiling.num_tiles for tiling in self.tiles]

    def project(self) -> Tensor:
        each = self.plan.method.per_view and not self._keeps_all
        return self._project_each() if each else self._project_best()

    @property
    def _keeps_all(self) -> bool:
        return is_whole(self.plan) and all(tokens == kept for tokens, kept in self.counts)

    def _count(self, used: list[str]) -> None:
        """Count the images, whose tokens are the means of theirs."""
        before, after = (round(sum(each) / len(self.counts)) for each in zip(*self.counts, strict=True))
        encode.count(self.settings, self.plan, used, len(self.counts), before, after)

    def _project_each(self) -> Tensor:
        """The tokens of each view, reduced alone; the base image's first. If K = N, all tokens of the image."""
        plan, rows, newlines, first = self.plan, [], [], 0
        resizes = plan.method.view_grid(plan.grid, plan.num_kept) != plan.grid
        if not resizes:
            vision, used = encode.run_tower(self.settings, self.views, plan, self.tower_arguments, self.question)
        for tiling, (_, kept) in zip(self.tiles, self.counts, strict=True):
            views = slice(first, first + tiling.num_tiles)
            if resizes:  # to sizes of their own
                alone = plan._replace(num_kept=kept_of_view(plan, tiling, kept))
                own, used = encode.run_tower(self.settings, self.views[views], alone, self.tower_arguments)
            else:
                own = vision.of_views(views)
            features, is_newline = reduce_each(plan, own, tiling, kept)
            rows.append(features)
            newlines.append(is_newline)
            first += tiling.num_tiles
        self._count(used)
        visual = self.settings.base.multi_modal_projector(torch.cat(rows))
        return self._with_newlines(visual, torch.cat(newlines))

    def _project_best(self) -> Tensor:
        """The best tokens of all views."""
        base, plan = self.settings.base, self.plan
        seen = plan._replace(num_kept=plan.num_tokens) if self._keeps_all else plan
        vision, used = encode.run_tower(self.settings, self.views, seen, self.tower_arguments, self.question)
        features = vision.patches  # [T, N, D]
        places = best_places(plan, vision, self.tiles, [kept for _, kept in self.counts])
        self.kept = torch.cat([Patches(own[None], len(t.layout))() for own, t in zip(places, self.tiles, strict=True)])
        self._count(used)
        numbers = numbers_of(places, self.tiles, plan.num_tokens)
        if self._keeps_all:  # exactly what the stock model computes
            features = base.multi_modal_projector(features)
        visual = ops.compact(features.flatten(0, 1)[None], numbers.clamp(min=0)[None], backend=plan.config.backend)[0]
        if not self._keeps_all:
            visual = base.multi_modal_projector(visual)
        return self._with_newlines(visual, numbers < 0)

    def _with_newlines(self, visual: Tensor, newlines: Tensor) -> Tensor:
        """Projected features `[images, K, D]` from those of all images `[M, D]`; `newlines` `[M]` bool are replaced."""
        visual = torch.where(newlines[:, None], self.settings.base.image_newline.to(visual), visual)
        return torch.nn.utils.rnn.pad_sequence(visual.split([kept for _, kept in self.counts]), batch_first=True)


LAYOUTS: dict[str, type[Views]] = {each.layout: each for each in (Whole, Tiles, Frames)}


def views_of(settings: Settings, call: dict[str, Any]) -> dict[VisualInput, Views]:
    """The images and videos among the arguments of a call."""
    return {each: read(settings, each, call) for each in settings.family.inputs_of(call)}


def read(settings: Settings, visual: VisualInput, call: dict[str, Any]) -> Views:
    """The images or videos among the arguments of a call, or ValueError."""
    require_pixels(settings, call[visual.pixels], visual.pixels, visual.layout)
    return LAYOUTS[visual.layout].of(settings, visual, call)


def asked(settings: Settings, call: dict[str, Any]) -> tuple[Tensor, Question | None]:
    """The views `[T, 3, height, width]` of a call's images, and the question of each, for a method that needs it."""
    views = views_of(settings, call)
    tokens = {visual: getattr(settings.base.config, visual.token) for visual in views}
    sizes = {tokens[visual]: [n for n, _ in each.counts] for visual, each in views.items()}
    image = settings.family.inputs[0]
    views[image].ask(Prompt.read(call["input_ids"], call.get("attention_mask"), sizes), sizes, tokens[image])
    return views[image].views, views[image].question


def _given(call: dict[str, Any]) -> dict[str, Any]:
    layer = call.get("vision_feature_layer", call.get("vision_feature_layers"))
    strategy = call.get("vision_feature_select_strategy")
    return {"feature_layer": layer, "strategy": strategy, "tower_arguments": _tower_arguments(call)}


def _tower_arguments(call: dict[str, Any]) -> dict[str, Any]:
    return {name: call[name] for name in TOWER_ARGUMENTS if call.get(name) is not None}

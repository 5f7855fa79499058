"""Which LLaVA models and vision towers VTC knows, and how each differs from the rest: data and small adapters.

One entry per model and per tower; README's table is made of them (`table`). Neither torch
nor transformers is imported here, for `import vtc` reads the names of transformers' modules from `MODELS`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Visual(NamedTuple):
    """One kind of visual input of a model: the names that transformers gives to what belongs to it."""

    token: str  # the placeholder's id in the model's config
    pixels: str  # the argument that holds the pixels
    get: str  # the method that encodes them
    layout: str  # "whole": an image is one picture; "tiles": a base picture and tiles; "frames": a video


IMAGE = Visual("image_token_id", "pixel_values", "get_image_features", "whole")
TILES = IMAGE._replace(layout="tiles")
VIDEO = Visual("video_token_id", "pixel_values_videos", "get_video_features", "frames")


class Model(NamedTuple):
    """One family of models in transformers."""

    name: str
    prefix: str  # of its classes' names
    module: str
    visuals: tuple[Visual, ...]
    budget: str  # what `keep` counts, for README
    stacked: bool = False  # its pooler_output is one tensor [images, K, D], elsewhere a list

    def refusal(self, method: str) -> str | None:
        """Why `method` does not work with this model, as a clause, or None if it does."""
        about = _registry()[method]
        tiled = any(visual.layout != "whole" for visual in self.visuals)
        if tiled and about.prunes == ("language",):
            return (
                f"prunes in the language model alone, and there {self.name}'s pictures of an image are not told apart"
            )
        if tiled and not about.keeps_patches() and method != "none":
            return f"makes new tokens of an image's patches, and a {self.name} image or video is several pictures"
        if self.stacked and about.adaptive:
            return f"gives images different numbers of tokens, and {self.name} takes as many from each"
        return None

    def methods(self) -> tuple[str, ...]:
        """The methods that work with this model."""
        return tuple(method for method in _registry() if self.refusal(method) is None)


MODELS = {
    "llava": Model("LLaVA-1.5", "Llava", "transformers.models.llava.modeling_llava", (IMAGE,), "per image"),
    "vipllava": Model(
        "VipLLaVA", "VipLlava", "transformers.models.vipllava.modeling_vipllava", (IMAGE,), "per image", stacked=True
    ),
    "llava_next": Model(
        "LLaVA-NeXT (1.6)",
        "LlavaNext",
        "transformers.models.llava_next.modeling_llava_next",
        (TILES,),
        "per image, base picture and tiles together",
    ),
    "llava_next_video": Model(
        "LLaVA-NeXT-Video",
        "LlavaNextVideo",
        "transformers.models.llava_next_video.modeling_llava_next_video",
        (TILES, VIDEO),
        "per image as LLaVA-NeXT, and per frame of a video, after pooling",
    ),
}


def _run_layer(layer: Any, hidden: Tensor, scores: Any = None) -> Tensor:
    """One layer on `[B, cls + N, D]`; `scores`, if given, reaches the attention function as `vtc_scores`."""
    return layer(hidden, None, **({} if scores is None else {"vtc_scores": scores}))


def _run_dinov2_layer(layer: Any, hidden: Tensor, scores: Any = None) -> Tensor:
    """As `_run_layer`; some versions of transformers, 5.17 for one, pass no arguments on to DINOv2's attention."""
    if scores is None:
        return layer(hidden)
    if any(p.kind == p.VAR_KEYWORD for p in inspect.signature(type(layer).forward).parameters.values()):
        return layer(hidden, None, vtc_scores=scores)
    attended = layer.attention(layer.norm1(hidden), vtc_scores=scores)
    hidden = hidden + layer.drop_path(layer.layer_scale1(attended))
    return hidden + layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(hidden))))


class Tower(NamedTuple):
    """One vision tower of transformers, by its config's `model_type`."""

    name: str
    layers: str  # path to its list of layers
    layer_norm: str  # of a layer: the norm before its attention
    norm: str = ""  # the norm between embeddings and layers
    cls: bool = True  # whether a [CLS] token comes first
    registers: str = ""  # the config's name for the number of register tokens that follow it
    run_layer: Callable[..., Any] = _run_layer

    def visual_tokens(self, config: Any, patches: int) -> int:
        """N: what a LLaVA makes placeholders for. Registers count, for they are features like the patches'."""
        return patches + (getattr(config, self.registers) if self.registers else 0)

    def layers_of(self, tower: Any) -> Any:
        """Its layers, in order."""
        return operator.attrgetter(self.layers)(tower)

    def embed(self, tower: Any, pixel_values: Tensor) -> Tensor:
        """What enters the first layer, `[B, cls + N, D]`, of pixels `[B, 3, height, width]`."""
        hidden = tower.embeddings(pixel_values.to(tower.dtype))
        return getattr(tower, self.norm)(hidden) if self.norm else hidden

    def projections(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of the first token `[B, C]` and keys `[B, cls + N, C]` of a layer that does not run, of its input."""
        normed = getattr(layer, self.layer_norm)(hidden)
        parts = {name.rpartition(".")[2]: part for name, part in layer.named_modules()}
        # transformers 5.17 has DINOv2's projections as query and key
        query, key = (next(parts[n] for n in names if n in parts) for names in (("q_proj", "query"), ("k_proj", "key")))
        return query(normed[:, 0]), key(normed)

    def refusal(self, method: str) -> str | None:
        """Why `method` does not work with this tower, as a clause, or None if it does."""
        about = _registry()[method]
        if about.needs_cls() and not self.cls:
            return f"needs a vision tower with a [CLS] token, and {self.name} has none"
        if about.needs.grid and self.registers:
            return f"needs patches alone, and {self.name} puts register tokens among them"
        return None

    def methods(self) -> tuple[str, ...]:
        """The methods that work with this tower."""
        return tuple(method for method in _registry() if self.refusal(method) is None)


TOWERS = {
    "clip_vision_model": Tower("CLIP", "encoder.layers", "layer_norm1", norm="pre_layrnorm"),
    "dinov2": Tower("DINOv2", "encoder.layer", "norm1", run_layer=_run_dinov2_layer),
    "dinov2_with_registers": Tower(
        "DINOv2 with registers", "encoder.layer", "norm1", registers="num_register_tokens", run_layer=_run_dinov2_layer
    ),
    "vit": Tower("ViT", "layers", "layernorm_before"),
    "siglip_vision_model": Tower("SigLIP", "encoder.layers", "layer_norm1", cls=False),
}


def _registry() -> dict[str, Any]:
    """`vtc.methods.METHODS`, imported on first need, for it needs torch."""
    from vtc.methods import METHODS as registry

    return dict(registry)


def classes(model: Model) -> tuple[str, str]:
    """Names of its class without and with a head for generation."""
    return f"{model.prefix}Model", f"{model.prefix}ForConditionalGeneration"


_BY_CLASS = {(model.module, name): model for model in MODELS.values() for name in classes(model)}


def model_of(module: object) -> Model | None:
    """Return the entry of `MODELS` whose base class or generating class `module` is an instance of, or None."""
    known = (_BY_CLASS.get((cls.__module__, cls.__name__)) for cls in type(module).__mro__)
    return next((model for model in known if model), None)


def tower_of(config: Any) -> Tower:
    """Return the entry of `TOWERS` for a tower's config.

    Raises
    ------
    ValueError
        If the tower is not known.
    """
    if config.model_type not in TOWERS:
        raise ValueError(
            f"the vision tower {config.model_type!r} is not supported; VTC knows {', '.join(TOWERS)}; use a LLaVA with "
            "such a tower, or vtc.disable(model)"
        )
    return TOWERS[config.model_type]


def table() -> str:
    """README's tables of models and towers, in Markdown."""
    names = tuple(_registry())
    lines = ["| model | class in transformers | what `keep` counts | methods |", "|---|---|---|---|"]
    for model in MODELS.values():
        works = "all" if model.methods() == names else ", ".join(f"`{method}`" for method in model.methods())
        lines += [f"| {model.name} | `{classes(model)[1]}` | {model.budget} | {works} |"]
    lines += ["", "| vision tower | " + " | ".join(f"`{method}`" for method in names) + " |"]
    lines += ["|---|" + "---|" * len(names)]
    for tower in TOWERS.values():
        marks = ["yes" if method in tower.methods() else "no" for method in names]
        lines += [f"| {tower.name} | {' | '.join(marks)} |"]
    return "\n".join(lines)

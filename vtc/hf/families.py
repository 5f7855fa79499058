"""The LLaVA models that VTC supports, and how they differ, as data. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

from vtc.hf.unsupported import UNSUPPORTED


class VisualInput(NamedTuple):
    """One kind of visual input of a model: the names that transformers gives to what belongs to it."""

    token: str  # the placeholder's id in the model's config
    pixels: str  # the argument that holds the pixels
    get: str  # the method that encodes them
    modality: str  # its key in `mm_encoder_outputs`
    layout: str  # a name of `vtc.hf.views.LAYOUTS`: how the tower sees it


IMAGE = VisualInput("image_token_id", "pixel_values", "get_image_features", "image", "whole")
TILES = IMAGE._replace(layout="tiles")
VIDEO = VisualInput("video_token_id", "pixel_values_videos", "get_video_features", "video", "frames")


class Family(NamedTuple):
    """One family of models in transformers."""

    name: str
    prefix: str  # of its classes' names
    module: str
    inputs: tuple[VisualInput, ...]
    budget: str  # what `keep` counts, for the documents
    stacked: bool = False  # its pooler_output is one tensor [images, K, D], elsewhere a list

    @property
    def classes(self) -> tuple[str, str]:
        """Names of its class without and with a head for generation."""
        return f"{self.prefix}Model", f"{self.prefix}ForConditionalGeneration"

    @property
    def is_one_view(self) -> bool:
        """Whether the vision tower sees an image in one pass, neither as tiles nor as frames."""
        return all(each.layout == IMAGE.layout for each in self.inputs)

    @property
    def has_frames(self) -> bool:
        """Whether it takes videos."""
        return any(each.layout == VIDEO.layout for each in self.inputs)

    def inputs_of(self, call: dict[str, Any]) -> tuple[VisualInput, ...]:
        """The visual inputs whose pixels are among the arguments of a call."""
        return tuple([each for each in self.inputs if call.get(each.pixels) is not None])


FAMILIES = {
    "llava": Family("LLaVA-1.5", "Llava", "transformers.models.llava.modeling_llava", (IMAGE,), "per image"),
    "vipllava": Family(
        "VipLLaVA", "VipLlava", "transformers.models.vipllava.modeling_vipllava", (IMAGE,), "per image", stacked=True
    ),
    "llava_next": Family(
        "LLaVA-NeXT (1.6)",
        "LlavaNext",
        "transformers.models.llava_next.modeling_llava_next",
        (TILES,),
        "per image, base image and tiles together",
    ),
    "llava_next_video": Family(
        "LLaVA-NeXT-Video",
        "LlavaNextVideo",
        "transformers.models.llava_next_video.modeling_llava_next_video",
        (TILES, VIDEO),
        "per image as LLaVA-NeXT, and per frame of a video, after pooling",
    ),
}
_BY_CLASS = {(family.module, name): family for family in FAMILIES.values() for name in family.classes}


def find_family(module: object) -> Family | None:
    """The family whose base class or generating class `module` is an instance of, or None."""
    for cls in type(module).__mro__:
        if family := _BY_CLASS.get((cls.__module__, cls.__name__)):
            return family
    return None


def family_of(base: object) -> Family:
    """The family of `base`, or ValueError."""
    family = find_family(base)
    if family is None:
        raise ValueError(f"{type(base).__name__} is not a model that VTC knows: {', '.join(FAMILIES)}")
    return family


def find_llava(model: Any) -> Any:
    """Return the LLaVA inside `model`, which may be wrapped (an adapter, for instance), or raise ValueError."""
    if isinstance(model, type) or not callable(getattr(model, "modules", None)):
        got = {str: repr(model), type: f"the class {getattr(model, '__name__', '')}"}.get(
            type(model), type(model).__name__
        )
        raise ValueError(
            f"got {got}, which is no model; pass the model itself, for instance "
            f"{FAMILIES['llava'].classes[1]}.from_pretrained(...)"
        )
    for module in model.modules():
        if find_family(module):
            return module.base_model if hasattr(module, "base_model") else module
    kind = getattr(getattr(model, "config", None), "model_type", None)
    why = type_refusal(kind) if kind in UNSUPPORTED else None
    classes = ", ".join(family.classes[1] for family in FAMILIES.values())
    raise ValueError(
        f"{type(model).__name__} {why}"
        if why
        else f"{type(model).__name__} holds no LLaVA model; vtc works on transformers' {classes}"
    )


def type_refusal(model_type: str | None) -> str | None:
    """Why VTC does not support models of this type, as a clause, or None if it does."""
    if model_type in FAMILIES:
        return None
    name, why = UNSUPPORTED.get(model_type or "", ("", ""))
    about = f" ({name})" if name else ""
    reason = f": {why}" if why else ""
    names = ", ".join(f"{key} ({family.name})" for key, family in FAMILIES.items())
    return f"is of type {model_type!r}{about}, which is not supported{reason}; VTC supports {names}"

"""Prompts in vLLM: as many placeholders as an image keeps, and what its vision tower is told with the pixels.

Two mixins for the classes by which vLLM reads the prompts of a model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement

from vtc.config import VTCConfig, kept_count
from vtc.hf.families import TILES
from vtc.plan import Plan
from vtc.tiles import kept_of_tiles
from vtc.vllm import settings
from vtc.vllm.settings import KEY

# Not "pixel_values": vLLM's own class, in a process without VTC, would make N features of them, and for the K
# placeholders vLLM would take the first K of these, without a word.
PIXELS = "vtc_pixel_values"
KEEP = "vtc_keep"  # K of each image
_VERSION = metadata.version("vtc-cls")


def num_tiles(hf_config: Any, height: int, width: int) -> int:
    """The number of tiles of an image of so many pixels, with the base image; 0: the model has no tiles."""
    if settings.family_of(hf_config).inputs[0].layout != TILES.layout:
        return 0
    pinpoints, side = hf_config.image_grid_pinpoints, hf_config.vision_config.image_size
    count: int = image_size_to_num_patches((height, width), pinpoints, side)
    return count


class CompressedInfo:
    """Mixin for a LLaVA's processing info."""

    get_hf_config: Any

    @functools.cached_property
    def vtc(self) -> Plan | None:
        """The engine's settings, applied to the model; None: the stock model."""
        return settings.plan_of(self.get_hf_config())

    @property
    def model_id(self) -> str:
        """The model in the hash of an image, by which caches know it. Of VTC's versions, each has its own features."""
        stock: str = super().model_id  # type: ignore[misc]
        return stock if self.vtc is None else f"{stock}+vtc-{_VERSION}"

    def get_hf_processor(self, **kwargs: object) -> Any:
        kwargs.pop(KEY, None)
        return super().get_hf_processor(**kwargs)  # type: ignore[misc]

    def kept(self, config: VTCConfig, num_tokens: int, height: int, width: int) -> tuple[int, int]:
        """Return `keep` for an image of `num_tokens` placeholders, and the number of tokens that stay.

        Raises
        ------
        ValueError
            If the settings do not fit the image, or keep more than the engine's.
        """
        plan = self.vtc
        if plan is None:
            return num_tokens, num_tokens

        def count(config: VTCConfig) -> tuple[int, int]:
            if tiles := num_tiles(self.get_hf_config(), height, width):
                kept = kept_of_tiles(plan._replace(config=config), num_tokens, tiles)
                return kept, kept
            keep = kept_count(config, num_tokens)
            return keep, plan.method.num_outputs(num_tokens, keep)

        own = count(config)
        if config != plan.config:
            settings.require_fewer(own[1], count(plan.config)[1])
        return own


class CompressedProcessor:
    """Mixin for a LLaVA's processor."""

    info: Any

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Read a prompt. The settings of the request become part of the hash of its images."""
        given = inputs.hf_processor_mm_kwargs
        if (plan := self.info.vtc) is None:
            if KEY in given:
                raise ValueError(
                    f"a request has the settings {KEY}={given[KEY]!r}, and this engine was started without; start it "
                    f"with {settings.FLAG}.keep 64, for instance"
                )
        else:
            config = settings.requested(plan.config, given.get(KEY))
            inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs={**given, KEY: settings.text_of(config)})
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def settings_of(self, mm_kwargs: Mapping[str, Any]) -> VTCConfig:
        """The settings that `apply` has put into a request's arguments."""
        return settings.of_text(mm_kwargs[KEY])

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        kwargs = {name: value for name, value in hf_kwargs.items() if name != KEY}
        return super()._get_hf_mm_inputs(mm_items, kwargs)  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        if self.info.vtc is None or hf_inputs.get("pixel_values") is None:
            return fields
        config = self.settings_of(hf_processor_mm_kwargs)
        hf_inputs[KEEP] = torch.tensor([keep for keep, _ in self.kept_of_inputs(hf_inputs, config)])
        hf_inputs[PIXELS] = hf_inputs.pop("pixel_values")
        fields = {PIXELS if name == "pixel_values" else name: field for name, field in fields.items()}
        return {**fields, KEEP: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def kept_of_inputs(self, hf_inputs: Any, config: VTCConfig) -> list[tuple[int, int]]:
        """What `CompressedInfo.kept` returns for each image that the model's processor has prepared."""
        raise NotImplementedError


class CompressedLlavaInfo(CompressedInfo):
    """Mixin for those of vLLM's LLaVAs that count an image's placeholders by its size."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.kept_of_size(None, image_height, image_width)[1]

    def kept_of_size(self, config: VTCConfig | None, height: int, width: int) -> tuple[int, int]:
        """As `kept`, of an image of so many pixels; None: with the engine's settings."""
        stock = super().get_num_image_tokens(image_width=width, image_height=height)  # type: ignore[misc]
        if self.vtc is None:
            return stock, stock
        return self.kept(config or self.vtc.config, stock, height, width)


class CompressedLlavaProcessor(CompressedProcessor):
    """Mixin for their processors."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        if self.info.vtc is None:
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        config, token = self.settings_of(hf_processor_mm_kwargs), self.info.get_hf_config().image_token_index

        def placeholders(number: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):  # encoded by the caller: as many as there are
                return [token] * images.get_feature_size(number)
            size = images.get_image_size(number)
            return [token] * self.info.kept_of_size(config, size.height, size.width)[1]

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]

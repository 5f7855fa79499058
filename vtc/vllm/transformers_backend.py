"""vLLM's Transformers backend (`--model-impl transformers`): other vision towers, and VipLLaVA.

The backend runs transformers' own tower, with its heads split over tensor-parallel ranks, so VTC's attention function
scores it, as in transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models import transformers as backend
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtc.config import VTCConfig, kept_count
from vtc.hf import encode
from vtc.hf.attention import vtc_attention
from vtc.hf.families import TILES
from vtc.hf.settings import NAME, Settings
from vtc.hf.tiles import tilings
from vtc.hf.towers import tower_of
from vtc.methods import VisionOutputs
from vtc.vllm import settings
from vtc.vllm.encoder import Encoder
from vtc.vllm.model import Compressed, mean_over_ranks
from vtc.vllm.processing import KEEP, CompressedInfo, CompressedProcessor


class VTCMultiModalProcessingInfo(CompressedInfo, backend.MultiModalProcessingInfo):
    """Placeholders of a model of transformers."""

    def get_max_image_tokens(self) -> int:
        """The most tokens that an image keeps. One with fewer views may keep more: a view's share is rounded down."""
        most: int = super().get_max_image_tokens()
        return most if self.vtc is None else kept_count(self.vtc.config, most)


class VTCMultiModalProcessor(CompressedProcessor, backend.MultiModalProcessor):
    """Prompts of a model of transformers."""

    def kept_of_inputs(self, hf_inputs: Any, config: VTCConfig) -> list[tuple[int, int]]:
        lengths = torch.as_tensor(hf_inputs["image_replacement_sizes"]).tolist()
        replacements = hf_inputs["image_replacement_ids"].split(lengths)
        sizes = hf_inputs.get("image_sizes")
        sizes = [(1, 1)] * len(lengths) if sizes is None else torch.as_tensor(sizes).tolist()
        return [
            self.info.kept(config, int((own == own.mode().values).sum()), height, width)
            for own, (height, width) in zip(replacements, sizes, strict=True)
        ]

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        """Leave out placeholders of the ids that stand for an image; vLLM takes the most frequent one as them."""
        for item in out_mm_kwargs.get("image", ()) if self.info.vtc is not None else ():
            if KEEP in item:
                ids, keep = item["image_replacement_ids"].data, int(item[KEEP].data)
                is_placeholder = ids == ids.mode().values
                kept = self.info.vtc.method.num_outputs(int(is_placeholder.sum()), keep)
                item["image_replacement_ids"].data = ids[~is_placeholder | (is_placeholder.cumsum(0) <= kept)]
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    VTCMultiModalProcessor, info=VTCMultiModalProcessingInfo, dummy_inputs=backend.MultiModalDummyInputsBuilder
)
class VTCTransformersMultiModalForCausalLM(Compressed, backend.TransformersMultiModalForCausalLM):
    """A LLaVA of transformers in vLLM, with the visual tokens that VTC keeps."""

    def _patch_config(self) -> None:
        super()._patch_config()
        if (plan := settings.plan_of(self.config)) is None:
            return
        tower = tower_of(self.config.vision_config)
        if not tower.passes_on and (plan.scored or plan.received):
            raise ValueError(
                f"method {plan.method.name!r} needs the attention of {tower.name}, which vLLM's Transformers backend "
                "hides; leave out --model-impl transformers, or use a method that needs none, such as 'divprune'"
            )
        if self.compilation_config.compile_mm_encoder:
            raise ValueError("VTC reads the vision tower's attention, which compile_mm_encoder hides; leave it out")
        # Also with a transformers that is too old for VTC's own generate(): only the tower is transformers' here.
        AttentionInterface.register(NAME, vtc_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        self.config.vision_config._attn_implementation = NAME

    @functools.cached_property
    def vtc_settings(self) -> Settings:
        return Settings(self.model, settings.family_of(self.config), self.vtc.config)

    @functools.cached_property
    def vtc_encoder(self) -> Encoder:
        over_ranks = mean_over_ranks(get_tensor_model_parallel_world_size())

        def tower(views: Tensor) -> VisionOutputs:
            return encode.run_tower(self.vtc_settings, views, self.vtc, over_ranks=over_ranks)[0]

        newline = getattr(self.model, "image_newline", None)
        return Encoder(self.vtc, tower, self.model.multi_modal_projector, newline, self.vtc_batch)

    def vtc_encode(self, keeps: list[int], **kwargs: Any) -> list[Tensor]:
        pixels = kwargs["pixel_values"]
        if self.vtc_settings.family.inputs[0].layout != TILES.layout:
            return self.vtc_encoder.whole(pixels, keeps)
        images = list(pixels) if isinstance(pixels, Tensor) else [image for item in pixels for image in item]
        sizes = kwargs["image_sizes"].flatten(0, -2)
        return self.vtc_encoder.tiled(images, tilings(self.vtc_settings, sizes), keeps)

"""LLaVA-1.5 in vLLM."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtc.config import VTCConfig
from vtc.vllm.encoder import Encoder
from vtc.vllm.model import Compressed
from vtc.vllm.processing import CompressedLlavaInfo, CompressedLlavaProcessor
from vtc.vllm.tower import Tower

# transformers 5 saves a LLaVA's CLIP without the inner "vision_model.", which vLLM's class expects.
SAVED_BY_TRANSFORMERS_5 = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
        for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")
    }
)


class VTCLlavaProcessingInfo(CompressedLlavaInfo, llava.LlavaProcessingInfo):
    """Placeholders of LLaVA-1.5."""


class VTCLlavaMultiModalProcessor(CompressedLlavaProcessor, llava.LlavaMultiModalProcessor):
    """Prompts of LLaVA-1.5."""

    def kept_of_inputs(self, hf_inputs: Any, config: VTCConfig) -> list[tuple[int, int]]:
        side = self.info.get_hf_config().vision_config.image_size
        return [self.info.kept_of_size(config, side, side)] * len(hf_inputs["pixel_values"])


def _info(ctx: Any) -> Any:
    """A LLaVA with a Pixtral tower, which has no [CLS] token and any number of patches, is vLLM's."""
    stock = llava._build_llava_or_pixtral_hf_info(ctx)
    return VTCLlavaProcessingInfo(ctx) if isinstance(stock, llava.LlavaProcessingInfo) else stock


def _processor(info: Any, dummy_inputs: Any) -> Any:
    if isinstance(info, VTCLlavaProcessingInfo):
        return VTCLlavaMultiModalProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class VTCLlavaForConditionalGeneration(Compressed, llava.LlavaForConditionalGeneration):
    """vLLM's LLaVA, with the visual tokens that VTC keeps."""

    hf_to_vllm_mapper = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper | SAVED_BY_TRANSFORMERS_5

    @functools.cached_property
    def vtc_encoder(self) -> Encoder:
        tower = Tower(self.vision_tower, self.vtc, self.multi_modal_projector)
        return Encoder(self.vtc, tower, self.multi_modal_projector, None, self.vtc_batch)

    def vtc_encode(self, keeps: list[int], **kwargs: Any) -> list[Tensor]:
        images = self._parse_and_validate_image_input(**kwargs)
        return self.vtc_encoder.whole(images["pixel_values"], keeps)

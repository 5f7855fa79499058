"""LLaVA-NeXT in vLLM: an image's budget is shared among its base image and its tiles."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_next
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtc.config import VTCConfig, kept_count
from vtc.tiles import Tiling
from vtc.vllm.encoder import Encoder
from vtc.vllm.llava import SAVED_BY_TRANSFORMERS_5
from vtc.vllm.model import Compressed
from vtc.vllm.processing import CompressedLlavaInfo, CompressedLlavaProcessor, num_tiles
from vtc.vllm.tower import Tower


class VTCLlavaNextProcessingInfo(CompressedLlavaInfo, llava_next.LlavaNextProcessingInfo):
    """Placeholders of LLaVA-NeXT."""

    @functools.cached_property
    def stock(self) -> Any:
        """What vLLM knows of an image before compression."""
        return llava_next.LlavaNextProcessingInfo(self.ctx)

    def get_image_size_with_most_features(self) -> Any:
        """The size with the most tokens before compression: vLLM measures memory with it, and the tower sees them."""
        return self.stock.get_image_size_with_most_features()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> Any:
        """The most tokens that an image keeps. One with fewer views may keep more: a view's share is rounded down."""
        if self.vtc is None:
            return super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        return {"image": kept_count(self.vtc.config, self.stock.get_max_image_tokens())}


class VTCLlavaNextMultiModalProcessor(CompressedLlavaProcessor, llava_next.LlavaNextMultiModalProcessor):
    """Prompts of LLaVA-NeXT."""

    def kept_of_inputs(self, hf_inputs: Any, config: VTCConfig) -> list[tuple[int, int]]:
        sizes = torch.as_tensor(hf_inputs["image_sizes"]).tolist()
        return [self.info.kept_of_size(config, height, width) for height, width in sizes]


@MULTIMODAL_REGISTRY.register_processor(
    VTCLlavaNextMultiModalProcessor, info=VTCLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VTCLlavaNextForConditionalGeneration(Compressed, llava_next.LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, with the visual tokens that VTC keeps."""

    hf_to_vllm_mapper = llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | SAVED_BY_TRANSFORMERS_5

    @functools.cached_property
    def vtc_encoder(self) -> Encoder:
        tower = Tower(self.vision_tower, self.vtc, self.multi_modal_projector, self.select_layers)
        return Encoder(self.vtc, tower, self.multi_modal_projector, self.image_newline, self.vtc_batch)

    def vtc_encode(self, keeps: list[int], **kwargs: Any) -> list[Tensor]:
        images = self._parse_and_validate_image_input(**kwargs)
        tiles = [self._tiling(size) for size in images["image_sizes"].cpu()]
        return self.vtc_encoder.tiled(images["pixel_values"], tiles, keeps)

    def _tiling(self, size: Tensor) -> Tiling:
        """The tiles of an image of `size` (height, width): vLLM's own unpadding and newlines, on token numbers."""
        count = num_tiles(self.config, *size.tolist())
        numbers = torch.arange(count * self.vtc.num_tokens, device="cpu").view(count, -1, 1)
        stand_in = SimpleNamespace(config=self.config, image_newline=torch.tensor([-1], device="cpu"))
        merge = llava_next.LlavaNextForConditionalGeneration._merge_image_patch_embeddings
        return Tiling(count, merge(stand_in, size, numbers, strategy="spatial_unpad")[:, 0])

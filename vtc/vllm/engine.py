"""The config of a whole engine: what goes with compression is checked, and how many images one step encodes."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vtc.config import kept_count
from vtc.hf.families import TILES
from vtc.plan import Plan
from vtc.vllm import settings
from vtc.vllm.settings import FLAG, KEY

_log = init_logger("vllm.vtc")


class CompressedEngine(VerifyAndUpdateConfig):
    """vLLM calls this once it has made the config of an engine, before weights load."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the config, and set its encoder budget.

        vLLM bounds the images that a step encodes by their tokens in the language model. With fewer tokens an image it
        would encode several times as many, and all requests of the step would wait for the slowest.

        Raises
        ------
        ValueError
            If the config holds what VTC does not run with.
        """
        model = vllm_config.model_config
        given = (model.multimodal_config and model.multimodal_config.mm_processor_kwargs) or {}
        if KEY in given:
            raise ValueError(
                f"--mm-processor-kwargs holds {KEY}={given[KEY]!r}; give an engine's settings as {FLAG}, for instance "
                f"{FLAG}.keep 64"
            )
        if (plan := settings.plan_of(model.hf_config)) is None:
            return
        if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
            raise ValueError(
                "VTC does not run with LoRA adapters on the vision tower or the projector, which vLLM counts by an "
                "image's placeholders; leave out --enable-tower-connector-lora"
            )
        if vllm_config.kv_transfer_config is not None:
            _log.warning(
                "VTC: engines that hand KV caches to each other, for prefill apart from decoding, need the same "
                "settings of VTC; vLLM does not compare them, and with others answers are wrong"
            )
        if model.multimodal_config.enable_mm_embeds or model.enable_prompt_embeds:
            return  # embeddings of the caller may be as long as an image that is not compressed, and must fit
        scheduler = vllm_config.scheduler_config
        kept, tokens = largest_image(plan, model.hf_config)
        scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens * kept // tokens, 1)


def largest_image(plan: Plan, hf_config: Any) -> tuple[int, int]:
    """How many visual tokens the largest image keeps, and how many patches of it the vision tower sees."""
    if settings.family_of(hf_config).inputs[0].layout != TILES.layout:
        return plan.num_outputs, plan.num_tokens
    side = hf_config.vision_config.image_size
    tiles = 1 + max((height // side) * (width // side) for height, width in hf_config.image_grid_pinpoints)
    tokens = max(tiles * plan.num_tokens, plan.config.keep or 0)  # some keep a newline, too
    return kept_count(plan.config, tokens), tokens

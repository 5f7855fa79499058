"""What VTC's model classes for vLLM share: the settings, and the route of the pixels."""

from __future__ import annotations

import functools
from typing import Any

from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vtc.vllm import settings
from vtc.vllm.encoder import Encoder
from vtc.vllm.processing import KEEP, PIXELS

_log = init_logger("vllm.vtc")


class Compressed:
    """Mixin for a model class of vLLM.

    With settings, `embed_multimodal` takes the pixels that VTC's processor has prepared. Without, it is the stock one.
    """

    vtc: Any  # a Plan, or None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.vtc = plan = settings.plan_of(vllm_config.model_config.hf_config)
        if plan is None:
            return
        # The encoder budget holds for images that keep the engine's number of tokens. Those that a request makes
        # smaller may be more, and a pass of the tower, which sees all patches, is bounded whatever they keep.
        self.vtc_batch = max(vllm_config.scheduler_config.max_num_batched_tokens // plan.num_tokens, 1)
        kept = f"keeps {plan.num_outputs} of" if plan.num_outputs else "shares its budget among tiles of"
        _log.info_once("VTC: method %r %s %d visual tokens; %s", plan.method.name, kept, plan.num_tokens, plan.config)

    @functools.cached_property
    def vtc_encoder(self) -> Encoder:
        """Made when the first image comes: a worker without images has no tower."""
        raise NotImplementedError

    def vtc_encode(self, keeps: list[int], **kwargs: Any) -> list[Any]:
        """The tokens `[K, D]` of each image; `kwargs` are those of the stock class, with `pixel_values`."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if self.vtc is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if kwargs.get("pixel_values") is not None:
            raise RuntimeError(
                "this worker compresses images, and the process that reads the prompts has no VTC; install vtc-cls in "
                "every process, and look at VLLM_PLUGINS"
            )
        if kwargs.get(PIXELS) is None:  # embeddings that the caller has computed, or nothing
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        kwargs["pixel_values"] = kwargs.pop(PIXELS)
        with gpu_sync_allowed():  # the layout of tiles is made on the host
            return self.vtc_encode(kwargs.pop(KEEP).flatten().tolist(), **kwargs)


def mean_over_ranks(shards: int) -> Any:
    """The mean of a tensor over the `shards` ranks of a tower whose heads are split; None for one rank."""
    return None if shards == 1 else lambda x: tensor_model_parallel_all_reduce(x.contiguous()) / shards

"""VTC in vLLM: a plug-in that compresses the images of a LLaVA if the settings say so, and else changes nothing.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides.vtc.keep 64

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# The classes that take the place of vLLM's, by the architecture they serve. Each is imported when a model needs it.
MODELS = {
    "LlavaForConditionalGeneration": "vtc.vllm.llava:VTCLlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "vtc.vllm.llava_next:VTCLlavaNextForConditionalGeneration",
    "TransformersMultiModalForCausalLM": "vtc.vllm.transformers_backend:VTCTransformersMultiModalForCausalLM",
}


def register() -> None:
    """Put VTC's classes in place of vLLM's, by name. May be called again. Touches no GPU."""
    from vllm import ModelRegistry, __version__

    from vtc.vllm import versions

    is_tested = versions.warn_if_untested(__version__)
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from vtc.vllm.engine import CompressedEngine
    except ImportError:  # another version of vLLM may lack it; models without settings go on
        if is_tested:
            raise
        _check_settings_of(ModelRegistry, ())
        return
    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP[architecture] = CompressedEngine
    _check_settings_of(ModelRegistry, MODELS)


def _check_settings_of(registry: Any, served: Collection[str]) -> None:
    """Let `registry` refuse settings of VTC that are not valid, or of a model whose class is not one of the `served`.

    vLLM asks the registry for the class when it makes the config of a model, before weights load.
    """
    stock = registry.inspect_model_cls
    if hasattr(stock, "_vtc_check"):
        return

    def inspect_model_cls(architectures: Any, model_config: Any) -> Any:
        from vtc.vllm import settings

        found = stock(architectures, model_config)
        settings.require(model_config.hf_config, served=found[1] in served, name=found[1])
        return found

    inspect_model_cls._vtc_check = True  # type: ignore[attr-defined]
    registry.inspect_model_cls = inspect_model_cls

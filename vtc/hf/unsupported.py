"""Known models that VTC does not support, and why; LLaVAs in the format of their authors, and the converted ones.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NO_CLS = "its vision tower has no [CLS] token"
_SHUFFLE = "pixel shuffle makes one token of several patches, so a token is no patch that [CLS] attends to"
_NO_CLS_MERGED = f"{_NO_CLS}, and several patches become one token"
_QWEN = "its vision tower has no [CLS] token, and 2 x 2 patches of an image of any size become one token"
_QUERIES = "learned queries replace the patches, so there are few tokens and none is a patch"
_CROSS = "its language model reads the image by cross-attention, so the prompt has no visual tokens to drop"

# By `model_type` in transformers, or in the configs of their authors: the name, and why as a clause.
UNSUPPORTED = {
    "aya_vision": ("Aya Vision", _NO_CLS_MERGED),
    "blip-2": ("BLIP-2", _QUERIES),
    "chameleon": ("Chameleon", "its image tokens are codes of a vocabulary, not features of a vision tower"),
    "fuyu": ("Fuyu", "it has no vision tower"),
    "gemma3": ("Gemma 3", _NO_CLS_MERGED),
    "idefics": ("IDEFICS", _CROSS),
    "idefics2": ("Idefics2", _QUERIES),
    "idefics3": ("Idefics3", _NO_CLS_MERGED),
    "instructblip": ("InstructBLIP", _QUERIES),
    "internvl": ("InternVL", _SHUFFLE),
    "internvl_chat": ("InternVL", _SHUFFLE),
    "llama4": ("Llama 4", _SHUFFLE),
    "llava_onevision": ("LLaVA-OneVision", _NO_CLS),
    "mistral3": ("Mistral Small 3", _NO_CLS_MERGED),
    "mllama": ("Llama 3.2 Vision", _CROSS),
    "paligemma": ("PaliGemma", _NO_CLS),
    "qwen2_vl": ("Qwen2-VL", _QWEN),
    "qwen2_5_vl": ("Qwen2.5-VL", _QWEN),
    "qwen3_vl": ("Qwen3-VL", _QWEN),
    "qwen3_vl_moe": ("Qwen3-VL", _QWEN),
    "smolvlm": ("SmolVLM", _NO_CLS_MERGED),
    "video_llava": ("Video-LLaVA", "it has two vision towers"),
}

# Repositories in the format of LLaVA's authors, by the ends of their names: the same weights, converted.
CONVERTED = {
    "llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-v1.6-34b": "llava-hf/llava-v1.6-34b-hf",
    "llava-next-video-7b": "llava-hf/LLaVA-NeXT-Video-7B-hf",
    "vip-llava-7b": "llava-hf/vip-llava-7b-hf",
    "vip-llava-13b": "llava-hf/vip-llava-13b-hf",
}

_THEIRS = re.compile(r"llava_(llama|mistral|mpt|qwen)$|Llava\w*ForCausalLM$")  # a model_type or a class of LLaVA's code


def format_refusal(source: str, config: Mapping[str, Any]) -> str | None:
    """Why the model `source` cannot be loaded if `config` is in the format of LLaVA's authors, as a clause, or None.

    Such a config may have the same `model_type` as a converted one, but its weights have other names.
    """
    kinds = [str(config.get("model_type")), *map(str, config.get("architectures") or ())]
    if "mm_vision_tower" not in config and not any(_THEIRS.match(kind) for kind in kinds):
        return None
    names = [str(name).rstrip("/").rpartition("/")[2].lower() for name in (source, config.get("_name_or_path"))]
    found = next((CONVERTED[name] for name in names if name in CONVERTED), None)
    advice = (
        f"use {found}, which has the same weights"
        if found
        else "use a converted one, such as llava-hf/llava-1.5-7b-hf, or convert its weights for transformers"
    )
    return f"is in the format of LLaVA's authors, which transformers does not load; {advice}"

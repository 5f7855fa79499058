"""What cannot be pruned inside the language model: each check raises a ValueError that says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from vtc.config import VTCConfig
from vtc.hf import conversation
from vtc.hf.conversation import PrunedConversation
from vtc.hf.prompt import require_ids
from vtc.hf.settings import Settings

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")  # by model_type; their layers are alike


def asked(config: VTCConfig) -> str:
    """What of `config` prunes inside the language model, as text."""
    return f"prune_layer={config.prune_after}" if config.schedule is None else f"schedule={list(config.schedule)}"


def instead(config: VTCConfig) -> str:
    """What prunes before the language model instead, as text."""
    return "use prune_layer=0" if config.schedule is None else "use keep and no schedule"


def require(language_model: Any, config: VTCConfig) -> None:
    """Raise ValueError if `language_model` cannot be pruned after the layers that `config` says."""
    text, layers = language_model.config, language_model.config.num_hidden_layers
    if text.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"{asked(config)} needs a language model of type {', '.join(LANGUAGE_MODELS)}, got {text.model_type!r}; "
            f"{instead(config)} and a method that prunes before the language model"
        )
    if getattr(text, "sliding_window", None) is not None:
        raise ValueError(
            f"{asked(config)} needs layers that attend to everything, but this language model has "
            f"sliding_window={text.sliding_window}; {instead(config)}"
        )
    last = config.schedule[-1][0] if config.schedule else config.prune_after
    if not 0 < last < layers:
        raise ValueError(
            f"{asked(config)} leaves no layer to prune for: the language model has {layers}; use 1 to {layers - 1}, or "
            "0 to prune before it"
        )
    if language_model.training and getattr(language_model, "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing runs layers again without the pruning of the first time; use "
            "model.gradient_checkpointing_disable(), or prune before the language model only"
        )


def require_generate(settings: Settings, call: dict[str, Any], images: bool, option: Callable[[str], Any]) -> None:
    """Raise ValueError if `generate()` cannot prune this prompt, or cannot continue after one that was pruned.

    Parameters
    ----------
    images : bool
        Whether the call has images.
    option : callable
        The value of an option of `generate()` by its name.
    """
    config, cache = settings.config, call.get("cache")
    note = conversation.read(cache)
    if conversation.length_of(cache):
        if note is None:
            raise ValueError(
                f"a further turn with images cannot be pruned inside the language model, got {asked(config)}; "
                f"{instead(config)}, or start without the cache, with the whole conversation and all its images"
            )
        if images or not isinstance(note, PrunedConversation) or note.compact:
            raise ValueError(
                "a further turn cannot go on from a cache pruned inside the language model, unless it brings no image "
                'and kv="full"; start without the cache, with the whole conversation and all its images'
            )
        return
    if not images:
        return
    require_ids(call)
    if option("use_cache") is False and config.kept_kv == "compact":
        raise ValueError(
            f'method={config.name!r} with kv="compact" and {asked(config)} drops tokens once, when the prompt is read, '
            'and needs the cache to remember; use use_cache=True, or kv="full"'
        )
    for name in ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens"):
        if call.get(name) is not None or option(name):
            raise ValueError(
                "pruning inside the language model needs the whole prompt at once, then one token at a time; unset "
                f"{name}"
            )


def require_one_sample(config: VTCConfig, positions: Tensor) -> None:
    """Raise ValueError if `positions` `[B, L]` start again in a row, where transformers finds samples by that."""
    if (positions.diff(dim=1) != 1).any():
        raise ValueError(
            f"position_ids pack several samples in a row, and with {asked(config)} they would see each other after the "
            "layer that prunes; pass one sample in each row, or prune before the language model only"
        )


def is_static(cache: Any, compact: bool) -> bool:
    """Whether `cache` is a static one. Raises ValueError if it is of a kind that cannot be shortened."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    if getattr(cache, "offloading", False) or not kinds <= {DynamicLayer, StaticLayer} or len(kinds) > 1:
        raise ValueError(
            "pruning inside the language model works with a DynamicCache or a StaticCache of plain layers, got "
            f"{type(cache).__name__} of {', '.join(sorted(kind.__name__ for kind in kinds))}"
            f"{', offloaded' if getattr(cache, 'offloading', False) else ''}; leave the cache and "
            "cache_implementation out, or prune before the language model only"
        )
    static = kinds == {StaticLayer}
    if static and not compact:
        raise ValueError(
            'kv="full", the default of method "fastv", gives layers of two lengths, which a static cache does not '
            'support; use vtc.configure(model, kv="compact"), or a dynamic cache'
        )
    return static

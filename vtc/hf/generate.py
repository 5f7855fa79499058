"""`generate()`, `forward()` and `get_image_features()` of a LLaVA that compresses.

Images are encoded here and handed to transformers as its own `mm_encoder_outputs`. If tokens are dropped before the
language model, the prompt is shortened accordingly. transformers then sees an ordinary, shorter prompt, so masks,
positions, caches, beams and decoding need no special handling. If tokens are dropped inside the language model,
`vtc.hf.prune` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vtc.hf import conversation, names, prune, prune_decode, prune_limits
from vtc.hf.conversation import PrunedConversation, ShortConversation
from vtc.hf.families import VisualInput
from vtc.hf.prompt import FullPrompt, Prompt, require_ids
from vtc.hf.settings import Settings
from vtc.hf.views import read, views_of

Call = dict[str, Any]  # the arguments of a call by name; the KV cache is "cache"
Stock = Callable[..., Any]  # the method of transformers, of the same model


@torch.no_grad()
def generate(stock: Stock, model: Any, call: Call) -> Any:
    """Replaces `generate`: returns the caller's full prompt followed by the new tokens."""
    if call.get("mm_encoder_outputs"):
        raise ValueError("got mm_encoder_outputs, but VTC has to encode the images itself; pass pixel_values")
    if call.get("inputs") is not None:
        if call.get("input_ids") is not None:
            raise ValueError("got both inputs and input_ids, which are one argument of generate(); pass input_ids")
        call["input_ids"] = call.pop("inputs")
    settings, cache = Settings.of(model), call.get("cache")
    note, images = conversation.read(cache), bool(settings.family.inputs_of(call))
    if isinstance(note, PrunedConversation) or (images and settings.config.prune_after):
        prune_limits.require_generate(settings, call, images, lambda name: _option(model, call, name))
        return stock(**(_encoded(settings, call) if images else call))
    if note is None and not (images and settings.config.compresses):
        return stock(**call)

    full: Any = call.get("input_ids")
    if full is not None and call.get("attention_mask") is None:
        call["attention_mask"] = _inferred_mask(model, call)
    call, note = _shortened(settings, call)
    prompt = FullPrompt(full, call["input_ids"].shape[1])
    prompt.wrap(call)
    limit = _option(model, call, "max_length")
    if limit and limit <= full.shape[1] and _option(model, call, "max_new_tokens") is None:
        raise ValueError(f"max_length={limit}, but the prompt has {full.shape[1]} tokens already; use max_new_tokens")
    for name in ("max_length", "min_length"):  # these count the caller's prompt
        if limit := _option(model, call, name):
            call[name] = max(limit - full.shape[1] + prompt.short_length, 0)
    output = stock(**call)
    for used in (cache, names.cache_of(output)):
        if used is not None:
            conversation.leave(used, note)
    if isinstance(output, torch.Tensor):
        return prompt.restore(output)
    output.sequences = prompt.restore(output.sequences)
    return output


def forward(stock: Stock, model: Any, call: Call) -> Any:
    """Replaces `forward` of the class with a head, and of the class without a head, which the former calls."""
    settings, ids = Settings.of(model), call.get("input_ids")
    tokens = call.get("inputs_embeds") if ids is None else ids
    note = conversation.read(call.get("cache"), None if tokens is None else tokens.shape[1])
    pixels = bool(settings.family.inputs_of(call))
    images = pixels or bool(call.get("mm_encoder_outputs"))
    if pixels and call.get("mm_encoder_outputs"):
        raise ValueError("got both pixels and mm_encoder_outputs, which are the same images; pass pixel_values")
    if isinstance(note, PrunedConversation) or (images and settings.config.prune_after):
        prune_limits.require_forward(call, images)
        if model is not settings.base:
            return stock(**call)
        if isinstance(note, PrunedConversation) and not images:
            return prune_decode.decode(stock, settings, call, note)
        return prune.prefill(stock, settings, _encoded(settings, call) if pixels else call)

    run = settings.run
    if pixels and (note or settings.config.compresses):
        _require_forward(call)
        call, note = _shortened(settings, call)
    elif note:
        _require_mask(call)
    elif run and images and ids is not None and not settings.config.compresses:
        run.count_prompt(ids.shape[1], ids.shape[1])
    outputs = stock(**call)
    cache = names.cache_of(outputs)
    if cache is not None and note:
        conversation.leave(cache, note)
    if cache is not None and run and images:
        run.count_cache(cache)
    return outputs


def get_features(visual: VisualInput, stock: Stock, model: Any, call: Call) -> Any:
    """Replaces `get_image_features` and `get_video_features`."""
    settings = Settings.of(model)
    if settings.config.compresses:
        outputs: Any = read(settings, visual, call).encode()
        return outputs.to_tuple()[:2] if call.get("return_dict") is False else outputs
    outputs = stock(**call)
    if settings.run is not None and not torch.compiler.is_compiling():
        features = outputs[1] if isinstance(outputs, tuple) else outputs.pooler_output
        settings.run.images += len(features)
        settings.run.tokens_before = settings.run.tokens_after = len(features[-1])
    return outputs


def _shortened(settings: Settings, call: Call) -> tuple[Call, ShortConversation]:
    """Encode the images of `call` and shorten its prompt: the arguments for transformers, and the note for the cache.

    In a further turn, the columns that the cache already holds come first.
    """
    require_ids(call)
    ids: torch.Tensor = call["input_ids"]
    mask: Any = call.get("attention_mask")
    positions = call.get("position_ids")
    if mask is not None and mask.ndim == 2 and len(mask) == 1:
        mask = mask.expand(len(ids), -1)
    views = views_of(settings, call)
    text = settings.base.config.get_text_config()
    tokens = {visual: getattr(settings.base.config, visual.token) for visual in settings.family.inputs}
    budget = settings.budget if views else None
    past, start = None, 0
    if conversation.length_of(call.get("cache")):
        past, start = ShortConversation.resume(call["cache"], ids, mask, list(tokens.values()), budget)
        budget = budget or past.budget
        if positions is not None:
            raise ValueError("position_ids cannot be given for a further turn; leave them to generate()")
    new_mask = None if mask is None else mask[:, start:]

    def counts() -> dict[int, list[tuple[int, int]]]:
        return {token: views[visual].counts if visual in views else [] for visual, token in tokens.items()}

    prompt = Prompt.read(ids[:, start:], new_mask, {token: [n for n, _ in own] for token, own in counts().items()})
    outputs = {visual.modality: each.encode() for visual, each in views.items()}  # an adaptive method sets the counts
    short = prompt.shortened(counts(), new_mask, positions, call.get("labels"), text.pad_token_id or 0)
    if past:
        short = past.extended(ids, mask, start, short)
    if settings.run is not None:
        settings.run.count_prompt(ids.shape[1], short["input_ids"].shape[1])
    replaced = ("input_ids", "attention_mask", "position_ids", "labels")
    call = {name: value for name, value in _without_pixels(settings, call).items() if name not in replaced} | short
    if outputs:
        call["mm_encoder_outputs"] = outputs
    return call, ShortConversation(ids.shape[1], short["input_ids"], short.get("attention_mask"), budget)


def _encoded(settings: Settings, call: Call) -> Call:
    """The arguments of `call` with its images encoded."""
    outputs = {visual.modality: each.encode() for visual, each in views_of(settings, call).items()}
    return _without_pixels(settings, call) | {"mm_encoder_outputs": outputs}


def _without_pixels(settings: Settings, call: Call) -> Call:
    encoded = {"image_sizes", *(visual.pixels for visual in settings.family.inputs)}
    return {name: value for name, value in call.items() if name not in encoded}


def _option(model: Any, call: Call, name: str) -> Any:
    """An option of `generate()`: the argument, else the value in its generation config."""
    given = call.get(name)
    return getattr(call.get("generation_config") or model.generation_config, name, None) if given is None else given


def _inferred_mask(model: Any, call: Call) -> torch.Tensor:
    """The mask of the full prompt that transformers would infer."""
    ids: torch.Tensor = call["input_ids"]
    pad, eos = _option(model, call, "pad_token_id"), _option(model, call, "eos_token_id")
    is_padded = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
    return ids.ne(pad).long() if is_padded else torch.ones_like(ids)


def _require_forward(call: Call) -> None:
    if conversation.length_of(call.get("cache")):
        raise ValueError("images on top of a cache need the whole conversation; use generate()")
    if isinstance(call.get("logits_to_keep"), torch.Tensor):
        raise ValueError("logits_to_keep holds positions of the full prompt; pass how many last positions to keep")


def _require_mask(call: Call) -> None:
    """Raise ValueError if the mask of tokens after a shortened prompt does not have the cache's columns."""
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if ids is None or mask is None or mask.ndim != 2:
        return
    columns = call["cache"].get_seq_length() + ids.shape[1]
    if mask.shape[1] != columns:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but the compressed prompt and the new tokens have {columns}; "
            "use generate(), or leave attention_mask out if nothing is padded"
        )

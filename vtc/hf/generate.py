"""`generate()`, `forward()` and `get_image_features()` of a LLaVA that compresses.

Images are encoded here and handed to transformers as its own `mm_encoder_outputs`. If tokens are dropped before the
language model, the prompt is shortened accordingly, and its images are put in here. transformers then sees an ordinary,
shorter prompt, so masks, positions, caches, beams and decoding need no special handling. If tokens are dropped inside
the language model, `vtc.hf.prune` does it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from vtc.config import VTCConfig
from vtc.hf import conversation, names, positions, prune, prune_decode, prune_limits
from vtc.hf.conversation import PrunedConversation, ShortConversation
from vtc.hf.families import VisualInput
from vtc.hf.graphs.model import replayed
from vtc.hf.lone_image import LoneImage
from vtc.hf.prompt import FullPrompt, Prompt, Shortening, require_ids
from vtc.hf.settings import Ending, Settings, is_on, running
from vtc.hf.views import ImageOutputs, read, views_of

Call = dict[str, Any]  # the arguments of a call by name; the KV cache is "cache"
Stock = Callable[..., Any]  # the method of transformers, of the same model
_log = logging.getLogger("vtc")
# What the stock get_image_features() and get_video_features() read of the model's config.
STOCK_READS = (
    *("vision_feature_layer", "vision_feature_select_strategy", "image_grid_pinpoints", "vision_aspect_ratio"),
    *("spatial_pool_stride", "spatial_pool_mode"),
)


@torch.no_grad()
def generate(stock: Stock, model: Any, call: Call) -> Any:
    """Replaces `generate`: returns the caller's full prompt followed by the new tokens."""
    if call.get("inputs") is not None:
        if call.get("input_ids") is not None:
            raise ValueError("got both inputs and input_ids, which are one argument of generate(); pass input_ids")
        call["input_ids"] = call.pop("inputs")
    _require_tensor(call, "input_ids")
    settings, cache = Settings.of(model), call.get("cache")
    note, images = conversation.read(cache), bool(settings.family.inputs_of(call))
    if given := call.get("mm_encoder_outputs"):
        if images:
            raise ValueError("got both pixels and mm_encoder_outputs, which are the same images; pass pixel_values")
        if not getattr(call.get("generation_config"), "is_assistant", False):
            _require_own(settings, given, note)
        with running(settings._replace(config=VTCConfig(method="none"))):
            return stock(**call)  # this model is the assistant of another, which has encoded the images
    settings = _continued(settings, note, images)
    has_beams = (_option(model, call, "num_beams") or 1) > 1
    inside = isinstance(note, PrunedConversation) or (images and settings.config.prunes_inside)
    if inside:
        prune_limits.require_generate(settings, call, images, lambda name: _option(model, call, name))
    pruned, note = (note, note.short) if isinstance(note, PrunedConversation) else (None, note)
    if inside and (pruned is not None or settings.config.prune_after) and note is None:
        with _uncompiled(model):
            output = stock(**(_encoded(settings, call) if images else call))
        used = names.cache_of(output) if cache is None else cache
        if has_beams and used is not None:
            conversation.leave(used, None)
        return output
    if note is None and not (images and settings.config.compresses):
        if settings.config.compresses and not images and conversation.length_of(cache):
            _require_pixels(settings, call, conversation.length_of(cache))
        return stock(**call)

    require_ids(call)
    full: Any = call["input_ids"]
    if call.get("attention_mask") is None:
        call["attention_mask"] = _inferred_mask(model, call)
    past = note
    call, note, _, last = _shortened(settings, call, past)
    if last is not None:  # transformers goes on after the last position that it is given
        ending = Ending(note.short_length - 1, call["position_ids"][:, -1:])
        settings = settings._replace(ending=ending)
        call["position_ids"] = torch.cat([call["position_ids"][:, :-1], last], 1)
    prompt = FullPrompt(full, call["input_ids"].shape[1])
    prompt.wrap(call)
    limit = _option(model, call, "max_length")
    if limit and limit <= full.shape[1] and _option(model, call, "max_new_tokens") is None:
        raise ValueError(f"max_length={limit}, but the prompt has {full.shape[1]} tokens already; use max_new_tokens")
    for name in ("max_length", "min_length"):  # these count the caller's prompt
        counts_new = name == "max_length" and _option(model, call, "max_new_tokens") is not None
        if (limit := _option(model, call, name)) and not counts_new:
            call[name] = max(limit - full.shape[1] + prompt.short_length, 0)
    with conversation.filling(cache), contextlib.ExitStack() as goes_on:
        if inside:
            goes_on.enter_context(_uncompiled(model))
        if (past and not inside) or settings.ending:
            goes_on.enter_context(running(settings))
        if pruned is not None:  # in this call masks are in the columns that entered the language model
            conversation.leave(cache, dataclasses.replace(pruned, length=pruned.entered, short=None))
        output = stock(**call)
    is_tensor = isinstance(output, torch.Tensor)
    sequences = prompt.restore(output if is_tensor else output.sequences)
    used = names.cache_of(output) if cache is None else cache
    if used is not None:
        began = pruned or conversation.read(used)
        if isinstance(began, PrunedConversation):
            held = conversation.length_of(used) - began.held + began.entered
            short = note.answered(sequences, held)
            ended: Call = {} if pruned is not None else {"length": full.shape[1], "position": short.position}
            answered: Any = dataclasses.replace(began, short=short, **ended)
        else:
            answered = note.answered(sequences, conversation.length_of(used))
        conversation.leave(used, None if has_beams else answered)
    if is_tensor:
        return sequences
    output.sequences = sequences
    return output


def forward(stock: Stock, model: Any, call: Call) -> Any:
    """Replaces `forward` of the class with a head, and of the class without a head, which the former calls.

    The latter shortens the prompt, and gives hidden states the caller's columns again: column j is that of the last
    kept column <= j. So the head's logits, slices and loss are those of the caller's columns, without a change to it.
    """
    settings = Settings.of(model)
    if model is not settings.base:
        shortens = settings.config.compresses and settings.family.inputs_of(call)
        return stock(**(_with_alone_labels(call) if shortens else call))
    _require_tensor(call, "input_ids")
    ids, cache = call.get("input_ids"), call.get("cache")
    tokens = call.get("inputs_embeds") if ids is None else ids
    note = conversation.read(cache, None if tokens is None else tokens.shape[1])
    pixels = bool(settings.family.inputs_of(call))
    images = pixels or bool(call.get("mm_encoder_outputs"))
    if pixels and call.get("mm_encoder_outputs"):
        raise ValueError("got both pixels and mm_encoder_outputs, which are the same images; pass pixel_values")
    if images and not pixels:
        _require_own(settings, call["mm_encoder_outputs"], note)
    settings, run = _continued(settings, note, images), settings.run
    if images and settings.config.compresses and not torch.compiler.is_compiling():
        stock = functools.partial(_spliced, stock, settings)
    inside_too = pixels and not settings.config.prune_after
    is_short = images and not pixels and not settings.config.prune_after  # by our generate(), before the layers
    if is_short and settings.config.positions == "original":
        call = positions.one_sample(settings, call)
    if images and settings.config.prunes_inside and _is_packed(settings, call):
        prune_limits.require_one_sample(settings.config, call["position_ids"])
    if isinstance(note, PrunedConversation) or (images and settings.config.prunes_inside and not inside_too):
        if images:
            return prune.prefill(stock, settings, _encoded(settings, call) if pixels else call)
        outputs = prune_decode.decode(stock, settings, call, note)  # type: ignore[arg-type]
        conversation.keep(cache)
        return outputs
    if pixels and (note or settings.config.compresses):
        return _forward_images(stock, settings, call)
    if note:
        outputs = stock(**note.continued(call))  # type: ignore[union-attr]
        conversation.keep(cache)
        return outputs
    if run and images and ids is not None and not settings.config.compresses:
        run.count_prompt(ids.shape[1], ids.shape[1])
    outputs = stock(**call)
    if run and images and (cache := names.cache_of(outputs)) is not None:
        run.count_cache(cache)
    return outputs


def _forward_images(stock: Stock, settings: Settings, call: Call) -> Any:
    """`forward` of the class without a head for a prompt with pixels: its hidden states have the caller's columns."""
    if conversation.length_of(call.get("cache")):
        raise ValueError("images on top of a cache need the whole conversation; use generate()")
    returns_tuple = call.pop("return_dict", settings.base.config.return_dict) is False
    note: Any
    call, note, shortening, _ = _shortened(settings, call, None, in_forward=True)
    inside, call = settings.config.prunes_inside, call | {"return_dict": True}
    outputs = prune.prefill(stock, settings, call) if inside else stock(**call)
    cache = names.cache_of(outputs)
    if cache is not None:
        pruned = conversation.read(cache) if inside else None
        if isinstance(pruned, PrunedConversation):
            note = dataclasses.replace(pruned, length=note.length, short=note, position=note.position)
        conversation.leave(cache, note)
        if settings.run and not inside:
            settings.run.count_cache(cache)
    if shortening:
        shortening.spread_outputs(outputs)
    return outputs.to_tuple() if returns_tuple else outputs


def _spliced(stock: Stock, settings: Settings, **call: Any) -> Any:
    """`stock`, the `forward` of the class without a head, with the embeddings of a prompt that was shortened here.

    The stock method reads from the device how many placeholders there are, and so waits for the vision tower before it
    starts the language model. Here they were counted when the prompt was shortened. Other prompts are stock's.
    """
    base, given, ids = settings.base, call.get("mm_encoder_outputs") or {}, call.get("input_ids")
    if not given or not all([getattr(each, "is_counted", False) for each in given.values()]):
        return stock(**call)
    embeds, features = base.get_input_embeddings()(ids), {}
    for visual in settings.family.inputs:
        if (outputs := given.get(visual.modality)) is not None:
            outputs.is_counted, each = False, outputs.pooler_output
            if visual.layout == "frames":
                each = each.flatten()  # as stock notes them
            elif not isinstance(each, torch.Tensor):
                each = torch.cat(each)
            each = features[visual.modality] = each.to(embeds.device, embeds.dtype)
            is_image = (ids == getattr(base.config, visual.token)).unsqueeze(-1).to(embeds.device)
            embeds = embeds.masked_scatter(is_image, each)
    returns_tuple = call.pop("return_dict", base.config.return_dict) is False
    replaced = {"input_ids": None, "inputs_embeds": embeds, "mm_encoder_outputs": None, "return_dict": True}
    result = stock(**call | replaced)
    for modality, each in features.items():
        names.note_images(result, modality, given[modality], each)
    return result.to_tuple() if returns_tuple else result


def get_features(visual: VisualInput, stock: Stock, model: Any, call: Call) -> Any:
    """Replaces `get_image_features` and `get_video_features`."""
    settings = Settings.of(model)
    if settings.config.compresses:
        for name in ("output_hidden_states", "output_attentions"):
            if call.get(name):
                raise ValueError(f"{name} of the vision tower are not returned; call model.base_model.vision_tower")
        outputs: Any = read(settings, visual, call).encode()
        return outputs.to_tuple()[:2] if call.get("return_dict") is False else outputs
    outputs = _replayed(settings, visual, stock, call)
    if settings.run is not None and not torch.compiler.is_compiling():
        features = outputs[1] if isinstance(outputs, tuple) else outputs.pooler_output
        tokens, layers = len(features[-1]), settings.base.language_model.config.num_hidden_layers
        settings.run.count_images(len(features), tokens, ((0, tokens),), layers)
    return outputs


def _replayed(settings: Settings, visual: VisualInput, stock: Stock, call: Call) -> Any:
    """`stock(**call)`, which is replayed if the model has graphs and the pixels are the only tensor of the call."""
    pixels, others = call.get(visual.pixels), {name: value for name, value in call.items() if name != visual.pixels}
    plain = all(isinstance(value, (bool, int, str, list, type(None))) for value in others.values())
    if not plain or not isinstance(pixels, torch.Tensor):
        return stock(**call)

    def key() -> tuple[str, str]:
        read = [getattr(settings.base.config, name, None) for name in STOCK_READS]
        return visual.get, repr((sorted(others.items()), read))

    return replayed(settings.base, key, lambda views: stock(**others, **{visual.pixels: views}), pixels)


def _require_own(settings: Settings, outputs: dict[str, Any], note: Any) -> None:
    """Raise ValueError for images that VTC has not encoded, on a model or in a conversation that compresses."""
    is_own = all(isinstance(each, ImageOutputs) for each in outputs.values())
    if not is_own and (note or settings.config.compresses):
        raise ValueError(
            "got mm_encoder_outputs, but VTC has to encode the images itself; pass pixel_values, or vtc.disable(model)"
        )


def _require_pixels(settings: Settings, call: Call, held: int) -> None:
    """Raise ValueError if images follow the `held` columns of a cache, and their pixels are missing."""
    ids = call.get("input_ids")
    if ids is None:
        return
    for visual in set(settings.family.inputs) - set(settings.family.inputs_of(call)):
        found = int((ids[:, held:] == getattr(settings.base.config, visual.token)).sum())
        if found > 1:  # a single one may have been generated
            raise ValueError(
                f"input_ids has {found} placeholders after the {held} columns that the cache holds, but got no "
                f"{visual.pixels}; pass those of the new images, and the cache that was filled itself (a copy of its "
                "tensors, and one that was cropped into an image, cannot go on)"
            )


def _uncompiled(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Where a caller has compiled `model.forward`, run it as it is: torch.compile cannot trace hooks on layers."""
    if not hasattr(model.forward, "_torchdynamo_orig_callable"):
        return contextlib.nullcontext()
    _warn_of_compiling()
    return torch.compiler.set_stance("force_eager")


@functools.cache
def _warn_of_compiling() -> None:
    _log.warning(
        "prune_layer > 0 puts hooks on layers, which torch.compile cannot trace, so the compiled model.forward runs as "
        "it is; use prune_layer=0 to compile it"
    )


def _continued(settings: Settings, note: Any, images: bool) -> Settings:
    """The settings of a call: those that its conversation began with, or none for a model that does not compress."""
    if isinstance(note, ShortConversation):
        began, now = _compression(note.config), _compression(settings.config)
        if images and is_on(settings.base) and began != now:
            _warn_of_settings(str(began), str(now))
        return settings._replace(config=note.config)
    if not is_on(settings.base):
        return settings._replace(config=VTCConfig(method="none"))
    return settings


def _compression(config: VTCConfig) -> dict[str, Any]:
    """What decides which tokens of an image stay."""
    values = config.to_dict() | {"prune_layer": config.prune_after}
    return {name: value for name, value in values.items() if name not in ("kv", "backend", "fused")}


@functools.cache
def _warn_of_settings(before: str, now: str) -> None:
    _log.warning(
        "the conversation in the cache began with %s, so its new images are compressed likewise and not with %s; start "
        "without the cache for other settings",
        before,
        now,
    )


def _shortened(
    settings: Settings, call: Call, past: ShortConversation | None, in_forward: bool = False
) -> tuple[Call, ShortConversation, Shortening | None, torch.Tensor | None]:
    """Encode the images of `call` and shorten its prompt: the arguments for transformers, and the note for the cache.

    Then what of the prompt stays; and the position `[B, 1]` of its last token, if that may not stay and nevertheless
    counts.

    In a further turn of `generate()`, the columns that the cache already holds come first. `past` is its conversation,
    or None if the cache holds nothing that was compressed.
    """
    require_ids(call)
    ids: torch.Tensor = call["input_ids"]
    mask: Any = call.get("attention_mask")
    _require_tensor(call, "attention_mask")
    given, cache = call.get("position_ids"), call.get("cache")
    original, packed = settings.config.positions == "original", in_forward and _is_packed(settings, call)
    if mask is not None and mask.ndim == 2 and len(mask) == 1:
        mask = mask.expand(len(ids), -1)
    views = views_of(settings, call)
    tokens = {visual: getattr(settings.base.config, visual.token) for visual in views}
    start = 0
    if held := 0 if in_forward else conversation.length_of(cache):
        placeholders = [getattr(settings.base.config, visual.token) for visual in settings.family.inputs]
        past = _past(past, settings, ids, mask, held, placeholders)
        start = past.length + held - past.short_length
        past.require_whole(ids, start)
        _require_pixels(settings, call, start)
        if given is not None:
            raise ValueError("position_ids cannot be given for a further turn; leave them to generate()")
    new_mask = None if mask is None else mask[:, start:]

    sizes = {token: [n for n, _ in views[visual].counts] for visual, token in tokens.items()}
    prompt = LoneImage.read(ids[:, start:], new_mask, sizes) or Prompt.read(ids[:, start:], new_mask, sizes)
    for visual, each in views.items():
        each.ask(prompt, sizes, tokens[visual])
    outputs = {visual.modality: each.encode() for visual, each in views.items()}  # an adaptive method sets the counts
    counts = {token: views[visual].counts for visual, token in tokens.items()}
    shortening = prompt.shortening(counts, {token: views[visual].kept for visual, token in tokens.items()}, original)
    for encoded in outputs.values():
        encoded.is_counted = not torch.compiler.is_compiling()
    shortened = functools.partial(
        prompt.shortened,
        shortening,
        new_mask,
        given,
        pad=_padding_token(settings),
        counted=in_forward,
        packed=packed,
    )
    short = shortened(original=original)
    full = ids[:, start:]
    # The note outlives the call, and a caller may use tensors again. What generate() returns replaces `full`.
    if shortening is None:
        short = {name: each.clone() for name, each in short.items()}
    if in_forward:
        full = full.clone()
    last = prompt.last_position(given, in_forward) if original and shortening is not None else None
    if in_forward and shortening is None and given is None:  # the stock forward() counts padding, too
        last = full.new_full((len(full), 1), full.shape[1] - 1)
    note = ShortConversation.of(full, short, shortening, settings.config, last)
    if past:
        note = past.followed_by(note, ids, mask, start)
        last = None if last is None else note.position - 1
        short = note.arguments | ({"position_ids": note.positions(mask)} if original else {})
    if original and note.kept is not None:
        text = settings.base.language_model.config
        if packed:
            short |= positions.several_samples(text, shortened()["position_ids"], settings.base.dtype)
        if ids.shape[1] > (limit := getattr(text, "max_position_embeddings", ids.shape[1])):
            positions.warn_of_length(ids.shape[1], limit)
    if settings.run is not None:
        settings.run.count_prompt(ids.shape[1], note.short_length)
    replaced = ("input_ids", "attention_mask", "position_ids")
    call = {name: value for name, value in _without_pixels(settings, call).items() if name not in replaced} | short
    if outputs:
        call["mm_encoder_outputs"] = outputs
    return call, note, shortening, last


def _past(
    past: ShortConversation | None,
    settings: Settings,
    ids: torch.Tensor,
    mask: torch.Tensor,
    held: int,
    placeholders: list[int],
) -> ShortConversation:
    """The conversation in a cache of `held` columns, which are the first of the caller's `ids` and `mask` [B, L]."""
    if past:
        return past.cropped(held, placeholders)
    ids, mask = ids[:, :held], mask[:, :held]
    if any((ids == placeholder).any() for placeholder in placeholders):
        raise ValueError("the cache holds images that are not compressed; start without it, or vtc.disable(model)")
    return ShortConversation.of(ids, {"input_ids": ids, "attention_mask": mask}, None, settings.config)


def _require_tensor(call: Call, name: str) -> None:
    value = call.get(name)
    if isinstance(value, torch.Tensor) and value.shape[:1] == (0,) and call.get("pixel_values") is not None:
        raise ValueError(f"{name} of shape {list(value.shape)} holds no prompt; pass one for the images, or more")
    if value is not None and not (isinstance(value, torch.Tensor) and value.ndim > 1):
        got = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be a tensor [B, L], got {got}; pass it as the processor makes it")


def _padding_token(settings: Settings) -> int:
    """The id at padding. The first conversions of LLaMA have -1, which has no embedding."""
    text = settings.base.config.get_text_config()
    pad = text.pad_token_id
    return pad if pad is not None and 0 <= pad < text.vocab_size else 0


def _is_packed(settings: Settings, call: Call) -> bool:
    """Whether transformers finds the samples packed in a row by positions that start again."""
    use_cache = call.get("use_cache")
    makes_cache = settings.base.language_model.config.use_cache if use_cache is None else use_cache
    is_unmasked = call.get("attention_mask") is None and call.get("position_ids") is not None
    return is_unmasked and call.get("cache") is None and not makes_cache


def _encoded(settings: Settings, call: Call) -> Call:
    """The arguments of `call` with its images encoded."""
    outputs = {visual.modality: each.encode() for visual, each in views_of(settings, call).items()}
    return _without_pixels(settings, call) | {"mm_encoder_outputs": outputs}


def _without_pixels(settings: Settings, call: Call) -> Call:
    encoded = {"image_sizes", *[visual.pixels for visual in settings.family.inputs]}
    return {name: value for name, value in call.items() if name not in encoded}


def _option(model: Any, call: Call, name: str) -> Any:
    """An option of `generate()`: the argument, else the value in its generation config, else in the model's."""
    value = call.get(name)
    for config in (call.get("generation_config"), model.generation_config):
        if value is None:
            value = getattr(config, name, None)
    return value


def new_tokens(model: Any, call: Call) -> int:
    """How many tokens a call of `generate()` may add to its prompt. transformers adds 20 if nothing is said."""
    new, length = (_option(model, call, name) for name in ("max_new_tokens", "max_length"))
    if new is not None:
        return int(new)
    prompt = call.get("inputs") if call.get("input_ids") is None else call["input_ids"]
    return max(0, int(length) - prompt.shape[1]) if length and isinstance(prompt, torch.Tensor) else 20


def _inferred_mask(model: Any, call: Call) -> torch.Tensor:
    """The mask of the full prompt that transformers would infer."""
    ids: torch.Tensor = call["input_ids"]
    pad, eos = _option(model, call, "pad_token_id"), _option(model, call, "eos_token_id")
    is_padded = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
    return ids.ne(pad).long() if is_padded else torch.ones_like(ids)


def _with_alone_labels(call: Call) -> Call:
    """The arguments without the label of the first token after left padding, which nothing predicts in a row alone."""
    labels, mask = call.get("labels"), call.get("attention_mask")
    if labels is None or mask is None or mask.ndim != 2 or mask.shape[1] != labels.shape[1]:
        return call
    mask = mask.to(labels.device)
    return call | {"labels": labels.masked_fill((mask != 0) & (mask.cumsum(1) == 1), -100)}

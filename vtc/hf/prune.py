"""Pruning inside the language model: the layers after its r-th one see only the visual tokens that are kept.

    layers 0 .. r-1     all L columns of the prompt
    layer  r            hidden states, rotary embeddings and mask are compacted to S columns, once
    layers r .. end     S columns, at the rotary positions they had before

With `kv="full"`, layers before r keep the KV of all L columns and later layers have S. With `kv="compact"`, the dropped
columns are removed from the former too, in one launch after the prefill: the cache has S columns in every layer.

A schedule has several such stages, each with an r and an S of its own. It may have one before the language model, too:
then the L columns are those of the prompt that was shortened there.

With `reselect=True` of "fastv" nothing is removed, see `vtc.hf.prune_mask`. A note on the cache (`PrunedConversation`)
tells decoding steps what they need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vtc import methods, ops
from vtc.config import Stages
from vtc.hf import conversation
from vtc.hf.conversation import PrunedConversation, Stage
from vtc.hf.encode import Selection
from vtc.hf.names import CACHE, cache_of
from vtc.hf.prompt import Prompt, Shortening, require_ids
from vtc.hf.prune_layers import ARGUMENT, LastToken, LayerKeys, causal_mask, hooked, on_device_of
from vtc.hf.prune_limits import is_static
from vtc.hf.prune_mask import Masking
from vtc.hf.settings import Run, Settings, running
from vtc.hf.views import plan_of


class _Drop(NamedTuple):
    """One stage: from `layer` on, each image has `keep` of the `tokens` that it had before.

    `indices` `[images, keep]` int64 says which, None if the method selects. Rows then have `shortest` to `longest`
    columns.
    """

    layer: int
    tokens: int
    keep: int
    indices: Tensor | None
    longest: int
    shortest: int


class _Prefill:
    """The prefill of one prompt, layer by layer.

    An image has `num_tokens` placeholders. `stages` are pairs (layer, K). `selections` has the indices `[images, K]` of
    the tokens that stay in each, of those before it; None if the method selects by the prompt.
    """

    def __init__(
        self,
        settings: Settings,
        prompt: Prompt,
        token: int,
        num_tokens: int,
        stages: Stages,
        selections: tuple[Tensor, ...] | None,
    ) -> None:
        self.config, self.text = settings.config, settings.base.language_model.config
        self.method = _method_of(settings)
        self.is_image, self.real, self.padding = prompt.is_image[token], prompt.real, prompt.padding
        self.is_masked, self.entered = prompt.is_padded or prompt.hides_images, prompt.real
        self.drops, images = [], prompt.images[token]
        before = num_tokens
        for at, (layer, keep) in enumerate(stages):
            indices = None if selections is None else _expand_for_beams(selections[at], images)
            lengths = prompt.lengths({token: [(num_tokens, keep)] * sum(images)})
            self.drops.append(_Drop(layer, before, keep, indices, max(lengths), min(lengths)))
            before = keep
        self.norm = settings.base.language_model.norm
        by_states = self.method.reads == "states"
        self.reader = LayerKeys() if by_states else LastToken(self.real, self.config.backend)
        self.shorter: dict[str, Any] = {}  # the arguments of layers from r on
        self.cache: Any = None
        self.done: list[tuple[Stage, Shortening]] = []
        self.position: Any = None  # [B, 1] int64: of the first token after the prompt

    def before(self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The hidden states that layer `number` gets instead of `hidden`; its `arguments` are changed in place."""
        if len(self.done) < len(self.drops):
            drop = self.drops[len(self.done)]
            if number == drop.layer - 1 and drop.indices is None:
                self.reader.read(layer, hidden, arguments)
            if number == drop.layer:
                arguments |= self.shorter
                hidden = self._shorten(drop, hidden, arguments)
        arguments |= self.shorter
        return hidden

    def _keep_mask(self, drop: _Drop, hidden: Tensor) -> Tensor:
        """Which columns `[B, L]` bool of the hidden states `[B, L, D]` stay."""
        device = hidden.device
        is_image, real = self.is_image.to(device), ~self.padding.to(device)
        if drop.indices is not None:
            return methods.keep_patches(is_image, drop.indices.to(device), drop.tokens) & real
        keep = is_image.sum(1) // drop.tokens * drop.keep
        if isinstance(self.reader, LastToken):
            scores = self.reader.scores(self.cache, drop.layer - 1, self.real)
        else:
            keys = self.reader.of(self.cache, drop.layer - 1, self.real.shape[1])
            with torch.no_grad():
                states = self.norm(on_device_of(self.norm, hidden))
            given = (each.to(keys.device) for each in (states, is_image, self.real, keep))
            scores = self.method.prompt_scores(keys, *given)
        stays: Tensor = self.method.keep_prompt(scores.to(device), is_image, keep)
        return stays & real

    def _shorten(self, drop: _Drop, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        batch, length = hidden.shape[:2]
        self.cache = arguments.get(CACHE)
        is_static(self.cache, self.config.kept_kv == "compact")
        shortening = Shortening(self._keep_mask(drop, hidden).long(), drop.longest, drop.shortest)
        valid = (
            shortening.take(self.real.to(hidden.device), False) if self.is_masked or not shortening.is_even else None
        )
        positions = arguments["position_ids"].expand(batch, length).to(hidden.device)
        cos, sin = (part.expand(batch, -1, -1).to(hidden.device) for part in arguments["position_embeddings"])
        inputs = (hidden, cos, sin, positions)
        hidden, cos, sin, kept = ops.compact(inputs, shortening.columns, backend=self.config.backend)
        mask = causal_mask(self.text, hidden, valid, self.cache, drop.layer)
        self.shorter = {"position_embeddings": (cos, sin), "position_ids": kept, "attention_mask": mask}
        if self.position is None:
            self.position = positions[:, -1:] + 1
        self.done.append((Stage(drop.layer, drop.longest, valid), shortening))
        if len(self.done) < len(self.drops):  # what the next stage has to know of the columns
            self.is_image = shortening.take(self.is_image.to(hidden.device), False)
            self.padding = ~shortening.filled.expand(batch, -1)
            self.real = ~self.padding if valid is None else valid
        return hidden

    @property
    def columns(self) -> list[int]:
        """How many columns of the prompt each layer holds after `finish`."""
        num_layers, kept = self.text.num_hidden_layers, [stage.kept for stage, _ in self.done]
        if self.config.kept_kv == "compact":
            return kept[-1:] * num_layers
        starts = [stage.layer for stage, _ in self.done]
        held = [self.entered.shape[1], *kept]
        return [held[sum(start <= number for start in starts)] for number in range(num_layers)]

    def finish(self) -> None:
        """After the last layer: with `kv="compact"` shorten the KV of the layers before the last r; leave the note."""
        if self.cache is None:
            return
        if self.config.kept_kv == "compact":
            self._compact_cache()
        note = PrunedConversation(
            stages=tuple(stage for stage, _ in self.done),
            length=self.entered.shape[1],
            entered=self.entered.shape[1],
            compact=self.config.kept_kv == "compact",
            real=self.entered if self.is_masked else None,
            position=self.position,
        )
        conversation.leave(self.cache, note)

    def _compact_cache(self) -> None:
        """Shorten what the layers before each stage hold to the columns of the last one."""
        columns: Tensor | None = None
        for number in reversed(range(len(self.done))):
            stage, shortening = self.done[number]
            columns = shortening.columns if columns is None else shortening.columns.gather(1, columns)
            first, length = (self.done[number - 1][0].layer, self.done[number - 1][0].kept) if number else (0, 0)
            self._compact_layers(self.cache.layers[first : stage.layer], length or self.entered.shape[1], columns)

    def _compact_layers(self, own: Any, length: int, columns: Tensor) -> None:
        """Keep these `columns` `[B, S]` of the `length` of the prompt that the layers hold."""
        by_device: dict[torch.device, list[Any]] = {}
        for layer in own:
            by_device.setdefault(layer.keys.device, []).append(layer)
        for device, layers in by_device.items():
            tensors = [[tensor[:, :, :length] for tensor in (layer.keys, layer.values)] for layer in layers]
            keys, values = zip(*tensors, strict=True)
            short = ops.compact_kv(keys, values, columns.to(device), backend=self.config.backend)
            for layer, key, value in zip(layers, *short, strict=True):
                if type(layer) is DynamicLayer:
                    layer.keys, layer.values = key, value
                else:  # a static layer keeps its tensors; later tokens overwrite the columns from S on
                    with torch.no_grad():
                        layer.keys[:, :, : key.shape[2]] = key
                        layer.values[:, :, : value.shape[2]] = value
                        layer.cumulative_length.fill_(key.shape[2])


class _Selecting(Run):
    """The run of a call that ends as soon as the method has selected, with `_Selected`."""


class _Selected(Exception):
    """What the method got and gave: scores `[B, L]` float32; which columns stay, and which are image tokens, bool."""

    def __init__(self, scores: Tensor, stays: Tensor, is_image: Tensor) -> None:
        super().__init__()
        self.scores, self.stays, self.is_image = scores, stays, is_image


class _Ending:
    """A method that ends the call when it has selected."""

    def __init__(self, method: Any) -> None:
        self.method, self.backend, self.reads = method, method.backend, method.reads

    def prompt_scores(self, *given: Tensor) -> Tensor:
        scores: Tensor = self.method.prompt_scores(*given)
        return scores

    def keep_prompt(self, scores: Tensor, is_image: Tensor, keep: int | Tensor) -> Tensor:
        raise _Selected(scores, self.method.keep_prompt(scores, is_image, keep), is_image)


def _method_of(settings: Settings) -> Any:
    method = settings.config.build_method()
    return _Ending(method) if isinstance(settings.run, _Selecting) else method


def select(model: Any, settings: Settings, inputs: Mapping[str, Any]) -> Selection:
    """The image tokens that `model.generate(**inputs)` keeps inside the language model, and their scores.

    It runs `generate()`, or `forward()` of a model that has none, up to the layer that prunes. A model that selects
    again for every new token shows the selection of the prompt's last token.

    Returns
    -------
    Selection
        A row for each image, in the order of the prompts. The images of a prompt share its K, so `counts` tells how
        many tokens each keeps if they keep different numbers.

    Raises
    ------
    ValueError
        As `generate()`, and if the layer at which the method selects does not run.
    """
    plan = plan_of(settings, "whole", inputs[settings.family.inputs[0].pixels])
    try:
        with running(settings._replace(run=_Selecting())):
            if hasattr(model, "generate"):
                model.generate(**inputs, max_new_tokens=1, num_beams=1, num_return_sequences=1)
            else:
                model(**inputs)
    except _Selected as found:
        stays, scores = (
            each[found.is_image].unflatten(0, (-1, plan.num_tokens)) for each in (found.stays, found.scores)
        )
    else:
        what = f"the {'generate' if hasattr(model, 'generate') else 'forward'}() of a {type(model).__name__}"
        raise ValueError(
            f"{what} did not run layer {settings.config.prune_after} of the language model on these inputs; pass a "
            "LLaVA that runs its own layers, and inputs with an image and its tokens"
        )
    counts = stays.sum(1)
    places = torch.arange(plan.num_tokens, device=stays.device).expand_as(stays)
    indices = places.masked_fill(~stays, plan.num_tokens).sort(1).values[:, : int(counts.max())]
    is_even = bool((counts == counts[0]).all())
    return Selection(
        indices.masked_fill(indices == plan.num_tokens, -1), scores, plan.grid, None if is_even else counts
    )


def _expand_for_beams(indices: Tensor, images: list[int]) -> Tensor:
    """Repeat the indices `[images, K]` if the rows are C copies of each prompt (beams)."""
    copies, rest = divmod(sum(images), max(len(indices), 1))
    if rest:
        raise ValueError(f"got {len(indices)} image(s), but input_ids has placeholders for {sum(images)}")
    if copies == 1:
        return indices
    order, first = [], 0
    for count in images[::copies]:
        order += [*range(first, first + count)] * copies
        first += count
    return indices[order]


@functools.partial(torch.compiler.disable, reason="hooks on layers; use prune_layer=0 to compile forward()")
def prefill(stock: Callable[..., Any], settings: Settings, call: dict[str, Any]) -> Any:
    """Run the `forward` of the model without a head on a prompt with encoded images, pruned inside it.

    Returns
    -------
    The output of `stock`, with the caller's columns: column j is that of the last one <= j that stays.

    Raises
    ------
    ValueError
        If the cache is not empty, or the prompt and its images do not match.
    """
    require_ids(call)
    base, config, cache, visual = settings.base, settings.config, call.get("cache"), settings.family.inputs[0]
    if conversation.length_of(cache):
        raise ValueError(
            "images on top of a cache cannot be pruned inside the language model; start without it, with the whole "
            "conversation and all of its images"
        )
    outputs = call["mm_encoder_outputs"][visual.modality]
    selections = getattr(outputs, "selections", None)
    if selections is None and not methods.class_of(config.method).prunes_only_language():
        raise ValueError("got mm_encoder_outputs, but VTC has to encode the images itself; pass pixel_values")
    sizes = [len(features) for features in outputs.pooler_output]
    stages = tuple(stage for stage in config.stages(sizes[0]) if stage[0])
    if stages[0][1] == sizes[0] and not isinstance(settings.run, _Selecting):
        stages, selections = stages[1:], selections and selections[1:]
    if not stages:
        return stock(**call)
    token, static = getattr(base.config, visual.token), bool(getattr(cache, "is_compileable", False))
    prompt = Prompt.read(call["input_ids"], call.get("attention_mask"), {token: sizes}, static)
    returns_tuple = call.pop("return_dict", base.config.return_dict) is False
    if config.reselects:
        kept = torch.tensor(prompt.images[token], device=prompt.input_ids.device) * stages[0][1]
        result = _prefill_masked(stock, settings, call, prompt, prompt.is_image[token], kept)
        return result.to_tuple() if returns_tuple else result
    pruning = _Prefill(settings, prompt, token, sizes[0], stages, selections)
    with hooked(base.language_model.layers, pruning):
        result = stock(**call, return_dict=True, **{ARGUMENT: pruning})
    pruning.finish()
    for stage, shortening in reversed(pruning.done):
        shortening.spread_outputs(result, stage.layer)
    if settings.run is not None:
        before = prompt.shape[1] if config.prune_after else settings.run.prompt_before  # shortened already
        settings.run.count_prompt(before or prompt.shape[1], pruning.drops[-1].longest)
        settings.run.count_cache(cache_of(result), pruning.columns)
    return result.to_tuple() if returns_tuple else result


def _prefill_masked(
    stock: Callable[..., Any], settings: Settings, call: dict[str, Any], prompt: Prompt, is_image: Tensor, keep: Tensor
) -> Any:
    """As `prefill`, by a token mask: every column stays. `keep` `[B]` counts the image tokens that a row sees."""
    base, config = settings.base, settings.config
    if is_static(call.get("cache"), True):
        raise ValueError(
            "reselect=True masks tokens by hooks on layers, which a static cache does not support; use a dynamic "
            'cache, or reselect=False and kv="compact"'
        )
    method, text, length = _method_of(settings), base.language_model.config, prompt.shape[1]
    masking = Masking(method, text, config.prune_after, is_image, prompt.real, keep, length)
    with hooked(base.language_model.layers, masking):
        result = stock(**call, return_dict=True, **{ARGUMENT: masking})
    cache, real = cache_of(result), prompt.real if prompt.is_padded or prompt.hides_images else None
    if cache is not None:
        note = PrunedConversation(
            stages=(Stage(config.prune_after, length, real),),
            length=length,
            entered=length,
            compact=False,
            real=real,
            position=masking.position,
            method=method,
            is_image=is_image,
            keep=keep,
        )
        conversation.leave(cache, note)
    if settings.run is not None:
        settings.run.count_prompt(length, length)
        settings.run.count_cache(cache)
    return result

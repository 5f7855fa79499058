"""Pruning inside the language model: the layers after its r-th one see only the visual tokens that are kept.

    layers 0 .. r-1     all L columns of the prompt
    layer  r            hidden states, rotary embeddings and mask are compacted to S columns, once
    layers r .. end     S columns, at the rotary positions they had before

With `kv="full"`, layers before r keep the KV of all L columns and later layers have S. With `kv="compact"`, the dropped
columns are removed from the former too, in one launch after the prefill: the cache has S columns in every layer.

No modeling code is copied, and no class changes. One call of the language model carries an object of this module as an
argument, which is passed to every layer. The hooks on the layers exist during the call and act only if that argument is
their own object, so two threads may use one model. A note on the cache (`PrunedConversation`) tells decoding steps what
they need.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

from vtc import methods, ops
from vtc.config import kept_count
from vtc.hf import conversation
from vtc.hf.conversation import PrunedConversation
from vtc.hf.names import CACHE, cache_of
from vtc.hf.prompt import Prompt, Shortening, require_ids
from vtc.hf.prune_limits import is_static
from vtc.hf.settings import Settings

ARGUMENT = "vtc_pruning"  # the argument of a layer that carries the object of the call


class Pruning(Protocol):
    """One call of the language model."""

    def before(self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The hidden states that layer `number` gets instead of `hidden`; its `arguments` are changed in place."""


@contextlib.contextmanager
def hooked(layers: Any, owner: Pruning) -> Iterator[None]:
    """While the block runs, `owner.before` changes each layer's input in the call that carries `owner`."""

    def make(number: int) -> Callable[..., Any]:
        def hook(layer: Any, args: tuple[Any, ...], arguments: dict[str, Any] | None = None) -> Any:
            # None: a concurrent call saw this hook mid-registration.
            if arguments is None or arguments.get(ARGUMENT) is not owner:
                return None
            arguments = {name: value for name, value in arguments.items() if name != ARGUMENT}
            hidden, *rest = args
            return (owner.before(number, layer, hidden, arguments), *rest), arguments

        return hook

    handles = [layer.register_forward_pre_hook(make(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Prefill:
    """The prefill of one prompt, layer by layer."""

    def __init__(
        self, settings: Settings, prompt: Prompt, token: int, counts: list[tuple[int, int]], indices: Tensor | None
    ) -> None:
        self.config, self.text = settings.config, settings.base.language_model.config
        self.is_image, self.real, self.padding = prompt.is_image[token], prompt.real, prompt.padding
        self.is_masked = prompt.is_padded or prompt.hides_images
        self.images, (self.num_tokens, self.keep) = prompt.images[token], counts[0]
        self.indices = None if indices is None else _expand_for_beams(indices, self.images)
        lengths = prompt.lengths({token: counts})
        self.longest, self.shortest = max(lengths), min(lengths)
        self.query: Tensor | None = None  # of the last prompt token in layer r - 1, [B, H, D]
        self.keys: Tensor | None = None  # of that layer, [B, Hkv, L, D], if no cache holds them
        self.scale: float | None = None
        self.shorter: dict[str, Any] = {}  # the arguments of layers from r on
        self.cache: Any = None
        self.shortening: Shortening | None = None
        self.note: PrunedConversation | None = None

    def before(self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The hidden states that layer `number` gets instead of `hidden`; its `arguments` are changed in place."""
        if number == self.config.prune_after - 1 and self.indices is None:
            self._read_last_query(layer, hidden, arguments)
        if number == self.config.prune_after:
            hidden = self._shorten(hidden, arguments)
        if number >= self.config.prune_after:
            arguments |= self.shorter
        return hidden

    def _read_last_query(self, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """The last prompt token's query in `layer`: recomputed here, because the layer does not expose it."""
        attention = layer.self_attn
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
        device = layer.input_layernorm.weight.device  # the first layer on a device gets its input from another one
        hidden = hidden if device.type == "meta" else hidden.to(device)
        cos, sin = (part.expand(len(hidden), -1, -1).to(hidden.device) for part in arguments["position_embeddings"])
        length = hidden.shape[1]
        last = length - 1 - self.real.to(hidden.device).flip(1).int().argmax(1, keepdim=True)  # [B, 1]

        def project(projection: Any, states: Tensor, *angles: Tensor) -> Tensor:
            heads = projection(layer.input_layernorm(states)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            rotated: Tensor = rotate(heads, heads, *angles)[0]
            return rotated

        with torch.no_grad():
            row = ops.compact((hidden, cos, sin), last, backend=self.config.backend)
            self.query, self.scale = project(attention.q_proj, *row)[:, :, 0], attention.scaling
            if arguments.get(CACHE) is None:
                self.keys = project(attention.k_proj, hidden, cos, sin)

    def _keep_mask(self, device: torch.device) -> Tensor:
        """Which columns `[B, L]` bool stay."""
        is_image, real, backend = self.is_image.to(device), self.real.to(device), self.config.backend
        text = ~self.padding.to(device)
        if self.indices is not None:
            return methods.keep_patches(is_image, self.indices.to(device), self.num_tokens) & text
        keys, query = self.keys, self.query
        if keys is None:
            keys = self.cache.layers[self.config.prune_after - 1].keys[:, :, : real.shape[1]]
        if query is None:
            raise RuntimeError("the layer before the one that prunes did not run")
        scores = ops.row_scores(query, keys, scale=self.scale, mask=real.to(keys.device), backend=backend)
        keep = is_image.sum(1) // self.num_tokens * self.keep
        method: Any = self.config.build_method()
        stays: Tensor = method.keep_prompt(scores.to(device), is_image, keep)
        return stays & text

    def _shorten(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        batch, length = hidden.shape[:2]
        self.cache = arguments.get(CACHE)
        is_static(self.cache, self.config.kv == "compact")
        shortening = Shortening.of(self._keep_mask(hidden.device), self.longest, self.shortest)
        valid = (
            shortening.take(self.real.to(hidden.device), False) if self.is_masked or not shortening.is_even else None
        )
        positions = arguments["position_ids"].expand(batch, length).to(hidden.device)
        cos, sin = (part.expand(batch, -1, -1).to(hidden.device) for part in arguments["position_embeddings"])
        inputs = (hidden, cos, sin, positions)
        hidden, cos, sin, kept = ops.compact(inputs, shortening.columns, backend=self.config.backend)
        mask = causal_mask(self.text, hidden, valid, self.cache, self.config.prune_after)
        self.shorter = {"position_embeddings": (cos, sin), "position_ids": kept, "attention_mask": mask}
        self.note = PrunedConversation(
            layer=self.config.prune_after,
            length=length,
            kept=self.longest,
            compact=self.config.kv == "compact",
            valid=valid,
            real=self.real if self.is_masked else None,
            position=positions[:, -1:] + 1,
        )
        self.shortening = shortening
        return hidden

    def finish(self) -> None:
        """After the last layer: with `kv="compact"` shorten the KV of the layers before r; leave the note."""
        if self.cache is None:
            return
        if self.config.kv == "compact":
            self._compact_cache()
        conversation.leave(self.cache, self.note)

    def _compact_cache(self) -> None:
        length, by_device = self.is_image.shape[1], {}  # type: ignore[var-annotated]
        if self.shortening is None:
            raise RuntimeError("the layer that prunes did not run")
        for layer in self.cache.layers[: self.config.prune_after]:
            by_device.setdefault(layer.keys.device, []).append(layer)
        for device, layers in by_device.items():
            tensors = [[tensor[:, :, :length] for tensor in (layer.keys, layer.values)] for layer in layers]
            keys, values = zip(*tensors, strict=True)
            short = ops.compact_kv(keys, values, self.shortening.columns.to(device), backend=self.config.backend)
            for layer, key, value in zip(layers, *short, strict=True):
                if type(layer) is DynamicLayer:
                    layer.keys, layer.values = key, value
                else:  # a static layer keeps its tensors; later tokens overwrite the columns from S on
                    with torch.no_grad():
                        layer.keys[:, :, : key.shape[2]] = key
                        layer.values[:, :, : value.shape[2]] = value
                        layer.cumulative_length.fill_(key.shape[2])


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


def causal_mask(text: Any, hidden: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Any:
    """The mask for hidden states `[B, S, D]` in `layer`, in the form that the language model's attention takes."""
    arguments = {"config": text, "inputs_embeds": hidden, "attention_mask": mask, CACHE: cache, "layer_idx": layer}
    return create_causal_mask(**arguments)


@functools.partial(torch.compiler.disable, reason="hooks on layers; use prune_layer=0 to compile forward()")
def prefill(stock: Callable[..., Any], settings: Settings, call: dict[str, Any]) -> Any:
    """Run the `forward` of the model without a head on a prompt with encoded images, pruned after layer `prune_after`.

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
    indices = getattr(outputs, "kept_indices", None)
    if indices is None and not methods.METHODS[config.method].prunes_only_language():
        raise ValueError("got mm_encoder_outputs, but VTC has to encode the images itself; pass pixel_values")
    sizes = [len(features) for features in outputs.pooler_output]
    keep = kept_count(config, sizes[0])
    if keep == sizes[0]:
        return stock(**call)
    token, static = getattr(base.config, visual.token), bool(getattr(cache, "is_compileable", False))
    prompt = Prompt.read(call["input_ids"], call.get("attention_mask"), {token: sizes}, static)
    pruning = _Prefill(settings, prompt, token, [(size, keep) for size in sizes], indices)
    returns_tuple = call.pop("return_dict", base.config.return_dict) is False
    with hooked(base.language_model.layers, pruning):
        result = stock(**call, return_dict=True, **{ARGUMENT: pruning})
    pruning.finish()
    if pruning.shortening is not None:
        pruning.shortening.spread_outputs(result, config.prune_after)
    if settings.run is not None:
        settings.run.count_prompt(prompt.shape[1], pruning.longest)
        settings.run.count_cache(cache_of(result), config.prune_after if config.kv == "full" else 0)
    return result.to_tuple() if returns_tuple else result

"""Pruning inside the language model: after its r-th layer, only the visual tokens that are kept go on.

    layers 0 .. r-1     all L columns of the prompt
    layer  r            hidden states, rotary embeddings and mask are compacted to S columns, once
    layers r .. end     S columns, at the rotary positions they had before

With `kv="full"` layers before r keep the KV of all L columns and later layers have S; with `kv="compact"` what was
dropped is removed from the former too, in one launch after the prefill: the cache is S columns in every layer.

No modeling code is copied, and no class changes. One call of the language model carries an object of this module as
an argument, which every layer is given; hooks on the layers, put there for the call and removed after it, act only if
that argument is theirs. So two threads may use one model. What decoding steps have to know is a note on the cache
(`Pruned`), so that it lives and dies with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from vtc import methods, ops
from vtc.config import VTCConfig

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")  # by model_type; their layers are alike
ARGUMENT = "vtc_pruning"  # of a layer: the object whose call it is


def check(language_model: Any, config: VTCConfig) -> None:
    """Raise ValueError if `language_model` cannot be pruned after layer `config.prune_after`."""
    text = language_model.config
    if text.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"prune_layer={config.prune_after} needs a language model of type {', '.join(LANGUAGE_MODELS)}, got "
            f"{text.model_type!r}; use prune_layer=0 and a method that prunes before the language model"
        )
    if getattr(text, "sliding_window", None) is not None:
        raise ValueError(
            f"prune_layer={config.prune_after} needs layers that attend to everything, but this language model has "
            f"sliding_window={text.sliding_window}; use prune_layer=0"
        )
    if not 0 < config.prune_after < text.num_hidden_layers:
        raise ValueError(
            f"prune_layer={config.prune_after} leaves no layer to prune for: the language model has "
            f"{text.num_hidden_layers}; use 1 to {text.num_hidden_layers - 1}, or 0 to prune before it"
        )
    if language_model.training and getattr(language_model, "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing runs layers again without the pruning of the first time; use "
            "model.gradient_checkpointing_disable(), or prune_layer=0"
        )


# --- the prompt -----------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """A prompt of B rows and L columns that is about to be read.

    Attributes
    ----------
    is_image, real : Tensor[B, L], bool
        Where the visual tokens are, and what is not padding.
    tokens, kept : int
        N and K of every image.
    images : list of int
        How many each row has.
    length : int
        S: as many columns as stay in the row in which most do.
    even, padded : bool
        Whether that many stay in each row, so that nothing pads the shortened prompt; whether something pads the full.
    """

    is_image: Tensor
    real: Tensor
    tokens: int
    kept: int
    images: list[int]
    length: int
    even: bool
    padded: bool

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, static: bool, placeholder: int, tokens: int, kept: int) -> Prompt:
        """Read ids `[B, L]` and the mask: `[B, L]`; None; or, of a static cache, what transformers made of it."""
        is_image = ids == placeholder
        if mask is None:
            real = torch.ones_like(is_image)
        elif mask.ndim == 2 and mask.shape == ids.shape:
            real = mask.bool()
        elif mask.ndim == 4 and static:  # [B, 1, L, M], left-padded: the last token sees all of its row
            row = mask[:, 0, -1, : ids.shape[1]]
            real = (row if row.dtype == torch.bool else row == 0).expand(ids.shape)
        else:
            raise ValueError(
                f"attention_mask must be [B, L] = {list(ids.shape)} for prune_layer > 0, got {list(mask.shape)}; a "
                "mask of another kind cannot be shortened"
            )
        # The one read back: how long the shortened prompt is depends on it.
        counts = torch.stack([is_image.sum(1), real.sum(1), (is_image & ~real).sum(1)]).tolist()
        if any(found % tokens for found in counts[0]) or any(counts[2]):
            raise ValueError(
                f"the rows of input_ids hold {', '.join(map(str, counts[0]))} image placeholders, of which "
                f"attention_mask hides {', '.join(map(str, counts[2]))}; each image takes {tokens}, all in one row and "
                "none hidden: pass input_ids and attention_mask as the processor makes them"
            )
        images = [found // tokens for found in counts[0]]
        stay = [real - count * (tokens - kept) for count, real in zip(images, counts[1], strict=True)]
        padded = min(counts[1]) < ids.shape[1]
        return cls(is_image, real, tokens, kept, images, max(stay), min(stay) == max(stay), padded)

    def of_each_copy(self, indices: Tensor) -> Tensor:
        """The indices `[images, K]` of the rows' images, if rows are C copies of each of fewer prompts (beams)."""
        copies, rest = divmod(sum(self.images), max(len(indices), 1))
        if rest:
            raise ValueError(f"got {len(indices)} image(s), but input_ids has places for {sum(self.images)}")
        if copies == 1:
            return indices
        order, first = [], 0
        for count in self.images[::copies]:
            order += [*range(first, first + count)] * copies
            first += count
        return indices[order]


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A note on a cache (`_vtc_pruned`): what was made of the prompt in it.

    Attributes
    ----------
    layer, length, kept : int
        r, L and S.
    compact : bool
        Whether layers before r have S columns as well.
    valid, real : Tensor[B, S] and Tensor[B, L], bool, or None
        Which columns of the shortened and of the full prompt are tokens; None if all are.
    position : Tensor[B or 1, 1], int64
        Of the first token after the prompt.
    """

    layer: int
    length: int
    kept: int
    compact: bool
    valid: Tensor | None
    real: Tensor | None
    position: Tensor


def note_on(cache: Any) -> Pruned | None:
    """The note on a cache, if there is one."""
    return getattr(cache, "_vtc_pruned", None)


def _check_cache(cache: Any, compact: bool) -> bool:
    """Whether `cache` is a static one, or ValueError if it is of a kind that cannot be shortened."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    if getattr(cache, "offloading", False) or not kinds <= {DynamicLayer, StaticLayer} or len(kinds) > 1:
        raise ValueError(
            f"prune_layer > 0 works with a DynamicCache or a StaticCache of plain layers, got {type(cache).__name__} "
            f"of {', '.join(sorted(kind.__name__ for kind in kinds))}"
            f"{', offloaded' if getattr(cache, 'offloading', False) else ''}; leave past_key_values and "
            "cache_implementation away, or use prune_layer=0"
        )
    static = kinds == {StaticLayer}
    if static and not compact:
        raise ValueError(
            'kv="full" gives layers of two lengths, which a static cache is not for; use '
            'vtc.configure(model, kv="compact"), or a dynamic cache'
        )
    return static


# --- hooks that last for one call -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _hooked(layers: Any, owner: _Prefill | _Decode) -> Iterator[None]:
    """While the block runs, `owner.before` is asked for each layer's input in the call that carries `owner`."""

    def make(number: int) -> Callable[..., Any]:
        def hook(layer: Any, args: tuple[Any, ...], arguments: dict[str, Any] | None = None) -> Any:
            # None: another thread's call has met this hook while it was being put there or removed.
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
    """One prompt's way through the layers."""

    def __init__(self, language_model: Any, config: VTCConfig, prompt: Prompt, indices: Tensor | None) -> None:
        self.text, self.config, self.prompt, self.indices = language_model.config, config, prompt, indices
        self.query: Tensor | None = None  # of the last prompt token in layer r - 1, [B, H, D]
        self.keys: Tensor | None = None  # of that layer, [B, Hkv, L, D], if there is no cache to find them in
        self.scale: float | None = None
        self.shorter: dict[str, Any] = {}  # the arguments of layers from r on
        self.cache: Any = None
        self.columns: Tensor | None = None  # [B, S], those that stay
        self.note: Pruned | None = None

    def before(self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The hidden states that layer `number` gets instead of `hidden`; its `arguments` are changed in place."""
        if number == self.config.prune_after - 1 and self.indices is None:
            self._look(layer, hidden, arguments)
        if number == self.config.prune_after:
            hidden = self._shorten(hidden, arguments)
        if number >= self.config.prune_after:
            arguments |= self.shorter
        return hidden

    def _look(self, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Take the last prompt token's query, as `layer` is about to compute it once more among all others."""
        attention = layer.self_attn
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
        device = layer.input_layernorm.weight.device  # the first layer on a device gets its input from another one
        hidden = hidden if device.type == "meta" else hidden.to(device)
        cos, sin = (part.expand(len(hidden), -1, -1).to(hidden.device) for part in arguments["position_embeddings"])
        length = hidden.shape[1]
        last = length - 1 - self.prompt.real.to(hidden.device).flip(1).int().argmax(1, keepdim=True)  # [B, 1]

        def project(projection: Any, states: Tensor, *angles: Tensor) -> Tensor:
            heads = projection(layer.input_layernorm(states)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            rotated: Tensor = rotate(heads, heads, *angles)[0]
            return rotated

        with torch.no_grad():
            row = ops.compact((hidden, cos, sin), last, backend=self.config.backend)
            self.query, self.scale = project(attention.q_proj, *row)[:, :, 0], attention.scaling
            if arguments.get("past_key_values") is None:
                self.keys = project(attention.k_proj, hidden, cos, sin)

    def _stays(self, device: torch.device) -> Tensor:
        """Which columns `[B, L]` bool stay."""
        is_image, real, backend = self.prompt.is_image.to(device), self.prompt.real.to(device), self.config.backend
        if self.indices is not None:
            return methods.keep_patches(is_image, self.indices.to(device), self.prompt.tokens) & real
        keys, query = self.keys, self.query
        if keys is None:
            keys = self.cache.layers[self.config.prune_after - 1].keys[:, :, : real.shape[1]]
        if query is None:
            raise RuntimeError("the layer before the one that prunes did not run")
        scores = ops.row_scores(query, keys, scale=self.scale, mask=real.to(keys.device), backend=backend)
        keep = is_image.sum(1) // self.prompt.tokens * self.prompt.kept
        method: Any = methods.build(self.config.method, backend=backend)
        stays: Tensor = method.keep_prompt(scores.to(device), is_image, keep)
        return stays & real

    def _shorten(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        batch, length = hidden.shape[:2]
        self.cache = arguments.get("past_key_values")
        _check_cache(self.cache, self.config.kv == "compact")
        stays = self._stays(hidden.device)
        # A stable sort moves what stays of each row to its end, in order: its last token has to be the last column,
        # for that is where generate() takes the logits from. What fills up shorter rows lies before it, as padding.
        columns = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, length - self.prompt.length :]
        valid = None if self.prompt.even else stays.gather(1, columns)
        positions = arguments["position_ids"].expand(batch, length).to(hidden.device)
        cos, sin = (part.expand(batch, -1, -1).to(hidden.device) for part in arguments["position_embeddings"])
        hidden, cos, sin, kept = ops.compact((hidden, cos, sin, positions), columns, backend=self.config.backend)
        mask = create_causal_mask(
            config=self.text,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=self.cache,
            layer_idx=self.config.prune_after,
        )
        self.shorter = {"position_embeddings": (cos, sin), "position_ids": kept, "attention_mask": mask}
        self.columns = columns
        self.note = Pruned(
            self.config.prune_after,
            length,
            self.prompt.length,
            self.config.kv == "compact",
            valid,
            self.prompt.real if self.prompt.padded else None,
            positions[:, -1:] + 1,
        )
        return hidden

    def finish(self) -> None:
        """After the last layer: shorten the KV of the layers before r if asked to, and leave the note."""
        if self.cache is None:
            return
        if self.config.kv == "compact":
            self._compact_cache()
        self.cache._vtc_pruned = self.note

    def _compact_cache(self) -> None:
        columns, length, by_device = self.columns, self.prompt.is_image.shape[1], {}  # type: ignore[var-annotated]
        if columns is None:
            raise RuntimeError("the layer that prunes did not run")
        for layer in self.cache.layers[: self.config.prune_after]:
            by_device.setdefault(layer.keys.device, []).append(layer)
        for device, layers in by_device.items():
            tensors = [[tensor[:, :, :length] for tensor in (layer.keys, layer.values)] for layer in layers]
            keys, values = zip(*tensors, strict=True)
            short = ops.compact_kv(keys, values, columns.to(device), backend=self.config.backend)
            for layer, key, value in zip(layers, *short, strict=True):
                if type(layer) is DynamicLayer:
                    layer.keys, layer.values = key, value
                else:  # its tensors have to stay where they are; columns from S on are overwritten by what comes next
                    with torch.no_grad():
                        layer.keys[:, :, : key.shape[2]] = key
                        layer.values[:, :, : value.shape[2]] = value
                        layer.cumulative_length.fill_(key.shape[2])


def prefill(
    stock: Callable[..., Any],
    language_model: Any,
    call: dict[str, Any],
    config: VTCConfig,
    prompt: Prompt,
    indices: Tensor | None,
) -> Any:
    """Run `stock(**call)`, the forward of a model around `language_model`, pruned after layer `config.prune_after`.

    Parameters
    ----------
    indices : Tensor[images, K], int64, or None
        The patches that stay; None for a method that scores inside the language model.

    Returns
    -------
    The output of `stock`; its hidden states `[B, S, D]` are those of the tokens that stay, right-aligned.
    """
    if indices is not None:
        indices = prompt.of_each_copy(indices)
    run = _Prefill(language_model, config, prompt, indices)
    with _hooked(language_model.layers, run):
        outputs = stock(**call, **{ARGUMENT: run})
    run.finish()
    return outputs


# --- what comes after the prompt --------------------------------------------------------------------------------------


class _Decode:
    """A call on top of a cache whose layers from r on are shorter: their mask is another one."""

    def __init__(self, language_model: Any, note: Pruned, mask: Tensor | None) -> None:
        self.text, self.note, self.made = language_model.config, note, False
        self.mask: Any = mask  # [B, S + T], and once it is made whatever the attention takes

    def before(self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if number >= self.note.layer:
            if not self.made:
                self.mask = create_causal_mask(
                    config=self.text,
                    inputs_embeds=hidden,
                    attention_mask=self.mask,
                    past_key_values=arguments["past_key_values"],
                    layer_idx=self.note.layer,
                )
                self.made = True
            arguments["attention_mask"] = self.mask
        return hidden


def decode(stock: Callable[..., Any], language_model: Any, call: dict[str, Any], note: Pruned) -> Any:
    """Run `stock(**call)` for tokens after a pruned prompt: the caller's mask has its L columns, the cache has S."""
    cache, mask = call["past_key_values"], call.get("attention_mask")
    tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    batch, new = tokens.shape[:2]
    valid, held = note.valid, len(cache.layers[0].keys)
    if held != batch or (valid is not None and held != len(valid)):
        raise ValueError(
            f"past_key_values holds {held} rows, of {len(note.position if valid is None else valid)} pruned prompt(s), "
            f"got {batch} rows; repeat or select prompts before they are read, not in the cache"
        )
    static = _check_cache(cache, note.compact)
    seen = cache.get_seq_length() - (note.kept if note.compact else note.length)  # a tensor if the cache is static
    if call.get("position_ids") is None:
        call["position_ids"] = note.position.to(tokens.device) + seen + torch.arange(new, device=tokens.device)
    if static:  # transformers made the mask for columns as in the full prompt: make it again
        if valid is not None or mask is not None:
            columns = cache.layers[0].max_cache_len - note.kept
            call["attention_mask"] = _extended(note, torch.ones(batch, columns, dtype=torch.bool, device=tokens.device))
        return stock(**call)
    if mask is not None and (mask.ndim != 2 or mask.shape[1] != note.length + seen + new):
        raise ValueError(
            f"attention_mask must be [B, {note.length + seen + new}], the full prompt of {note.length} tokens and what "
            f"came after it, got {list(mask.shape)}"
        )
    after = tokens.new_ones(batch, seen + new, dtype=torch.bool) if mask is None else mask[:, note.length :].bool()
    short = None if mask is None and valid is None else _extended(note, after)
    if note.compact:
        call["attention_mask"] = short
        return stock(**call)
    if mask is None and note.real is not None:
        call["attention_mask"] = torch.cat([note.real.to(after.device), after], 1)
    run = _Decode(language_model, note, short)
    with _hooked(language_model.layers, run):
        return stock(**call, **{ARGUMENT: run})


def _extended(note: Pruned, after: Tensor) -> Tensor:
    """The mask `[B, S + T]` bool of the shortened prompt and `after` `[B, T]`."""
    before = after.new_ones(len(after), note.kept) if note.valid is None else note.valid.to(after.device)
    return torch.cat([before, after], 1)

"""What pruning needs of a language model's layers: hooks for one call, the mask, and the last token's attention.

No modeling code is copied, and no class changes. One call of the language model carries an object as an argument, which
is passed to every layer. The hooks on the layers exist during the call and act only if that argument is their own
object, so two threads may use one model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from vtc import ops
from vtc.hf.names import CACHE

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


def causal_mask(text: Any, hidden: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Any:
    """The mask for hidden states `[B, S, D]` in `layer`, in the form that the language model's attention takes."""
    arguments = {"config": text, "inputs_embeds": hidden, "attention_mask": mask, CACHE: cache, "layer_idx": layer}
    return create_causal_mask(**arguments)


class LayerKeys:
    """The keys of one layer: those in the cache, or computed again if there is none."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # [B, Hkv, T, D], if no cache holds them

    def read(self, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Before `layer` runs, from its input `[B, T, D]` and its arguments."""
        if arguments.get(CACHE) is None:
            with torch.no_grad():
                self.keys = _project(layer, layer.self_attn.k_proj, *_input_of(layer, hidden, arguments))

    def of(self, cache: Any, layer: int, length: int) -> Tensor:
        """The keys `[B, Hkv, M, D]` of the first `length` tokens after `layer` ran, after the rotary embedding."""
        keys: Tensor = cache.layers[layer].keys[:, :, :length] if self.keys is None else self.keys
        return keys


def on_device_of(norm: Any, hidden: Tensor) -> Tensor:
    """Hidden states where the weight of `norm` is. Offloaded weights move to their input."""
    device = norm.weight.device
    return hidden if device.type == "meta" else hidden.to(device)


def _input_of(layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The input `[B, T, D]` of `layer` on its device, and the cosines and sines of the positions for each row."""
    hidden = on_device_of(layer.input_layernorm, hidden)  # the first layer on a device gets its input from another one
    cos, sin = (part.expand(len(hidden), -1, -1).to(hidden.device) for part in arguments["position_embeddings"])
    return hidden, cos, sin


def _project(layer: Any, projection: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys `[B, H, T, D]` of `layer`, after the rotary embedding."""
    attention = layer.self_attn
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    heads = projection(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    rotated: Tensor = rotate(heads, heads, cos, sin)[0]
    return rotated


class LastToken:
    """The attention of each row's last token in one layer: recomputed, because the layer does not expose it.

    `real` `[B, T]` says which of the call's T tokens are not padding.
    """

    def __init__(self, real: Tensor, backend: str) -> None:
        self.keys_of = LayerKeys()
        self.real, self.backend = real, backend
        self.query: Tensor | None = None  # [B, H, D]
        self.scale: float | None = None

    def read(self, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Compute the query before `layer` runs, from its input `[B, T, D]` and its arguments."""
        hidden, cos, sin = _input_of(layer, hidden, arguments)
        last = hidden.shape[1] - 1 - self.real.to(hidden.device).flip(1).int().argmax(1, keepdim=True)  # [B, 1]
        with torch.no_grad():
            row = ops.compact((hidden, cos, sin), last, backend=self.backend)
            self.query, self.scale = _project(layer, layer.self_attn.q_proj, *row)[:, :, 0], layer.self_attn.scaling
        self.keys_of.read(layer, hidden, arguments)

    def scores(self, cache: Any, layer: int, seen: Tensor) -> Tensor:
        """Its attention `[B, M]` float32 after `layer` ran, mean over heads.

        `seen` `[B, M]` says which keys it attends to.
        """
        if self.query is None:
            raise RuntimeError("the layer before the one that prunes did not run")
        keys = self.keys_of.of(cache, layer, seen.shape[1])
        return ops.row_scores(self.query, keys, scale=self.scale, mask=seen.to(keys.device), backend=self.backend)

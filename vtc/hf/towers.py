"""The vision towers that VTC supports, and how they differ."""

from __future__ import annotations

import inspect
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class TowerSpec(NamedTuple):
    """One vision tower of transformers, by its config's `model_type`."""

    name: str
    layers: str  # path to its list of layers
    layer_norm: str  # of a layer: the norm before its attention
    norm: str = ""  # the norm between embeddings and layers
    cls: bool = True  # whether a [CLS] token comes first
    registers: str = ""  # the config's name for the number of register tokens that follow it

    def num_registers(self, config: Any) -> int:
        """The number of register tokens; the model has placeholders for them, as for patches."""
        return getattr(config, self.registers) if self.registers else 0

    def layers_of(self, tower: Any) -> Any:
        """Its layers, in order."""
        return operator.attrgetter(self.layers)(tower)

    def embed(self, tower: Any, pixel_values: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The input of the first layer, `[B, cls + N, D]`, from pixels `[B, 3, height, width]`.

        The tower ignores those of the `arguments` of its `forward` that its embeddings do not know.
        """
        if arguments:
            known = inspect.signature(tower.embeddings.forward).parameters
            arguments = {name: value for name, value in arguments.items() if name in known}
        hidden = tower.embeddings(pixel_values.to(tower.dtype), **arguments)
        return getattr(tower, self.norm)(hidden) if self.norm else hidden

    def run_layer(self, layer: Any, hidden: Tensor, scores: Any = None) -> Tensor:
        """One layer on `[B, cls + N, D]`; `scores`, if given, reaches the attention function as `vtc_scores`."""
        output: Tensor = layer(hidden, None, **({} if scores is None else {"vtc_scores": scores}))
        return output

    def projections(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's query of the first token `[B, C]` and keys `[B, cls + N, C]`, from its input. It does not run."""
        normed = getattr(layer, self.layer_norm)(hidden)
        parts = {name.rpartition(".")[2]: part for name, part in layer.named_modules()}
        return parts["q_proj"](normed[:, 0]), parts["k_proj"](normed)


TOWERS = {
    "clip_vision_model": TowerSpec("CLIP", "encoder.layers", "layer_norm1", norm="pre_layrnorm"),
    "dinov2": TowerSpec("DINOv2", "encoder.layer", "norm1"),
    "dinov2_with_registers": TowerSpec(
        "DINOv2 with registers", "encoder.layer", "norm1", registers="num_register_tokens"
    ),
    "vit": TowerSpec("ViT", "layers", "layernorm_before"),
    "siglip_vision_model": TowerSpec("SigLIP", "encoder.layers", "layer_norm1", cls=False),
}


def tower_of(config: Any) -> TowerSpec:
    """The entry of `TOWERS` for a tower's config.

    Raises
    ------
    ValueError
        If the tower is not known.
    """
    if config.model_type not in TOWERS:
        raise ValueError(
            f"the vision tower {config.model_type!r} is not supported; VTC knows {', '.join(TOWERS)}; use a LLaVA with "
            "such a tower, or vtc.disable(model)"
        )
    return TOWERS[config.model_type]

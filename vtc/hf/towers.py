"""The vision towers that VTC supports, and how they differ."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

INTERPOLATION = "interpolate_pos_encoding"


class TowerSpec(NamedTuple):
    """One vision tower of transformers, by its config's `model_type`."""

    name: str
    layers: str  # path to its list of layers
    cls: bool = True  # whether a [CLS] token comes first
    interpolation: str = ""  # the argument of its forward that makes it take images of any size; "": it always does
    registers: str = ""  # the config's name for the number of register tokens that follow it
    passes_on: bool = True  # whether its attention modules hand arguments of `forward` to the attention function

    def num_registers(self, config: Any) -> int:
        """The number of register tokens; the model has placeholders for them, as for patches."""
        return getattr(config, self.registers) if self.registers else 0

    def attentions_of(self, tower: Any) -> list[Any]:
        """Its attention modules, layer by layer: those that have a `q_proj` and a `k_proj`, or vLLM's `qkv_proj`.

        Raises
        ------
        ValueError
            If the tower is not built like that.
        """
        found = []
        try:
            layers = operator.attrgetter(self.layers)(tower)
            for layer in layers:
                for part in layer.modules():
                    if {"q_proj", "k_proj"} <= part._modules.keys() or "qkv_proj" in part._modules:
                        found.append(part)
                        break
                else:
                    raise AttributeError("q_proj and k_proj")
            return found
        except AttributeError as error:
            raise ValueError(
                f"the vision tower is a {type(tower).__name__}, whose layers VTC does not find; it needs a {self.name} "
                f"with {self.layers}, each with q_proj and k_proj; use the tower of transformers, or vtc.disable(model)"
            ) from error


TOWERS = {
    "clip_vision_model": TowerSpec("CLIP", "encoder.layers", interpolation=INTERPOLATION),
    "dinov2": TowerSpec("DINOv2", "encoder.layer"),
    "dinov2_with_registers": TowerSpec("DINOv2 with registers", "encoder.layer", registers="num_register_tokens"),
    "vit": TowerSpec("ViT", "layers", interpolation=INTERPOLATION),
    "siglip_vision_model": TowerSpec(
        "SigLIP", "encoder.layers", cls=False, interpolation=INTERPOLATION, passes_on=False
    ),
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

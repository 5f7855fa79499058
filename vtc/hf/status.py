"""Whether a model compresses, how, and what it has compressed: what `vtc.status` returns."""

from __future__ import annotations

import dataclasses
from typing import Any

from vtc import ops
from vtc.config import Stages, VTCConfig
from vtc.hf import encode, settings
from vtc.hf.families import TILES
from vtc.hf.graphs.model import of as graphs_of
from vtc.hf.settings import NAME, Settings
from vtc.hf.towers import tower_of
from vtc.hf.views import plan_of
from vtc.methods import Method
from vtc.plan import Plan

_DEFAULTS, _NOTHING = VTCConfig().to_dict(), object()


@dataclasses.dataclass(frozen=True)
class Status:
    """What a model does with an image now and here. `str()` gives a few lines of text.

    Attributes
    ----------
    compresses : bool
        Whether it drops visual tokens.
    way : str or None
        How it is switched on, None if it is not: "vtc.enable", "attn_implementation="vtc"", or an open block.
    method : str or None
        The name of the method, None if the settings are not valid.
    settings : dict
        Those that are given, with the options of the method, and those that the vision tower decides.
    tokens, kept : int or None
        Visual tokens of an image, and how many stay: at most so many with an adaptive method. None where both depend on
        the image, which is cut into tiles, and if the settings do not fit the model.
    adaptive : bool
        Whether the image decides how many stay.
    prune_layer : int
        The layer of the language model after which tokens are first dropped; 0: before the first.
    later : tuple of (int, int)
        The later stages of a schedule: pairs (layer, tokens from there on).
    tower, attention : str
        The kind of vision tower, and its attention implementation.
    scored : tuple of int
        The layers of the tower whose attention is scored, counted from 0: that of [CLS], or what patches receive.
    layers : int
        How many layers the tower has.
    device : str
    backends : dict
        Of each operation that an image takes without gradients: its backend, and why.
    images : int
        Images that it has compressed since it was switched on, in a block since that was opened; about so many if
        several threads use the model. Calls of a graph that torch.compile made are not counted.
    graphs : str or None
        What its graphs have recorded and replayed since `vtc.graphs` switched them on; None if it has none.
    problem : str or None
        Why the settings do not fit this model, which the next image would raise.
    """

    compresses: bool
    way: str | None
    tower: str
    attention: str
    layers: int
    device: str
    images: int
    method: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: int | None = None
    kept: int | None = None
    adaptive: bool = False
    prune_layer: int = 0
    later: Stages = ()
    scored: tuple[int, ...] = ()
    backends: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    graphs: str | None = None
    problem: str | None = None

    def __str__(self) -> str:
        if self.way is None:
            lines = ["compresses: no; vtc.enable(model) switches it on"]
        elif self.problem:
            lines = [f"compresses: no, an image raises an error: {self.problem}"]
        elif not self.compresses:
            lines = [f"compresses: no, method {self.method!r} keeps all tokens ({self.way})"]
        else:
            lines = [f"compresses: yes, by {self.way}"]
        if self.method is not None:
            given = ", ".join(f"{name}={value}" for name, value in self.settings.items())
            lines.append(f"method: {self.method} ({given or 'default settings'})")
        if self.compresses and self.tokens is not None:
            where = (
                f"after layer {self.prune_layer} of the language model" if self.prune_layer else "before the projector"
            )
            where += "".join(f", then {kept} after layer {layer} of the language model" for layer, kept in self.later)
            lines.append(
                f"visual tokens per image: {self.tokens} -> {'at most ' if self.adaptive else ''}{self.kept}, {where}"
            )
        lines.append(f"vision tower: {self.tower} on {self.device}, attention {self.attention!r}")
        if self.compresses:
            scored = ", ".join(map(str, self.scored))
            lines[-1] += f"; layers {scored} of 0 to {self.layers - 1} are scored" if scored else "; no layer is scored"
            lines += [f"{operation}: {backend} ({why})" for operation, (backend, why) in self.backends.items()]
            lines.append(f"images compressed since then: {self.images}")
        if self.graphs is not None:
            lines.append(self.graphs)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as JSON takes them."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "scored": list(self.scored),
            "later": [list(stage) for stage in self.later],
            "backends": {op: {"backend": backend, "why": why} for op, (backend, why) in self.backends.items()},
        }


def status_of(base: Any) -> Status:
    """The status of the LLaVA `base`. Runs nothing."""
    way, block, tower = settings.way(base), settings.block_of(base), base.vision_tower
    found = Status(
        compresses=False,
        way=way,
        tower=tower.config.model_type,
        attention=tower.config._attn_implementation,
        layers=tower.config.num_hidden_layers,
        device=str(tower.device),
        images=block.run.images if block else settings.IMAGES.get(base, 0),
        graphs=None if (graphs := graphs_of(base)) is None else str(graphs),
    )
    try:
        current = Settings.of(base)
        found = dataclasses.replace(found, **_of_settings(current.config))
        found = dataclasses.replace(found, tower=tower_of(tower.config).name)
        if current.config.compresses:
            found = dataclasses.replace(found, compresses=way is not None, **_of_plan(current, plan_of(current)))
    except ValueError as error:
        found = dataclasses.replace(found, problem=str(error))
    return found


def _of_settings(config: VTCConfig) -> dict[str, Any]:
    """What is known of settings that are valid."""
    method = config.build_method()
    given = _given(config, method)
    found = {"method": config.name, "settings": given, "adaptive": method.adaptive, "prune_layer": config.prune_after}
    return found | {"later": (config.schedule or ())[1:]}


def _given(config: VTCConfig, method: Method) -> dict[str, Any]:
    """The settings that are not the defaults, with the options of `method`."""
    given = {name: value for name, value in config.to_dict().items() if value != _DEFAULTS.get(name, _NOTHING)}
    given |= {name: settings.plain_value(value) for name, value in method.given().items()}
    given.pop("method", None)
    return given


def _of_plan(current: Settings, plan: Plan) -> dict[str, Any]:
    """What is known of settings that fit the model."""
    device, backend = current.base.vision_tower.device, current.config.backend
    found: dict[str, Any] = {
        "settings": _given(current.config, plan.method),
        "scored": tuple(plan.scored) if plan.method.required.cls_probs else plan.received,
        "backends": {op: ops.backend_for(op, device, backend) for op in _operations(current.base, plan)},
    }
    if current.family.inputs[0].layout != TILES.layout:
        found |= {"tokens": plan.num_tokens, "kept": plan.num_outputs}
    return found


def _operations(base: Any, plan: Plan) -> list[str]:
    """The operations that an image takes without gradients."""
    config, tower = plan.config, base.vision_tower
    fuses = tower.config._attn_implementation == NAME and config.fused is not False
    if fuses and config.fused is None:
        head_dim = tower.config.hidden_size // tower.config.num_attention_heads
        fuses = ops.fused_is_faster(tower.device, tower.dtype, head_dim, config.backend)
    needs = plan.method.required
    scoring = ["cls_attention" if fuses else "cls_probs"] if needs.cls_probs else []
    return encode.operations(plan, [*scoring, *(["received"] if needs.received else [])])

"""What to keep. `VTCConfig` is the request, `kept_count` the promise: the only place where a count is rounded."""

import dataclasses
import math
from typing import Any

# The names in `vtc.methods.METHODS`; that registry needs torch, and this module does without.
METHODS = ("vtc-cls", "fastervlm", "visionzip", "prumerge", "prumerge+", "fastv", "random", "pool", "none")
LANGUAGE_METHODS = ("vtc-cls", "fastv")  # can prune inside the language model
PROMPT_METHODS = ("fastv",)  # and only there, for that is where they score
PRUNE_LAYER = 2  # of those, as in FastV's paper
KV = ("compact", "full")
POSITIONS = (None, "packed", "original")
ENSEMBLES = ("sum", "mean", "max", "min")
TILES = ("mass", "equal")
BACKENDS = ("auto", "triton", "torch")
DEFAULT_KEEP = 128


@dataclasses.dataclass(frozen=True)
class VTCConfig:
    """How many visual tokens are kept, and which scores choose them.

    Parameters
    ----------
    method : str
        A name of `METHODS`: "vtc-cls", the attention of the vision tower's [CLS] token (arXiv 2412.05819), or another
        published method, or a control: "random", "pool", "none". `vtc methods` lists them, the classes in `vtc.methods`
        are their definitions. "fastv" scores by the prompt, inside the language model (arXiv 2403.06764).
    keep : int, optional
        Visual tokens kept per image, 1 <= keep <= N. Default 128 when `ratio` is not given either. Some methods cannot
        keep exactly as many: "pool" makes a square, "prumerge+" about as many, "prumerge" and "none" go without it.
    ratio : float, optional
        Share of the visual tokens kept, 0 < ratio <= 1; see `kept_count`. Exclusive with `keep`.
    ensemble_layers : int
        Number of vision layers whose [CLS] rows are combined; they end at the feature layer.
    ensemble : str
        How the layers are combined: "sum", "mean", "max" or "min".
    start_layer : int, optional
        First scored layer, counted from 0; overrides `ensemble_layers`.
    fused : bool, optional
        Whether scored layers run `vtc.ops.cls_attention` (True) or SDPA and `vtc.ops.row_scores` (False). None: what
        `vtc.ops.fused_is_faster` says.
    tiles : str
        How an image of several tiles (LLaVA-NeXT) shares its `keep` out among them. "mass": in proportion to the sum of
        each tile's scores. "equal": as many for each.
    prune_layer : int, optional
        0: tokens are dropped before the language model. r > 0: after its r-th layer ("vtc-cls" and "fastv"). None: 2
        with "fastv", 0 otherwise.
    kv : str
        For `prune_layer` > 0, what the KV cache of the layers before it keeps: "full", everything; "compact", what was
        dropped is removed there too, so that all layers are equally short.
    positions : str, optional
        Rotary positions of the tokens that stay. "packed": contiguous, which holds before the language model.
        "original": as in the full prompt, which holds inside it. None: whichever holds.
    backend : str
        "auto", "triton" or "torch"; see `vtc.ops`.
    seed : int
        Seed of "random".
    contextual : int, optional
        How many of its `keep` tokens "visionzip" makes by merging; None: a share of 10 / 64.
    adaptive_count : bool, optional
        Whether "prumerge" and "prumerge+" count the patches they keep by the outliers among an image's scores, instead
        of by `keep`. None: "prumerge" does, "prumerge+" does not.
    neighbors : int, optional
        How many patches each one kept takes up in "prumerge" and "prumerge+"; None: 32.

    Raises
    ------
    ValueError
        If a value is of the wrong type or out of range, if both `keep` and `ratio` are given, or if `method`,
        `prune_layer` and `positions` do not go together.
    """

    method: str = "vtc-cls"
    keep: int | None = None
    ratio: float | None = None
    ensemble_layers: int = 3
    ensemble: str = "sum"
    start_layer: int | None = None
    fused: bool | None = None
    tiles: str = "mass"
    prune_layer: int | None = None
    kv: str = "compact"
    positions: str | None = None
    backend: str = "auto"
    seed: int = 0
    contextual: int | None = None
    adaptive_count: bool | None = None
    neighbors: int | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("ensemble", self.ensemble, ENSEMBLES)
        _one_of("tiles", self.tiles, TILES)
        _one_of("backend", self.backend, BACKENDS)
        _one_of("kv", self.kv, KV)
        _one_of("positions", self.positions, POSITIONS)
        if self.prune_layer is not None:
            _integer("prune_layer", self.prune_layer, 0)
        if self.prune_layer and self.method not in LANGUAGE_METHODS:
            raise ValueError(
                f"method {self.method!r} does not prune inside the language model, got prune_layer={self.prune_layer}; "
                f"use prune_layer=0, or one of {', '.join(map(repr, LANGUAGE_METHODS))}"
            )
        if self.prune_layer == 0 and self.method in PROMPT_METHODS:
            raise ValueError(
                f"method {self.method!r} scores inside the language model, got prune_layer=0; use "
                f"prune_layer={PRUNE_LAYER}, as its paper does, or another layer"
            )
        held = "original" if self.prune_after else "packed"
        if self.positions not in (None, held):
            raise ValueError(
                f"positions={self.positions!r} cannot be had with prune_layer={self.prune_after}, where they are "
                f"{held!r}; leave positions away"
            )
        if self.keep is not None and self.ratio is not None:
            raise ValueError(f"got both keep={self.keep!r} and ratio={self.ratio!r}; give one of them")
        if self.keep is None and self.ratio is None:
            object.__setattr__(self, "keep", DEFAULT_KEEP)
        if self.keep is not None:
            _integer("keep", self.keep, 1)
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise ValueError(f"ratio must be a number with 0 < ratio <= 1, got {self.ratio!r}; 0.25 keeps a quarter")
        _integer("ensemble_layers", self.ensemble_layers, 1)
        if self.start_layer is not None:
            _integer("start_layer", self.start_layer, 0)
        if self.fused is not None and not isinstance(self.fused, bool):
            raise ValueError(f"fused must be True, False or None (whatever is faster), got {self.fused!r}")
        _integer("seed", self.seed, 0)
        if self.contextual is not None:
            _integer("contextual", self.contextual, 0)
        if self.adaptive_count is not None and not isinstance(self.adaptive_count, bool):
            raise ValueError(
                f"adaptive_count must be True, False or None (the method's own), got {self.adaptive_count!r}"
            )
        if self.neighbors is not None:
            _integer("neighbors", self.neighbors, 1)

    @property
    def compresses(self) -> bool:
        """Whether anything is dropped: not with "none", which is the stock model."""
        return self.method != "none"

    @property
    def prune_after(self) -> int:
        """The language-model layer after which tokens are dropped, from 1; 0: before the first."""
        if self.prune_layer is not None:
            return self.prune_layer
        return PRUNE_LAYER if self.method in PROMPT_METHODS else 0

    def updated(self, **changes: Any) -> "VTCConfig":
        """Return a copy with `changes`; a new `keep` replaces an old `ratio` and the other way round.

        Raises
        ------
        ValueError
            If a name is not a field, or a value is not accepted.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(names)):
            raise ValueError(f"unknown option(s) {', '.join(unknown)}; VTCConfig has {', '.join(names)}")
        if "keep" in changes and changes.get("ratio") is None:
            changes["ratio"] = None
        elif "ratio" in changes and changes.get("keep") is None:
            changes["keep"] = None
        return dataclasses.replace(self, **changes)


def kept_count(config: VTCConfig, num_tokens: int) -> int:
    """Number of visual tokens kept of an image's `num_tokens`: `keep`, or ceil(ratio * num_tokens).

    Raises
    ------
    ValueError
        If `config.keep` is larger than `num_tokens`.
    """
    if config.ratio is not None:
        # Rounded first, or 0.07 * 100 = 7.000000000000001 would keep 8. Never 0, and num_tokens for ratio 1.
        return math.ceil(round(config.ratio * num_tokens, 6)) or 1
    keep = config.keep or DEFAULT_KEEP
    if keep > num_tokens:
        raise ValueError(
            f"keep={keep}, but an image of this model has only {num_tokens} visual tokens; "
            f"set keep to at most {num_tokens}, e.g. vtc.configure(model, keep={max(num_tokens // 4, 1)}), or use ratio"
        )
    return keep


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(name: str, value: object, accepted: tuple[str | None, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

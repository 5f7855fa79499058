"""The settings: `VTCConfig`, and `kept_count`, the only place where a number of kept tokens is rounded."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vtc import methods, ops
from vtc.methods import METHODS, Method, class_of
from vtc.methods.checks import check_integer, check_one_of, plain

Stages = tuple[tuple[int, int], ...]  # pairs (language-model layer, visual tokens per image from this layer on)

KV = ("compact", "full")
TILES = ("mass", "equal")
POSITIONS = ("packed", "original")
DEFAULT_KEEP = 128
DEFAULT_RATIO = 0.25  # of images with at most DEFAULT_KEEP tokens
DEFAULT_PRUNE_LAYER = 2  # of methods that prune inside the language model only, as in FastV's paper

_log = logging.getLogger("vtc")


@dataclasses.dataclass(frozen=True)
class VTCConfig:
    """How many visual tokens are kept, and which method selects them.

    The parameters below are shared by all methods. Each method has options of its own, the fields of its class in
    `vtc.methods`; `vtc methods` lists them. `of`, `updated` and `to_dict` take and give both kinds side by side::

        VTCConfig.of(method="prumerge", neighbors=16) == VTCConfig(method="prumerge", options={"neighbors": 16})

    Parameters
    ----------
    method : str or Method
        A name in `vtc.methods.METHODS`, or an object of a subclass of `vtc.methods.Method`, with its options as its
        fields. "vtc-cls" is the attention of the vision tower's [CLS] token (arXiv 2412.05819). "random", "pool" and
        "none" are controls, and the others are published methods. An object of a class in `METHODS` is stored as its
        name and options.
    keep : int, optional
        Visual tokens kept per image, 1 <= keep <= N. If neither `keep` nor `ratio` is given: 128, or a quarter of an
        image of at most 128 visual tokens. Some methods do not keep exactly `keep`: "pool" makes a square, "prumerge+"
        keeps about as many, "prumerge" and "none" ignore it.
    ratio : float, optional
        Share of the visual tokens kept, 0 < ratio <= 1; see `kept_count`. Give `keep` or `ratio`, not both.
    prune_layer : int, optional
        0: tokens are dropped before the language model. r > 0: they are dropped after its r-th layer ("vtc-cls",
        "coverage", "scope" and "fastv"). None: 2 with "fastv", 0 otherwise.
    schedule : sequence of (int, int), optional
        Tokens are dropped in stages: pairs (layer, tokens), such as [(0, 96), (16, 32)]. From each layer of the
        language model on, an image has so many visual tokens; layer 0 is before the language model. Layers ascend and
        tokens descend, both strictly. Each stage keeps those of the one before that have the largest scores, with the
        lower index where two are equal. One pair (r, K) is `keep=K, prune_layer=r`; several need a method that keeps
        the patches with the largest scores. It stands in place of `keep`, `ratio` and `prune_layer`. Stored as a tuple
        of tuples.
    kv : str, optional
        For `prune_layer` > 0, what the KV cache keeps in the layers before it. "compact": the kept tokens, so that all
        layers are equally short. "full": everything. None: "full" with "fastv", as in its paper, "compact" otherwise.
        With a `schedule`, "compact" makes all layers as short as those of its last stage.
    tiles : str
        How the tiles of an image (LLaVA-NeXT) share its `keep`. "mass": in proportion to the sum of each tile's scores.
        "equal": the same number each.
    positions : str
        The positions of tokens that are dropped before the language model. "packed": 0, 1, 2, ... of what stays, as in
        the code of all published methods for LLaVA. "original": each token that stays has the position that it had in
        the full prompt, text after an image goes on where the full prompt would, and new tokens go on after its last
        position, so that the full length counts towards the language model's positions (GAP, arXiv 2506.21873). A
        token that is no patch gets a place of its own: token i of K that of patch floor((2i + 1)·N / (2K)).
    backend : str
        "auto", "triton" or "torch"; see `vtc.ops`.
    fused : bool, optional
        How the scored layers run: `vtc.ops.cls_attention` (True), or SDPA and `vtc.ops.cls_probs` (False). None: the
        faster one on this GPU, if it has been measured; see `vtc.ops.fused_is_faster`.
    options : mapping of str
        The options of `method` that are given; the others have the defaults of its class. Kept as a dict.

    Numbers of NumPy and 0-d tensors are accepted, too, and stored as Python's.

    Raises
    ------
    ValueError
        If a value is of the wrong type or out of range, if both `keep` and `ratio` are given, or either or
        `prune_layer` with a `schedule`, if `method` does not go together with `prune_layer` or `schedule`, or if an
        option is not one of the method's.
    """

    method: str | Method = "vtc-cls"
    keep: int | None = None
    ratio: float | None = None
    prune_layer: int | None = None
    schedule: Stages | None = None
    kv: str | None = None
    tiles: str = "mass"
    positions: str = "packed"
    backend: str = "auto"
    fused: bool | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in SHARED:
            object.__setattr__(self, name, plain(getattr(self, name)))
        class_of(self.method)
        check_one_of("tiles", self.tiles, TILES)
        check_one_of("positions", self.positions, POSITIONS)
        check_one_of("backend", self.backend, ops.BACKENDS)
        if self.kv is not None:
            check_one_of("kv", self.kv, KV)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _checked_schedule(self.schedule))
            self._check_schedule_alone()
        self._check_prune_layer()
        if self.keep is not None and self.ratio is not None:
            raise ValueError(f"got both keep={self.keep!r} and ratio={self.ratio!r}; give one of them")
        if self.keep is not None:
            check_integer("keep", self.keep, 1)
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise ValueError(f"ratio must be a number with 0 < ratio <= 1, got {self.ratio!r}; 0.25 keeps a quarter")
        if self.fused is not None and not isinstance(self.fused, bool):
            raise ValueError(f"fused must be True, False or None (the faster one), got {self.fused!r}")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a mapping of the method's options, such as {{}}, got {self.options!r}")
        options = {name: plain(value) for name, value in self.options.items()}  # a copy that the caller cannot change
        object.__setattr__(self, "options", options)
        methods.check_options(self.method, self.options)
        if isinstance(self.method, Method):
            self._take_apart(self.method)
        built = self.build_method()  # checks the values
        object.__setattr__(self, "options", {name: getattr(built, name) for name in self.options})  # as it stores them
        if self.reselects and self.kv == "compact":
            raise ValueError(
                'reselect=True needs all tokens in the KV cache, got kv="compact"; use kv="full" or reselect=False'
            )

    def _take_apart(self, method: Method) -> None:
        """Give `options` to the object; store one of a registered class as its name and the options that are given."""
        if self.options:
            method = method.changed(**self.options)
        if self.backend == "auto":
            object.__setattr__(self, "backend", method.backend)
        stored: str | Method = method
        options: dict[str, Any] = {}
        if METHODS.get(method.name) is type(method):
            stored, options = method.name, method.given()
        object.__setattr__(self, "method", stored)
        object.__setattr__(self, "options", options)

    def _check_prune_layer(self) -> None:
        if self.prune_layer is not None:
            check_integer("prune_layer", self.prune_layer, 0)
        given = self.prune_layer is not None or self.schedule is not None
        got = f"prune_layer={self.prune_layer}" if self.schedule is None else f"schedule={list(self.schedule)}"
        if given and self.prune_after and "language" not in class_of(self.method).prunes:
            able = [name for name, method in METHODS.items() if "language" in method.prunes]
            raise ValueError(
                f"method {self.name!r} does not prune inside the language model, got {got}; use "
                f"{'prune_layer=0' if self.schedule is None else 'a schedule that begins at layer 0'}, or one of "
                f"{', '.join(map(repr, able))}"
            )
        if given and not self.prune_after and class_of(self.method).prunes_only_language():
            raise ValueError(
                f"method {self.name!r} scores inside the language model, got {got}; use "
                f"prune_layer={DEFAULT_PRUNE_LAYER}, as its paper does, or another layer"
            )

    def _check_schedule_alone(self) -> None:
        """Raise ValueError if `schedule` stands beside what it replaces, or the method cannot drop in stages."""
        beside = [name for name in IN_SCHEDULE if getattr(self, name) is not None]
        if beside:
            raise ValueError(
                f"got schedule={list(self.schedule or ())} and {' and '.join(beside)}, which it replaces; give either"
            )
        if len(self.schedule or ()) > 1 and not class_of(self.method).keeps_patches():
            able = [name for name, method in METHODS.items() if method.keeps_patches()]
            raise ValueError(
                f"method {self.name!r} does not keep the patches with the largest scores, so it cannot drop them in "
                f"stages, got schedule={list(self.schedule or ())}; use one pair, or one of "
                f"{', '.join(map(repr, able))}"
            )

    @classmethod
    def of(cls, /, **given: Any) -> "VTCConfig":
        """The settings with these shared fields and options of the method; the others have their defaults.

        Raises
        ------
        ValueError
            As `updated`.
        """
        return cls().updated(**given)

    @property
    def name(self) -> str:
        """The name of the method."""
        return class_of(self.method).name

    @property
    def compresses(self) -> bool:
        """Whether anything is dropped; False for "none", which is the stock model."""
        return self.name != "none"

    @property
    def prune_after(self) -> int:
        """The language-model layer after which tokens are first dropped, from 1; 0: before the first."""
        if self.schedule is not None:
            return self.schedule[0][0]
        if self.prune_layer is not None:
            return self.prune_layer
        return DEFAULT_PRUNE_LAYER if class_of(self.method).prunes_only_language() else 0

    @property
    def prunes_inside(self) -> bool:
        """Whether tokens are dropped inside the language model, at first or in a later stage."""
        return self.prune_after > 0 or len(self.schedule or ()) > 1

    def stages(self, num_tokens: int) -> Stages:
        """Pairs (layer, K): from this layer of the language model on, K visual tokens of `num_tokens` stay.

        Raises
        ------
        ValueError
            As `kept_count`.
        """
        return ((self.prune_after, kept_count(self, num_tokens)), *(self.schedule or ())[1:])

    @property
    def kept_kv(self) -> str:
        """What the KV cache keeps in the layers before those that prune, "compact" or "full"."""
        return class_of(self.method).kv if self.kv is None else self.kv

    @property
    def reselects(self) -> bool:
        """Whether every new token selects again, and dropped tokens are masked: the option `reselect` of "fastv"."""
        return bool(getattr(self.method, "reselect", self.options.get("reselect")))

    def build_method(self) -> Method:
        """The method with its options and `backend`."""
        if isinstance(self.method, Method):
            return _with_backend(self.method, self.backend)
        return methods.build(self.method, backend=self.backend, **self.options)

    def without_effect(self) -> dict[str, str]:
        """Settings and options that have no effect with the others, and why, as a clause."""
        found = self.build_method().without_effect()
        if self.prune_after:
            return {
                "positions": "tokens that are dropped inside the language model leave the others' as they are"
            } | found
        return found if self.prunes_inside else {"kv": "nothing is dropped inside the language model"} | found

    def updated(self, /, **changes: Any) -> "VTCConfig":
        """Return a copy with `changes`: shared fields, and options of the (new) method.

        A new `keep` replaces an old `ratio`, and a new `ratio` an old `keep`. A new `schedule` replaces these and an
        old `prune_layer`, and a new `keep` or `ratio` an old `schedule`; so does a `prune_layer` beside one of them. A
        `backend` counts before that of a method object, and a new object's before the old `backend`, unless it is
        "auto". Another method starts with its own defaults; the same method keeps the options that are not changed.

        Raises
        ------
        ValueError
            If a name is neither a shared field nor an option of the method, if a value is not accepted, or if
            `prune_layer` alone would replace a schedule.
        """
        shared = {name: changes.pop(name) for name in SHARED if name in changes}  # what remains are options
        method = shared.get("method", self.method)
        about = class_of(method)
        known = {option for each in (*METHODS.values(), about) for option in each.options()}
        if unknown := sorted(set(changes) - known):
            own = ", ".join(about.options()) or "no options"
            raise ValueError(
                f"unknown option(s) {', '.join(unknown)}; VTCConfig has {', '.join(SHARED)}, "
                f"and method {about.name!r} has {own}"
            )
        if "keep" in shared and shared.get("ratio") is None:
            shared["ratio"] = None
        elif "ratio" in shared and shared.get("keep") is None:
            shared["keep"] = None
        if shared.get("schedule") is not None:
            shared = dict.fromkeys(IN_SCHEDULE) | shared
        elif any(shared.get(name) is not None for name in IN_SCHEDULE):
            if self.schedule is not None and "schedule" not in shared and shared.keys().isdisjoint(("keep", "ratio")):
                raise ValueError(
                    f"prune_layer={shared['prune_layer']} would replace schedule={list(self.schedule)}, which says how "
                    "many tokens stay; give keep or ratio, too, or another schedule"
                )
            shared["schedule"] = None
        if isinstance(method, Method):
            if "backend" in shared:
                method = shared["method"] = _with_backend(method, shared["backend"])
            elif "method" in shared and method.backend != "auto":
                shared["backend"] = method.backend
        before = {name: getattr(self, name) for name in SHARED}
        options = self.options if isinstance(method, str) and method == self.method else {}
        return VTCConfig(**{**before, **shared}, options={**options, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The shared fields and the given options side by side; `VTCConfig.of(**config.to_dict()) == config`.

        A method of a class that is not in `vtc.methods.METHODS` is in it as the object. The schedule is in it as lists,
        as in JSON.
        """
        shared = {name: getattr(self, name) for name in SHARED}
        if self.schedule is not None:
            shared["schedule"] = [list(pair) for pair in self.schedule]
        return {**shared, **self.options}


IN_SCHEDULE = ("keep", "ratio", "prune_layer")  # what a schedule says in its own way
SHARED = tuple(field.name for field in dataclasses.fields(VTCConfig) if field.name != "options")


def kept_count(config: VTCConfig, num_tokens: int) -> int:
    """Number of visual tokens kept of an image's `num_tokens`: `keep`, or ceil(ratio * num_tokens), at least 1.

    Of a `schedule`, what its first stage keeps.

    "fastv" and "divprune" round as their authors do: round(ratio * num_tokens), and a half to the even number. If
    neither is given: 128, or a quarter of at most 128 tokens, which is logged once.

    Raises
    ------
    ValueError
        If `config.keep`, or what the schedule keeps at first, is larger than `num_tokens`.
    """
    keep, ratio = config.keep, config.ratio
    if config.schedule is not None:
        keep = config.schedule[0][1]
        if keep > num_tokens:
            raise ValueError(
                f"schedule={list(config.schedule)} keeps {keep} visual tokens at first, but an image of this model has "
                f"only {num_tokens}; begin with fewer"
            )
    elif keep is None and ratio is None:
        keep, ratio = (DEFAULT_KEEP, None) if num_tokens > DEFAULT_KEEP else (None, DEFAULT_RATIO)
        if ratio and config.compresses and not torch.compiler.is_compiling():
            _say_default(num_tokens)
    if keep is None:
        if not class_of(config.method).rounds_up:
            return round((ratio or 1) * num_tokens) or 1
        # Rounded first: else 0.07 * 100 = 7.000000000000001 would keep 8. Never 0, and num_tokens for ratio 1.
        return math.ceil(round((ratio or 1) * num_tokens, 6)) or 1
    if keep > num_tokens:
        raise ValueError(
            f"keep={keep}, but an image of this model has only {num_tokens} visual tokens; "
            f"set keep to at most {num_tokens}, e.g. vtc.configure(model, keep={max(num_tokens // 4, 1)}), or use ratio"
        )
    return keep


def token_layers(num_tokens: float, stages: Sequence[tuple[int, float]], num_layers: int) -> float:
    """Visual tokens of an image, averaged over the layers of the language model: what it costs there.

    FastV's 64 of 576 after layer 2 of 32 are (2 · 576 + 30 · 64) / 32 = 96.

    Parameters
    ----------
    num_tokens : float
        Visual tokens before the first stage.
    stages : sequence of (int, float)
        Pairs (layer, tokens from this layer on), in ascending order, as `VTCConfig.stages`.
    num_layers : int
        Layers of the language model.
    """
    total, tokens, start = 0.0, num_tokens, 0
    for layer, kept in (*stages, (num_layers, 0)):
        end = min(layer, num_layers)
        total += (end - start) * tokens
        tokens, start = kept, end
    return total / num_layers


def kept_per_view(config: VTCConfig, num_tokens: int, views: int, view_tokens: int) -> int:
    """Number of tokens kept of each view of an image of `num_tokens` whose views are reduced one by one.

    It is an equal share of `kept_count`, rounded down, and at most a view's `view_tokens`.

    Raises
    ------
    ValueError
        As `kept_count`.
    """
    return min(kept_count(config, num_tokens) // views, view_tokens)


@functools.cache
def _say_default(num_tokens: int) -> None:
    _log.warning(
        "neither keep nor ratio is given, and an image has only %d visual tokens: ratio=%g holds for it; choose with "
        "vtc.configure(model, keep=...)",
        num_tokens,
        DEFAULT_RATIO,
    )


def _with_backend(method: Method, backend: str) -> Method:
    check_one_of("backend", backend, ops.BACKENDS)
    return method if method.backend == backend else method.changed(backend=backend)


def _checked_schedule(given: Any) -> Stages:
    """The schedule as a tuple of tuples of Python's integers; ValueError if it is none."""
    is_list = isinstance(given, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in given)
    stages = tuple(tuple(map(plain, pair)) for pair in given) if is_list else ()
    if not stages or any(
        len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair) for pair in stages
    ):
        raise ValueError(
            f"schedule must be pairs of integers (layer, tokens), such as [(0, 96), (16, 32)], got {given!r}"
        )
    layers, counts = zip(*stages, strict=True)
    if layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise ValueError(f"the layers of a schedule must ascend from 0 or more, got {list(layers)} in {given!r}")
    if counts[-1] < 1 or list(counts) != sorted(set(counts), reverse=True):
        raise ValueError(f"the tokens of a schedule must descend to 1 or more, got {list(counts)} in {given!r}")
    return stages  # type: ignore[return-value]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

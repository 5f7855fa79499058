"""The settings of a model: those of the innermost open `vtc.compress` block, else those stored in its config.

The stored ones are a plain dict in `model.config.vtc`, so that they follow the model through deepcopy and
save_pretrained; stock transformers loads and ignores it. A method that was given as an object is an attribute of the
model: it follows the model through deepcopy and pickle, and is not saved. Blocks belong to a context (`contextvars`),
not to the model: opening or closing one changes nothing on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from vtc.config import SHARED, Stages, VTCConfig, token_layers
from vtc.hf.families import TILES, Family, family_of
from vtc.methods import METHODS, Method

NAME = "vtc"  # the value of attn_implementation
OBJECT = "_vtc_method"  # the attribute of a model that holds a method object, which its config cannot
_log = logging.getLogger("vtc")


@dataclasses.dataclass
class Run:
    """What happened inside one `vtc.compress` block. Cache bytes are those of the latest prompt, after its prefill.

    Tokens are those of one image. If images keep different numbers, they are the rounded mean over the latest call.
    `tokens_after` are those of the last stage, and `token_layers` the mean over the language model's `layers`; see
    `vtc.config.token_layers`. `replays` and `refusals` are those of the model's graphs, see `vtc.graphs`.
    """

    tokens_before: int | None = None
    tokens_after: int | None = None
    token_layers: float | None = None
    layers: int | None = None
    images: int = 0
    prompt_before: int | None = None
    prompt_after: int | None = None
    kv_bytes_before: int | None = None
    kv_bytes_after: int | None = None
    backend: dict[str, str] = dataclasses.field(default_factory=dict)
    replays: dict[str, int] = dataclasses.field(default_factory=dict)
    refusals: dict[str, int] = dataclasses.field(default_factory=dict)

    def report(self) -> str:
        """Return the counts as a few lines of text."""
        if not self.images:
            return "no image was encoded"
        lines = [f"{self.tokens_before} -> {self.tokens_after} visual tokens per image, {self.images} image(s)"]
        if self.token_layers is not None and self.token_layers != self.tokens_after:
            lines[0] += f"; {self.token_layers:.1f} on average over the {self.layers} layers of the language model"
        if self.prompt_before:
            lines.append(f"{self.prompt_before} -> {self.prompt_after} tokens in the latest prompt")
        if self.kv_bytes_before and self.kv_bytes_after:
            lines.append(f"{self.kv_bytes_before / 2**20:.2f} -> {self.kv_bytes_after / 2**20:.2f} MiB of KV cache")
        if self.backend:
            lines.append("backend: " + ", ".join(f"{op} {choice}" for op, choice in self.backend.items()))
        if self.replays:
            lines.append("replayed from graphs: " + ", ".join(f"{kind} {n}" for kind, n in self.replays.items()))
        lines += [f"not replayed: {reason} ({count})" for reason, count in self.refusals.items()]
        return "\n".join(lines)

    def count_images(self, images: int, before: int, stages: Stages, layers: int) -> None:
        """Count images of `before` tokens each, of which so many stay from each stage on; see `VTCConfig.stages`."""
        self.images += images
        self.tokens_before, self.tokens_after, self.layers = before, stages[-1][1], layers
        self.token_layers = token_layers(before, stages, layers)

    def count_prompt(self, before: int, after: int) -> None:
        """Note the length of a prompt as the caller passed it, and as the language model reads it."""
        self.prompt_before, self.prompt_after = before, after

    def count_cache(self, cache: Any, columns: Sequence[int] = ()) -> None:
        """Count the prompt's bytes from the tensors `[B, H_kv, M, D]` that the prefill left in `cache`.

        `columns` are those of the prompt that each layer holds; by default all hold the prompt as it was read.
        """
        tensors = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
        per_token = [sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in pair) for pair in tensors]
        before, after = self.prompt_before or 0, self.prompt_after or 0
        self.kv_bytes_before = sum(per_token) * before
        columns = columns or [after] * len(per_token)
        self.kv_bytes_after = sum(own * held for own, held in zip(per_token, columns, strict=False))


class Ending(NamedTuple):
    """Where a prompt that `generate()` has shortened ends, for calls inside.

    Attributes
    ----------
    column : int
        Of its last token.
    position : Tensor[B, 1], int64
        Of that token, in place of the position of the full prompt's last one, which transformers is given instead.
    """

    column: int
    position: torch.Tensor


class Opening:
    """The part of a block that all contexts share: they see at once that it is closed.

    Attributes
    ----------
    base : LlavaModel or None
        None once the block is closed, so that a context that outlives it does not hold the model.
    model : weakref.ref to LlavaModel
    """

    def __init__(self, base: Any) -> None:
        self.base, self.model = base, weakref.ref(base)


class Block(NamedTuple):
    """One block as a context sees it: its settings, and what happened in it."""

    opening: Opening
    config: VTCConfig
    run: Run
    ending: Ending | None = None


_BLOCKS: ContextVar[tuple[Block, ...]] = ContextVar("vtc_blocks")  # of this context, the innermost last


class _Context(tuple[Block, ...]):
    """`blocks` are this context's. The getter is `ContextVar.get` itself; its default, the instance, is an empty tuple.

    torch.compile cannot trace a call of it, but it reads a property with a getter in C, and guards on what it read.
    """

    blocks: Any = property(_BLOCKS.get)


CONTEXT = _Context()
_WARNED: weakref.WeakSet[Any] = weakref.WeakSet()  # models for which a call outside of an open block was logged
# Images that each model has compressed outside of blocks since it was switched on; without those in compiled graphs.
IMAGES: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
OPEN: list[Opening] = []  # in all contexts; read to warn, never to decide whether a call compresses


def way(base: Any) -> str | None:
    """How `base` compresses an image now and here, in words, or None if it does not."""
    if block_of(base) is not None:
        return "an open vtc.compress block"
    if base.vision_tower.config._attn_implementation != NAME:
        return None
    return "vtc.enable" if "_vtc_before" in base.__dict__ else f'attn_implementation="{NAME}"'


class Settings(NamedTuple):
    """The settings of one call of a model.

    Attributes
    ----------
    base : LlavaModel
        The model without a head.
    family : Family
    config : VTCConfig
    run : Run or None
        Of the open block.
    ending : Ending or None
        Of the prompt of an open `generate()`, if it has one.
    """

    base: Any
    family: Family
    config: VTCConfig
    run: Run | None = None
    ending: Ending | None = None

    @classmethod
    def of(cls, model: Any) -> Settings:
        """The settings of `model`, a LLaVA with or without a head."""
        base = model.base_model
        if block := block_of(base):
            return cls(base, family_of(base), block.config, block.run, block.ending)
        return cls(base, family_of(base), stored(base))

    @property
    def budget(self) -> str:
        """How images are compressed, as text for the note on a cache."""
        size = f"keep={self.config.keep}" if self.config.ratio is None else f"ratio={self.config.ratio}"
        if self.config.schedule is not None:
            size = f"schedule={list(self.config.schedule)}"
        return f"method={self.config.name!r}, {size}"


def block_of(base: Any) -> Block | None:
    """The innermost block of this context that is open for `base`."""
    for block in reversed(CONTEXT.blocks):
        if block.opening.base is base:
            return block
    return None


def stored(base: Any) -> VTCConfig:
    """The settings in the model's config, or the defaults; ValueError if they are not valid."""
    given, own = getattr(base.config, "vtc", None) or {}, getattr(base, OBJECT, None)
    if own is not None and given.get("method") == own.name:
        given = {name: given[name] for name in SHARED if name in given} | {"method": own}
    try:
        # A saved config holds lists where there were tuples.
        values = {name: _tuples(value) if type(value) is list else value for name, value in given.items()}
        others = [value for value in values.values() if type(value) not in _SCALARS]
        if not torch.compiler.is_compiling() and all(map(_is_key, others)):
            return _checked(METHODS.get(values.get("method", "vtc-cls")), **values)  # type: ignore[arg-type]
        return VTCConfig.of(**given)
    except ValueError as error:
        known = given.get("method", "vtc-cls") in METHODS
        lost = "" if known else ", vtc.enable takes a method object again, which is not saved with a model"
        raise ValueError(
            f"the settings in model.config.vtc are not valid: {error}; vtc.disable removes them{lost}"
        ) from error


_SCALARS = frozenset((bool, int, float, str, type(None)))


def _tuples(value: Any) -> Any:
    """`value`, with tuples in place of lists."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _is_key(value: Any) -> bool:
    """Whether a value that equals it is the same: integers in tuples. 1.0 and True equal 1, too."""
    return type(value) is tuple and all(_is_key(each) if type(each) is tuple else type(each) is int for each in value)


@functools.lru_cache(maxsize=64, typed=True)  # typed: True and 1.0 equal 1, and only 1 is a number of tokens
def _checked(method: type[Method] | None, /, **given: Any) -> VTCConfig:
    """The settings of the values `given`, all of them keys (`_is_key`): the same values are not checked again.

    `method` is the class that the name stands for, which may be registered again.
    """
    return VTCConfig.of(**given)


def configure(base: Any, config: VTCConfig) -> None:
    """Make `config` the settings: of the open block in this context until it ends, or of the model."""
    block = block_of(base)
    if block is None:
        store(base, config)
    else:
        _BLOCKS.set(tuple(each._replace(config=config) if each is block else each for each in CONTEXT.blocks))


def store(base: Any, config: VTCConfig) -> None:
    """Make `config` the settings of the model. A method object stays on the model, beside its name and its options."""
    base.config.vtc, method = config.to_dict(), config.method
    base.__dict__.pop(OBJECT, None)
    if isinstance(method, Method):
        base.__dict__[OBJECT] = method
        base.config.vtc |= {"method": method.name} | {k: plain_value(value) for k, value in method.values().items()}


def plain_value(value: Any) -> Any:
    """The value of an option as `model.config.vtc` can be saved with it."""
    return value if isinstance(value, (int, float, str, bool, list, tuple, dict, type(None))) else repr(value)


def name_without_effect(base: Any, config: VTCConfig, given: Mapping[str, Any]) -> None:
    """Log, once each, the `given` options that change nothing with the others, or with this model."""
    reasons = config.without_effect()
    family = family_of(base)
    if all(visual.layout != TILES.layout for visual in family.inputs):
        reasons["tiles"] = f"{family.name} sees an image in one piece"
    for name in given.keys() & reasons.keys():
        if given[name] is not None:
            _warn_of_option(name, given[name], config.name, reasons[name])


_NAMED: set[tuple[str, str, str]] = set()  # without the value: a server takes many


def _warn_of_option(name: str, value: Any, method: str, why: str) -> None:
    if (name, method, why) not in _NAMED:
        _NAMED.add((name, method, why))
        _log.warning("%s=%s has no effect with method %r: %s", name, value, method, why)


def is_on(model: Any) -> bool:
    """Whether `model`, one of the guarded classes, compresses: in a block, or as its vision tower's attention is "vtc".

    This is all that a stock model pays, so no other function is called for it.
    """
    base = model.base_model
    if CONTEXT.blocks and block_of(base) is not None:
        return True
    on: bool = base.vision_tower.config._attn_implementation == NAME
    return on


class Before:
    """What `switch_on` replaced. Unpickling a model that holds it imports VTC, without which it could not run."""

    def __init__(self, attention: str) -> None:
        self.attention = attention


def switch_on(base: Any) -> None:
    """Give the vision tower the attention "vtc", and remember what it had ("sdpa" if it was loaded as "vtc")."""
    tower = base.vision_tower
    if (attention := tower.config._attn_implementation) != NAME:
        tower.set_attn_implementation(NAME)
        IMAGES.pop(base, None)
        base.__dict__["_vtc_before"] = Before(attention)
    base.__dict__.setdefault("_vtc_before", Before("sdpa"))


def switch_off(base: Any) -> None:
    """Restore the attention from before `switch_on`; a model that was loaded as "vtc" gets "sdpa". Drop the settings.

    What is not "vtc" any more was changed by others, and stays.
    """
    before = base.__dict__.pop("_vtc_before", Before("sdpa"))
    if base.vision_tower.config._attn_implementation == NAME:
        base.vision_tower.set_attn_implementation(before.attention)
    configs = {"": base.config, "vision_config": base.config.vision_config, "text_config": base.language_model.config}
    now = {key: config._attn_implementation for key, config in configs.items()}
    if NAME in now.values():
        base.set_attn_implementation({key: "sdpa" if name == NAME else name for key, name in now.items()})
    base.config.__dict__.pop("vtc", None)
    base.__dict__.pop(OBJECT, None)
    IMAGES.pop(base, None)


@contextlib.contextmanager
def open_block(base: Any, config: VTCConfig) -> Iterator[Run]:
    """Compress with `config` in this context, and in those copied from it, while the block is open."""
    opening, run = Opening(base), Run()
    OPEN.append(opening)
    _BLOCKS.set((*CONTEXT.blocks, Block(opening, config, run)))
    try:
        yield run
    finally:
        opening.base = None
        OPEN.remove(opening)
        _close(opening)


@contextlib.contextmanager
def held(base: Any) -> Iterator[None]:
    """Let a call that has begun in a block go on as it began, even if the block is closed meanwhile."""
    block = block_of(base)
    if block is None:
        yield
        return
    own = block._replace(opening=Opening(base))
    _BLOCKS.set((*CONTEXT.blocks, own))
    try:
        yield
    finally:
        _close(own.opening)


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[None]:
    """Give these settings to the calls inside: a conversation goes on as it began, whatever holds now."""
    own = Block(Opening(settings.base), settings.config, settings.run or Run(), settings.ending)
    _BLOCKS.set((*CONTEXT.blocks, own))
    try:
        yield
    finally:
        _close(own.opening)


def warn_outside(base: Any, call: dict[str, Any]) -> None:
    """Log once for `base` that a block of it is open, but not for this call, whose images are not compressed.

    Raises
    ------
    ValueError
        For a replica that nn.DataParallel has made of a model, whose blocks it cannot see.
    """
    if not family_of(base).inputs_of(call):
        return
    if getattr(base, "_is_replica", False):
        raise ValueError("the replicas of nn.DataParallel see no vtc.compress block; use vtc.enable(model)")
    for opening in [*OPEN, *(block.opening for block in CONTEXT.blocks)]:
        if opening.model() is not base or base in _WARNED:
            continue
        _WARNED.add(base)
        if opening.base is None:
            _log.warning("the vtc.compress block of this call is closed, so its images are not compressed")
        else:
            _log.warning(
                "a vtc.compress block is open for this model in another thread or task, but not in this one, so these "
                "images are not compressed; to run a call of another thread in the block, use threading.Thread("
                "target=contextvars.copy_context().run, args=(model.generate,), kwargs=...) or asyncio.to_thread"
            )


def _close(opening: Opening) -> None:
    _BLOCKS.set(tuple(each for each in CONTEXT.blocks if each.opening is not opening and each.opening.base is not None))

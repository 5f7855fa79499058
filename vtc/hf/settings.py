"""The settings of a model: those of the innermost open `vtc.compress` block, else those stored in its config.

The stored ones are a plain dict in `model.config.vtc`, so that they follow the model through deepcopy and
save_pretrained; stock transformers loads and ignores it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from vtc.config import VTCConfig
from vtc.hf.families import Family, family_of

NAME = "vtc"  # the value of attn_implementation
CONFIGS = ("", "vision_config", "text_config")  # the keys of transformers' attn_implementation dict; "" is the model
_LOCK = threading.Lock()  # two threads may open or close blocks of one model


@dataclasses.dataclass
class Run:
    """What happened inside one `vtc.compress` block. Cache bytes are those of the latest prompt, after its prefill.

    Tokens are those of one image. If images keep different numbers, they are the rounded mean over the latest call.
    """

    tokens_before: int | None = None
    tokens_after: int | None = None
    images: int = 0
    prompt_before: int | None = None
    prompt_after: int | None = None
    kv_bytes_before: int | None = None
    kv_bytes_after: int | None = None
    backend: dict[str, str] = dataclasses.field(default_factory=dict)

    def report(self) -> str:
        """Return the counts as a few lines of text."""
        if not self.images:
            return "no image was encoded"
        lines = [f"{self.tokens_before} -> {self.tokens_after} visual tokens per image, {self.images} image(s)"]
        if self.prompt_before:
            lines.append(f"{self.prompt_before} -> {self.prompt_after} tokens in the latest prompt")
        if self.kv_bytes_before and self.kv_bytes_after:
            lines.append(f"{self.kv_bytes_before / 2**20:.2f} -> {self.kv_bytes_after / 2**20:.2f} MiB of KV cache")
        if self.backend:
            lines.append("backend: " + ", ".join(f"{op} {choice}" for op, choice in self.backend.items()))
        return "\n".join(lines)

    def count_prompt(self, before: int, after: int) -> None:
        """Note the length of a prompt as the caller passed it, and as the language model reads it."""
        self.prompt_before, self.prompt_after = before, after

    def count_cache(self, cache: Any, full: int = 0) -> None:
        """Count the prompt's bytes from the tensors `[B, H_kv, M, D]` that the prefill left in `cache`.

        The first `full` layers hold the prompt at its full length.
        """
        tensors = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
        per_token = [sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in pair) for pair in tensors]
        before, after = self.prompt_before or 0, self.prompt_after or 0
        self.kv_bytes_before = sum(per_token) * before
        self.kv_bytes_after = sum(per_token[:full]) * before + sum(per_token[full:]) * after


@dataclasses.dataclass
class Block:
    """One open block: its settings, what happened in it, the tower's outputs if they are known, and its thread."""

    config: VTCConfig
    run: Run
    vision: Any = None
    thread: int = dataclasses.field(default_factory=threading.get_ident)


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
    vision : tuple or None
        What `vtc.hf.encode.run_tower` returns, if the block was opened with it.
    """

    base: Any
    family: Family
    config: VTCConfig
    run: Run | None = None
    vision: Any = None

    @classmethod
    def of(cls, model: Any) -> Settings:
        """The settings of `model`, a LLaVA with or without a head."""
        base = model.base_model
        if block := block_of(base):
            return cls(base, family_of(base), block.config, block.run, block.vision)
        return cls(base, family_of(base), stored(base))

    @property
    def budget(self) -> str:
        """How images are compressed, as text for the note on a cache."""
        size = f"keep={self.config.keep}" if self.config.ratio is None else f"ratio={self.config.ratio}"
        return f"method={self.config.method!r}, {size}"


def block_of(base: Any) -> Block | None:
    """The innermost open block of this thread; a thread that opened none is in the one opened last."""
    blocks: tuple[Block, ...] = base.__dict__.get("_vtc_blocks", ())
    if len(blocks) < 2:
        return blocks[0] if blocks else None
    thread = threading.get_ident()
    return next((block for block in reversed(blocks) if block.thread == thread), blocks[-1])


def stored(base: Any) -> VTCConfig:
    """The settings in the model's config, or the defaults; ValueError if they are not valid."""
    try:
        return VTCConfig.of(**(getattr(base.config, "vtc", None) or {}))
    except ValueError as error:
        raise ValueError(
            f"the settings in model.config.vtc are not valid: {error}; vtc.disable removes them"
        ) from error


def configure(base: Any, config: VTCConfig) -> None:
    """Make `config` the settings: of the open block until it ends, or of the model."""
    if block := block_of(base):
        block.config = config
    else:
        base.config.vtc = config.to_dict()


def is_on(model: Any) -> bool:
    """Whether `model`, one of the guarded classes, compresses: whether its vision tower's attention is "vtc"."""
    on: bool = model.base_model.vision_tower.config._attn_implementation == NAME
    return on


def switch_on(base: Any) -> None:
    """Give the vision tower the attention "vtc", and remember what the model had."""
    if not is_on(base):
        base.__dict__["_vtc_before"] = _implementations(base)
        base.set_attn_implementation({"vision_config": NAME})


def switch_off(base: Any) -> None:
    """Restore the attention from before `switch_on` ("sdpa" if the model was loaded as "vtc"); remove the settings."""
    before = base.__dict__.pop("_vtc_before", {})
    now = _implementations(base)
    base.set_attn_implementation({key: before.get(key, "sdpa") if name == NAME else name for key, name in now.items()})
    base.config.__dict__.pop("vtc", None)


@contextlib.contextmanager
def open_block(base: Any, config: VTCConfig, vision: Any = None) -> Iterator[Run]:
    """Compress with `config` while the block is open; when the last one closes, the model is what it was before.

    `vision` is what `vtc.hf.encode.run_tower` returned for the images of every call in the block. With it, the tower
    runs only once for several settings that differ in `keep`.
    """
    own = base.__dict__  # plain attributes: modules and parameters are elsewhere
    opened = Block(config, Run(), vision)
    with _LOCK:
        if not own.get("_vtc_blocks"):
            own["_vtc_outside"] = {
                "implementations": _implementations(base),
                "config": getattr(base.config, "vtc", None),
                "before": own.get("_vtc_before"),
            }
        own["_vtc_blocks"] = (*own.get("_vtc_blocks", ()), opened)
        if not is_on(base):
            base.set_attn_implementation({"vision_config": NAME})
        inside = _implementations(base)
    try:
        yield opened.run
    finally:
        with _LOCK:
            own["_vtc_blocks"] = tuple(each for each in own["_vtc_blocks"] if each is not opened)
            if not own["_vtc_blocks"]:
                outside = own.pop("_vtc_outside")
                _restore(own, {"_vtc_blocks": None, "_vtc_before": outside["before"]})
                _restore(base.config.__dict__, {"vtc": outside["config"]})
                base.set_attn_implementation(outside["implementations"])
            elif _implementations(base) != inside:
                base.set_attn_implementation(inside)  # a block is open around this one, or in another thread


def _implementations(base: Any) -> dict[str, str]:
    configs = (base.config, base.vision_tower.config, base.language_model.config)
    return {key: config._attn_implementation for key, config in zip(CONFIGS, configs, strict=True)}


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        attributes.pop(name, None)
        if value is not None:
            attributes[name] = value

"""Switching compression on and off, settings, and what a scoped run did: the public functions for one model."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch

from vtc.config import VTCConfig
from vtc.hf.attention import NAME
from vtc.hf.patch import Plan, Scope, Selection, check, encode, find_llava, is_on, scope_of, settings
from vtc.methods import METHODS

_LOCK = threading.Lock()  # two threads may open or close scopes of one model
CONFIGS = ("", "vision_config", "text_config")  # the keys of transformers' attn_implementation dict; "" is the model


@dataclasses.dataclass
class Run:
    """What happened inside one `vtc.compress` block. Cache bytes are those of the latest prompt, after its prefill.

    Tokens are those of one image; where images keep different numbers, their rounded mean over the latest call.
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

    def saw_cache(self, cache: Any, full: int = 0) -> None:
        """Count the prompt's bytes from the tensors `[B, H_kv, M, D]` that the prefill left in `cache`.

        The first `full` layers hold the prompt as it was before.
        """
        tensors = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
        per_token = [sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in pair) for pair in tensors]
        before, after = self.prompt_before or 0, self.prompt_after or 0
        self.kv_bytes_before = sum(per_token) * before
        self.kv_bytes_after = sum(per_token[:full]) * before + sum(per_token[full:]) * after


def configure(model: torch.nn.Module, **options: Any) -> VTCConfig:
    """Change the model's settings (fields of `VTCConfig`); does not switch it on. Returns the new settings.

    Inside a `compress` block they end with the block.

    Raises
    ------
    ValueError
        If `model` holds no supported LLaVA, or an option is not accepted or does not fit the model.
    """
    base = find_llava(model)
    config = settings(base).updated(**options)
    check(base, config)  # an impossible request fails here rather than at the first image
    if scope := scope_of(base):
        scope.config = config
    else:
        base.config.vtc = config.to_dict()
    return config


def enable(model: torch.nn.Module, **options: Any) -> VTCConfig:
    """Compress from now on; idempotent. Only the vision tower's attention changes, not the language model's.

    Raises
    ------
    ValueError
        As `configure`.
    """
    base = find_llava(model)
    config = configure(model, **options)
    if not is_on(base):
        base.__dict__["_vtc_before"] = _implementations(base)
        base.set_attn_implementation({"vision_config": NAME})
    return config


def disable(model: torch.nn.Module) -> None:
    """Be the stock model again: the attention from before `enable` ("sdpa" if it was loaded as "vtc"), no settings."""
    base = find_llava(model)
    before = base.__dict__.pop("_vtc_before", {})
    now = _implementations(base)
    base.set_attn_implementation({key: before.get(key, "sdpa") if name == NAME else name for key, name in now.items()})
    base.config.__dict__.pop("vtc", None)


@contextlib.contextmanager
def compress(model: torch.nn.Module, **options: Any) -> Iterator[Run]:
    """Compress inside a `with` block; afterwards the model is what it was before, whatever happened inside.

    Blocks may be nested, and several threads may have blocks of their own open on one model: each thread sees its own
    innermost one. A thread that opened none (a streaming `generate()`, say) sees the one opened last.

    Yields
    ------
    Run
        Filled while the block runs.
    """
    base = find_llava(model)
    own = base.__dict__  # plain attributes: modules and parameters are elsewhere
    config = settings(base).updated(**options)
    check(base, config)
    scope = Scope(config, Run())
    with _LOCK:
        if not own.get("_vtc_scopes"):
            own["_vtc_outside"] = {
                "implementations": _implementations(base),
                "config": getattr(base.config, "vtc", None),
                "before": own.get("_vtc_before"),
            }
        own["_vtc_scopes"] = (*own.get("_vtc_scopes", ()), scope)
        if not is_on(base):
            base.set_attn_implementation({"vision_config": NAME})
        inside = _implementations(base)
    try:
        yield scope.run
    finally:
        with _LOCK:
            own["_vtc_scopes"] = tuple(each for each in own["_vtc_scopes"] if each is not scope)
            if not own["_vtc_scopes"]:
                outside = own.pop("_vtc_outside")
                _restore(own, {"_vtc_scopes": None, "_vtc_before": outside["before"]})
                _restore(base.config.__dict__, {"vtc": outside["config"]})
                base.set_attn_implementation(outside["implementations"])
            elif _implementations(base) != inside:
                base.set_attn_implementation(inside)  # a block is open around this one, or in another thread


@torch.no_grad()
def select(model: torch.nn.Module, pixel_values: torch.Tensor, **options: Any) -> Selection:
    """Return which patches of each image would be kept, without running the language model.

    Parameters
    ----------
    pixel_values : Tensor [B, 3, height, width]
        Each picture is taken for itself, tiles and frames too: `keep` counts the tokens of one.
    options
        Fields of `VTCConfig`; they hold for this call only.

    Raises
    ------
    ValueError
        As `configure`, and for a method that chooses no patches: "pool" averages them, "none" keeps all.
    """
    with compress(model, **options):
        base = find_llava(model)
        must_choose(settings(base).method)
        plan = Plan.of(base, pixel_values, layout="whole")
        selection = encode(base, pixel_values, plan)[1]
    if selection is None:
        raise ValueError(f"{type(plan.method).__name__} has selects = True, but gave no indices or no scores")
    return selection


def must_choose(method: str) -> None:
    """Raise ValueError if `method` does not choose patches, so that there is nothing to select or to draw."""
    if not METHODS[method].selects:
        why = "inside the language model, by the prompt" if "language" in METHODS[method].prunes else "no patches"
        choosing = [name for name in METHODS if METHODS[name].selects]
        raise ValueError(
            f"method {method!r} chooses {why}, so no kept patches can be shown ({METHODS[method].scores}); methods "
            f"that choose patches by the image: {', '.join(map(repr, choosing))}"
        )


def _implementations(base: Any) -> dict[str, str]:
    configs = (base.config, base.vision_tower.config, base.language_model.config)
    return {key: config._attn_implementation for key, config in zip(CONFIGS, configs, strict=True)}


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        attributes.pop(name, None)
        if value is not None:
            attributes[name] = value

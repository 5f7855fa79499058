"""The public functions for one model: switch compression on and off, change its settings, see what it keeps."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from vtc.config import VTCConfig
from vtc.hf import encode, names, patch, prune, settings
from vtc.hf.encode import Selection
from vtc.hf.families import family_of, find_llava
from vtc.hf.graphs import warm_up as sizes
from vtc.hf.graphs.model import Graphs, switch_on
from vtc.hf.graphs.model import of as graphs_of
from vtc.hf.settings import Run, Settings
from vtc.hf.status import Status, status_of
from vtc.hf.views import asked, plan_of, require, require_pixels
from vtc.methods import METHODS, Method, class_of

_log = logging.getLogger("vtc")


def configure(model: torch.nn.Module, **options: Any) -> VTCConfig:
    """Change the model's settings; does not switch it on. Returns the new settings.

    For a model that does not compress, they are stored, and a warning says so. Inside a `compress` block they end with
    the block. Another method starts with its own default options.

    Parameters
    ----------
    options
        Fields of `VTCConfig`, and the options of its method (`vtc methods NAME` lists them).

    Raises
    ------
    ValueError
        If `model` holds no supported LLaVA, or an option is not accepted or does not fit the model, or transformers is
        too old.
    """
    base, config = _checked(model, options)
    settings.configure(base, config)
    if not settings.is_on(base):
        _log.warning("the settings are stored, but this model does not compress; vtc.enable(model) switches it on")
    return config


def enable(model: torch.nn.Module, **options: Any) -> VTCConfig:
    """Compress from now on; idempotent. Only the vision tower's attention changes, not the language model's.

    It acts on the model: an open `compress` block keeps its settings, and its end changes nothing. Returns the new
    settings.

    Raises
    ------
    ValueError
        As `configure`.
    """
    base = _llava(model)
    config = _before(base, options, settings.stored).updated(**options)
    require(base, config)
    settings.switch_on(base)
    if not settings.is_on(base):
        raise ValueError(
            f"the attention of the vision tower, a {type(base.vision_tower).__name__}, could not be changed; use "
            "vtc.compress, which does not need it"
        )
    settings.store(base, config)
    settings.name_without_effect(base, config, options)
    return config


def disable(model: torch.nn.Module) -> None:
    """Restore the stock model: the attention from before `enable` ("sdpa" if it was loaded as "vtc"), no settings.

    Graphs are closed, too.

    It acts on the model: in an open `compress` block it goes on compressing until the block ends.
    """
    base = find_llava(model)
    if (graphs := graphs_of(base)) is not None:
        graphs.close()
    settings.switch_off(base)


def graphs(
    model: torch.nn.Module, *, warm_up: Sequence[Sequence[int]] = (), limit: int = 32, compile: bool = False
) -> Graphs:
    """Replay parts of `generate()` as CUDA graphs, so that Python no longer decides when the first token comes.

    Replayed are the vision tower with the selection and the projector, the language model's pass over the prompt, and
    that over each new token. Each is recorded when first needed, for a batch size and a length rounded up, or ahead by
    `warm_up`. What cannot be replayed runs as before, and the log names the reason once: gradients, hooks, other
    devices, `output_attentions` and others. A model that has changed is recorded again: weights that moved, another
    dtype, LoRA that was merged, other settings. `vtc.disable(model)` or `close()` of the result ends it.

    Parameters
    ----------
    warm_up : sequence of (int, int) or (int, int, int)
        Rows of a batch, tokens of each prompt as the processor makes it, and tokens of the longest answer, by default
        256. Needs a model that generates and sees an image in one piece.
    limit : int
        How many graphs are kept. The one that was not used for the longest time leaves.
    compile : bool
        Whether torch.compile makes the code of the graphs, for each shape anew.

    Returns
    -------
    Graphs
        What was recorded and replayed; `print` shows it.

    Raises
    ------
    ValueError
        If `model` holds no supported LLaVA, for other sizes or a model that does not compress with `warm_up`, and if
        accelerate moves the model's weights.
    """
    base = _llava(model)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"limit must be a number of graphs of at least 1, got {limit!r}")
    made = Graphs(base, limit, compile)
    calls = []
    if warm_up:
        if not hasattr(model, "generate"):
            raise ValueError(f"warm_up needs a model that generates, got a {type(model).__name__}; pass it whole")
        if settings.way(base) is None:
            raise ValueError(
                "warm_up needs a model that compresses, and this one does not; call vtc.enable(model) first"
            )
        calls = sizes.calls(base, plan_of(Settings.of(base)).num_tokens, warm_up)
    switch_on(base, made)
    if settings.way(base) is None:
        _log.warning("graphs act on models that compress, and this one does not; vtc.enable(model) switches it on")
    if not made.is_useful():
        return made
    for call, new_tokens in calls:
        stop = sizes.has_two_tokens(call["input_ids"].shape[1])
        least = min(2, new_tokens)  # one step, also if the first token ends the answer
        how: Any = {"max_new_tokens": new_tokens, "min_new_tokens": least, "do_sample": False}
        model.generate(**call, **how, stopping_criteria=[stop])  # type: ignore[operator]
    return made


def is_enabled(model: torch.nn.Module) -> bool:
    """Whether the model compresses an image now and here: in a `compress` block, or as `enable` switched it on.

    Raises
    ------
    ValueError
        If `model` holds no supported LLaVA.
    """
    return settings.is_on(find_llava(model))


def status(model: torch.nn.Module) -> Status:
    """Whether the model compresses an image now and here, how, with which settings, and how many it has compressed.

    `print(vtc.status(model))` shows it. Nothing runs, and settings that do not fit the model are named, not raised.

    Raises
    ------
    ValueError
        If `model` holds no supported LLaVA, or transformers is too old.
    """
    return status_of(_llava(model))


@contextlib.contextmanager
def compress(model: torch.nn.Module, **options: Any) -> Iterator[Run]:
    """Compress inside a `with` block. Nothing on the model changes.

    A block belongs to the thread or asyncio task that opens it, and to what runs in a copy of its context, as
    `asyncio.to_thread` does. Blocks may be nested: the innermost one counts. Other threads and tasks see their own
    blocks, or the model as it is without one.

    Yields
    ------
    Run
        Filled while the block runs.

    Raises
    ------
    ValueError
        As `configure`.
    """
    base, config = _checked(model, options)
    with settings.open_block(base, config) as run:
        yield run


@torch.no_grad()
def select(model: torch.nn.Module, inputs: Mapping[str, Any] | torch.Tensor, **options: Any) -> Selection:
    """Return which patches of each image `generate()` would keep, and their scores.

    Most methods need the images only. One that selects by the question needs all inputs. If it does so inside the
    language model, the prompts are read up to the layer that selects, and not answered.

    Parameters
    ----------
    inputs : mapping of str to Tensor, or Tensor[B, 3, height, width]
        What the processor returned, or its pixel_values alone. Each view counts as an image, tiles and frames too:
        `keep` counts the tokens of one.
    options
        As of `configure`; they hold for this call only.

    Returns
    -------
    Selection
        One row for each image, in the order of the prompts.

    Raises
    ------
    ValueError
        As `configure`, for inputs that are not accepted, and for a method that selects no patches: "pool" averages
        them, "none" keeps all.
    """
    with compress(model, **options):
        current = Settings.of(find_llava(model))
        name = current.family.inputs[0].pixels
        require_selection(current.config.method)
        if isinstance(inputs, Mapping) and name not in inputs:
            raise ValueError(f"the inputs have no {name}, only {', '.join(inputs) or 'nothing'}; pass an image, too")
        pixels: Any = inputs[name] if isinstance(inputs, Mapping) else inputs
        method, question = class_of(current.config.method), None
        if method.needs_prompt():
            if not isinstance(inputs, Mapping) or inputs.get("input_ids") is None:
                raise ValueError(
                    f"method {current.config.name!r} selects patches by the question; pass all of the processor's "
                    "inputs, input_ids among them: vtc.select(model, inputs)"
                )
            if not method.prunes_only_language():
                pixels, question = asked(current, dict(inputs))
        _require_pixels(current, pixels)
        if method.prunes_only_language():
            return prune.select(model, current, dict(inputs))
        selection = encode.select(current, pixels, plan_of(current, "whole", pixels), question)
    if selection is None:
        raise ValueError(f"method {current.config.name!r} selects patches, but gave no indices or no scores")
    _require_scores(selection)
    return selection


def _require_pixels(current: Settings, given: Any) -> None:
    """Raise ValueError if `given` are no pixels of images, with a way to get there from what people have at hand."""
    if isinstance(given, torch.Tensor) and given.ndim == 5:
        raise ValueError(
            f"pixel_values must be [images, 3, height, width], got shape {tuple(given.shape)}; every tile and frame "
            "counts as an image: pass pixel_values.flatten(0, 1)"
        )
    require_pixels(current, given)
    if not given.isfinite().all():
        raise ValueError("pixel_values are NaN or infinite in places; pass the pixels as the processor makes them")


def _require_scores(selection: Selection) -> None:
    """Raise ValueError if an image has no score but NaN: `generate()`, which does not wait for scores, takes the first.

    Some NaN among scores count as the lowest.
    """
    if selection.scores.isnan().all(-1).any():
        raise ValueError(
            "the scores of an image are all NaN; the model's weights are damaged, or too large for its dtype"
        )


def require_selection(method: str | Method) -> None:
    """Raise ValueError if `method` selects no patches, so that there is nothing to show."""
    about = class_of(method)
    if not selects(about):
        selecting = [name for name, each in METHODS.items() if selects(each)]
        raise ValueError(
            f"method {about.name!r} selects no patches, so no kept patches can be shown ({about.scores}); "
            f"methods that select patches: {', '.join(map(repr, selecting))}"
        )


def selects(method: type[Method]) -> bool:
    """Whether a method selects patches, by the image or inside the language model."""
    return method.selects or method.prunes_only_language()


def _checked(model: torch.nn.Module, options: dict[str, Any]) -> tuple[Any, VTCConfig]:
    """The LLaVA in `model`, and its settings with `options`. Unsupported settings fail here, not at the first image."""
    base = _llava(model)
    config = _before(base, options, lambda base: Settings.of(base).config).updated(**options)
    require(base, config)
    settings.name_without_effect(base, config, options)
    return base, config


def _before(base: Any, options: dict[str, Any], read: Callable[[Any], VTCConfig]) -> VTCConfig:
    """The settings that `options` change. Stored ones that are not valid do not hinder a new method.

    They are those of a model that was saved with a method object, for instance.
    """
    try:
        return read(base)
    except ValueError:
        if "method" not in options:
            raise
        return VTCConfig()


def _llava(model: torch.nn.Module) -> Any:
    """The LLaVA in `model`; its classes are guarded."""
    names.require_supported()
    base = find_llava(model)
    if module := sys.modules.get(family_of(base).module):
        patch.install(module)  # again, if it was reloaded
    return base

"""Pixels to visual tokens: run the vision tower, score its layers, and reduce its features."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtc import ops
from vtc.hf import names
from vtc.hf.graphs.model import replayed
from vtc.hf.settings import IMAGES, NAME, Settings
from vtc.hf.towers import tower_of
from vtc.methods import Method, Question, Tokens, VisionOutputs
from vtc.plan import Plan, patch_size
from vtc.scores import ClsScores

_NOTHING: Mapping[str, Any] = {}
# The scores of the pass that runs in this context; hooks of a pass in another thread leave them alone.
_PASS: ContextVar[ClsScores | None] = ContextVar("vtc_pass", default=None)


class Selection(NamedTuple):
    """The patches kept of B images.

    Attributes
    ----------
    indices : Tensor[B, K], int64, ascending
        A tower's register tokens come before the patches and count: patch p is token N - rows * columns + p.
    scores : Tensor[B, N], float32
    grid : tuple of int
        Rows and columns of patches.
    counts : Tensor[B], int64, or None
        Where images keep different numbers of patches, how many; the rest of an image's indices is -1. Merged tokens
        are not patches and are not counted.
    """

    indices: Tensor
    scores: Tensor
    grid: tuple[int, int]
    counts: Tensor | None = None


def run_tower(
    settings: Settings,
    views: Tensor,
    plan: Plan,
    tower_arguments: Mapping[str, Any] = _NOTHING,
    question: Question | None = None,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> tuple[VisionOutputs, list[str]]:
    """Run the vision tower on views `[T, 3, height, width]`, with more arguments of its `forward`.

    Returns the outputs that the method needs, and the operations that computed the scores. `question` is that of each
    view, if the method needs it. `over_ranks` is for a tower whose heads are split; see `vtc.scores.ClsScores`.

    Raises
    ------
    ValueError
        If the method needs the question and there is none, or the tower does not do what the method needs.
    """
    needs = plan.method.required
    if needs.question and question is None:
        raise ValueError(
            f"method {plan.method.name!r} selects patches by the question, and pixels alone have none; pass all of the "
            "processor's inputs to generate(), forward() or vtc.select(model, inputs)"
        )
    vision, used = recorded(
        settings,
        "tower",
        plan,
        tower_arguments,
        lambda views: _run_tower(settings, views, plan, tower_arguments, over_ranks),
        views,
    )
    if question is not None and needs.question:  # the language model may be on another device
        features = vision.hidden
        ids, is_text = question.ids.to(features.device), question.is_text.to(features.device)
        vision = vision._replace(question=Question(question.embeddings.to(features), ids, is_text))
    return vision, used


def _run_tower(
    settings: Settings,
    views: Tensor,
    plan: Plan,
    tower_arguments: Mapping[str, Any],
    over_ranks: Callable[[Tensor], Tensor] | None,
) -> tuple[VisionOutputs, list[str]]:
    """As `run_tower`, without the question."""
    base, tower, needs = settings.base, settings.base.vision_tower, plan.method.required
    spec = tower_of(tower.config)
    scores = _scores(spec.attentions_of(tower), plan, spec.cls, over_ranks)
    grid = plan.method.view_grid(plan.grid, plan.num_kept)
    if grid != plan.grid:
        views, tower_arguments = _resized(settings, views, plan, grid, tower_arguments)
    states = _hidden_states(tower, views, plan, scores, tower_arguments)
    features = states[0] if len(states) == 1 else torch.cat(states, -1)
    has_cls = spec.cls
    if plan.pool > 1:
        features, has_cls = features[:, int(has_cls) :], False
        scores.pool(math.isqrt(features.shape[1]), plan.pool)
        features = base.vision_resampler(features)  # expects square frames, too
    query = scores.query if needs.query else None
    pixels = views if needs.pixels else None
    vision = VisionOutputs(
        features, grid, scores.cls_probs, scores.keys, query, pixels, has_cls, received=scores.received
    )
    if needs.projected:  # to choose by; the features are those of the kept tokens, which are projected again
        with torch.no_grad():
            vision = vision._replace(projected=base.multi_modal_projector(vision.patches))
    return vision, scores.ops


def recorded(
    settings: Settings,
    name: str,
    plan: Plan,
    tower_arguments: Mapping[str, Any],
    function: Callable[[Tensor], Any],
    views: Tensor,
) -> Any:
    """`function(views)`, which is replayed if the model has graphs.

    `function` depends on the settings, the plan, the arguments and, of the modules, on the tower and the projector.
    `name` tells it from other functions of these.
    """
    if any(isinstance(value, Tensor) for value in tower_arguments.values()):
        return function(views)

    def key() -> tuple[str, type[Method], str]:
        given = (plan.config.to_dict(), plan.method.values(), plan[2:], dict(tower_arguments))
        return name, type(plan.method), repr(given)

    return replayed(settings.base, key, function, views)


def _resized(
    settings: Settings, views: Tensor, plan: Plan, grid: tuple[int, int], tower_arguments: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Any]]:
    """Views that have `grid` tokens, and the arguments with which the tower takes views of that size."""
    config = settings.base.vision_tower.config
    size = [tokens * plan.pool * patch for tokens, patch in zip(grid, patch_size(config), strict=True)]
    # Contiguous: else PyTorch's memory format, and with it the order of the sums, would depend on the batch.
    small = torch.nn.functional.interpolate(views.float().contiguous(), size=size, mode="bicubic", antialias=True)
    option = tower_of(config).interpolation
    return small.to(views.dtype), {**tower_arguments, option: True} if option else tower_arguments


def _scores(attentions: list[Any], plan: Plan, cls: bool, over_ranks: Callable[[Tensor], Tensor] | None) -> ClsScores:
    """What the method needs of the tower's attention modules."""
    scored, needs = [attentions[number] for number in plan.scored], plan.method.required
    compared = {"last": attentions[-1], "feature": scored[-1] if scored else None, None: None}[needs.keys]
    receiving = [attentions[number] for number in plan.received]
    return ClsScores(plan.config, scored if needs.cls_probs else [], compared, receiving, cls, over_ranks)


def _hidden_states(
    tower: Any, views: Tensor, plan: Plan, scores: ClsScores, tower_arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Call the tower, which fills `scores`: the outputs of the feature layers, each [T, 1 + N, D]."""
    if not torch.compiler.is_compiling():
        names.let_record(tower)
    wanted = list(plan.feature_layers) if names.SELECTS_STATES else True
    arguments = {**tower_arguments, "output_hidden_states": wanted, "return_dict": True}
    enabled = tower.config._attn_implementation == NAME
    if plan.config.fused and not enabled:
        raise ValueError(
            "fused=True needs a vision tower with the attention 'vtc', and this one has "
            f"{tower.config._attn_implementation!r}; use vtc.enable(model), or leave fused out"
        )
    if not scores.modules:
        outputs = tower(views, **arguments)
    elif enabled and tower_of(tower.config).passes_on:
        outputs = tower(views, vtc_scores=scores, **arguments)
    else:
        outputs = _with_hooks(tower, views, scores, arguments)
    states = getattr(outputs, "hidden_states", None) or ()
    found = [states[number] for number in plan.feature_layers if number < len(states) and states[number] is not None]
    if len(found) < len(plan.feature_layers):
        raise ValueError(
            f"the vision tower, a {type(tower).__name__}, did not return hidden_states[{max(plan.feature_layers)}] for "
            "output_hidden_states; use a tower of transformers that does, or vtc.disable(model)"
        )
    if not scores.is_complete:
        raise ValueError(
            f"the vision tower, a {type(tower).__name__}, did not run the attention of its own layers, which VTC "
            "scores; use a tower of transformers, or vtc.disable(model)"
        )
    return found


@functools.partial(torch.compiler.disable, reason='hooks; use vtc.enable(model), or attn_implementation="vtc"')
def _with_hooks(tower: Any, views: Tensor, scores: ClsScores, arguments: dict[str, Any]) -> Any:
    """Call a tower with any attention implementation; hooks read the queries and keys. They act on this call only."""
    if any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in tower.modules()):
        raise ValueError(
            f"the vision tower is compiled, so VTC cannot put hooks on it; use {_without_hooks(tower)}, which needs "
            "none, or a tower that is not compiled"
        )
    heads = tower.config.num_attention_heads
    seen: dict[Any, dict[str, Tensor]] = {}

    def hook(attention: Any, name: str, _module: Any, _args: Any, output: Tensor) -> None:
        if _PASS.get() is not scores:
            return
        own = seen.setdefault(attention, {})
        own[name] = output.unflatten(-1, (heads, -1)).transpose(1, 2)
        if len(own) == 2:
            del seen[attention]
            scores.read(attention, own["query"], own["key"])
            if scores.is_scored(attention):
                scores.note(own["query"], own["key"])

    modules: list[Any] = scores.modules
    with contextlib.ExitStack() as stack:
        for attention in modules:
            for projection, name in ((attention.q_proj, "query"), (attention.k_proj, "key")):
                stack.callback(projection.register_forward_hook(functools.partial(hook, attention, name)).remove)
        stack.callback(_PASS.reset, _PASS.set(scores))
        return tower(views, **arguments)


def _without_hooks(tower: Any) -> str:
    spec = tower_of(tower.config)
    return "vtc.enable(model)" if spec.passes_on else f"method 'coverage' with {spec.name}"


class Reduced(NamedTuple):
    """The views `[T, 3, height, width]`, reduced.

    Attributes
    ----------
    tokens : Tokens
        Before the projector.
    counts : list of int
        How many each view has.
    projected : Tensor[T, largest count, D] or None
        Their features after the projector, if there was one.
    """

    tokens: Tokens
    counts: list[int]
    projected: Tensor | None


def reduce(
    settings: Settings,
    views: Tensor,
    plan: Plan,
    tower_arguments: Mapping[str, Any] = _NOTHING,
    question: Question | None = None,
    projector: Callable[[Tensor], Tensor] | None = None,
) -> Reduced:
    """Encode views `[T, 3, height, width]`: reduce them to tokens, and apply the model's `projector`, if given.

    An adaptive method synchronises with the device once here, to read the counts: the host needs them to shorten the
    prompt.
    """
    method = plan.method

    def run(views: Tensor) -> tuple[Tokens, list[str], Tensor | None]:
        vision, used = run_tower(settings, views, plan, tower_arguments, question)
        tokens = method.reduce(vision, plan.num_kept)
        if tokens.features.shape[:2] != (len(views), plan.num_outputs):
            raise ValueError(
                f"reduce of method {method.name!r} must return features [{len(views)}, {plan.num_outputs}, D], as its "
                f"num_outputs says, got {list(tokens.features.shape)}"
            )
        has_counts = tokens.counts is not None
        return tokens, used, None if projector is None or has_counts else projector(tokens.features)

    if question is None and is_replayable(method):
        name = "reduce" if projector is None else "reduce and project"
        tokens, used, projected = recorded(settings, name, plan, tower_arguments, run, views)
    else:
        tokens, used, projected = run(views)
    counts, after = [plan.num_outputs] * len(views), plan.num_outputs
    if tokens.counts is not None:
        counts = tokens.counts.tolist()
        after = round(sum(counts) / len(counts))
        if projector is not None:
            projected = projector(tokens.features[:, : max(counts)])
    count(settings, plan, used, len(views), plan.num_tokens, after)
    return Reduced(tokens, counts, projected)


def is_replayable(method: Method) -> bool:
    """Whether a method computes the same at every call. One of other authors may do anything."""
    return type(method).__module__.startswith("vtc.methods.")


def select(settings: Settings, views: Tensor, plan: Plan, question: Question | None = None) -> Selection | None:
    """The patches kept of views `[T, 3, height, width]`, or None if the method selects no patches."""
    tokens = reduce(settings, views, plan, question=question).tokens
    if tokens.indices is None or tokens.scores is None:
        return None
    indices, counts = tokens.indices, tokens.counts
    if plan.method.keeps_patches():  # ascending, and the same number of each
        return Selection(indices, tokens.scores, plan.grid)
    places = torch.arange(indices.shape[1], device=indices.device)
    if counts is not None:
        counts = counts - (tokens.features.shape[1] - indices.shape[1])  # without the merged tokens
        indices = indices.masked_fill(places >= counts[:, None], plan.num_tokens)
    indices = indices.sort(1).values
    return Selection(indices.masked_fill(indices == plan.num_tokens, -1), tokens.scores, plan.grid, counts)


def count(settings: Settings, plan: Plan, used: list[str], images: int, before: int, after: int) -> None:
    """Count images, in the open block or of the model. Not while compiling: each new count would compile again."""
    if torch.compiler.is_compiling():
        return
    if (run := settings.run) is None:
        IMAGES[settings.base] = IMAGES.get(settings.base, 0) + images
        return
    layers = settings.base.language_model.config.num_hidden_layers
    start = layers if plan.config.reselects else plan.config.prune_after  # a token mask leaves all in every layer
    stages = ((start, after), *(plan.config.schedule or ())[1:])
    run.count_images(images, before, stages, layers)
    device, backend = settings.base.vision_tower.device, plan.config.backend
    run.backend = {op: ops.backend_for(op, device, backend)[0] for op in operations(plan, used)}


def operations(plan: Plan, used: list[str]) -> list[str]:
    """The operations that a plan runs, of which `used` score the tower's layers."""
    ranked = () if plan.method.prunes_only_language() else used
    own = plan.method.operations
    inside = plan.config.prunes_inside
    if plan.method.only_ranks() and (plan.config.prune_after or not plan.num_kept):
        own = ("topk", "compact")  # tokens are gathered later: after a layer, or from all tiles
    elif plan.method.joint and not plan.num_kept:
        own = (*own, "topk")  # of an image's placeholders those that stay
    elif inside and not plan.method.prunes_only_language():
        own = (*own, "topk", "compact")
    last = ("compact_kv",) if inside and plan.config.kept_kv == "compact" else ()
    return list(dict.fromkeys((*ranked, *own, *last)))

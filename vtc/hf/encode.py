"""Pixels to visual tokens: run the vision tower as far as the method needs, and reduce its features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtc import ops
from vtc.hf import attention
from vtc.hf.settings import Settings
from vtc.hf.towers import tower_of
from vtc.methods import Tokens, VisionOutputs
from vtc.plan import Plan

_NOTHING: Mapping[str, Any] = {}


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
    settings: Settings, views: Tensor, plan: Plan, tower_arguments: Mapping[str, Any] = _NOTHING
) -> tuple[VisionOutputs, list[str]]:
    """Run the vision tower on views `[T, 3, height, width]`, with more arguments of its `forward`.

    Returns the outputs that the method needs, and the operations that computed the scores. If the open block was opened
    with such outputs, they are returned and the tower does not run.
    """
    if settings.vision is not None:
        return settings.vision  # type: ignore[no-any-return]
    base, tower, needs = settings.base, settings.base.vision_tower, plan.method.needs
    spec = tower_of(tower.config)
    layers = spec.layers_of(tower)
    scores = attention.ClsScores(plan.config, keeps_keys=needs.keys == "feature")
    kept = {*plan.feature_layers, len(layers) - 1} if needs.keys == "last" else set(plan.feature_layers)
    hidden = spec.embed(tower, views, tower_arguments)  # [T, 1 + N, D], without the 1 if there is no [CLS]
    states = {0: hidden} if 0 in kept else {}  # by the number of layers before them
    for number, layer in zip(range(plan.num_layers), layers, strict=False):
        hidden = spec.run_layer(layer, hidden, scores if number in plan.scored else None)
        if number + 1 in kept:
            states[number + 1] = hidden
    if len(plan.feature_layers) > 1:
        features = torch.cat([states[number] for number in plan.feature_layers], -1)
    else:
        features = states[plan.feature_layers[0]]
    has_cls, query, keys = spec.cls, None, scores.keys
    if needs.keys == "last":
        flat_query, flat_keys = spec.projections(layers[-1], states[len(layers) - 1])
        heads = tower.config.num_attention_heads
        query, keys = flat_query.unflatten(1, (heads, -1)), flat_keys.unflatten(2, (heads, -1)).transpose(1, 2)
    if plan.pool > 1:
        features, has_cls = features[:, int(has_cls) :], False
        scores.pool(math.isqrt(features.shape[1]), plan.pool)
        features = base.vision_resampler(features)  # expects square frames, too
    cls_probs = scores.cls_probs() if needs.cls_probs else None
    pixels = views if needs.pixels else None
    return VisionOutputs(features, plan.grid, cls_probs, keys, query, pixels, has_cls), scores.ops


def reduce(
    settings: Settings, views: Tensor, plan: Plan, tower_arguments: Mapping[str, Any] = _NOTHING
) -> tuple[Tokens, list[int]]:
    """Encode views `[T, 3, height, width]`: the reduced tokens before the projector, and how many each view has.

    An adaptive method synchronises with the device once here, to read the counts: the host needs them to shorten the
    prompt.
    """
    vision, used = run_tower(settings, views, plan, tower_arguments)
    tokens = plan.method.reduce(vision, plan.num_kept)
    counts, after = [plan.num_outputs] * len(views), plan.num_outputs
    if tokens.counts is not None:
        counts = tokens.counts.tolist()
        if max(counts) > plan.num_tokens:
            raise ValueError(
                f"{plan.config.method} made {max(counts)} tokens of image {counts.index(max(counts))}: it kept all "
                f"{plan.num_tokens} patches and has an extra token, but a prompt has {plan.num_tokens} placeholders "
                "for an image; use another method, or a smaller keep and no adaptive_count"
            )
        after = round(sum(counts) / len(counts))
    count(settings, plan, used, len(views), plan.num_tokens, after)
    return tokens, counts


def select(settings: Settings, views: Tensor, plan: Plan) -> Selection | None:
    """The patches kept of views `[T, 3, height, width]`, or None if the method selects no patches."""
    tokens, _ = reduce(settings, views, plan)
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
    """Count images in the open block. Skipped while compiling: every new counter value would recompile."""
    run, config = settings.run, plan.config
    if run is None or torch.compiler.is_compiling():
        return
    run.tokens_before, run.tokens_after = before, after
    run.images += images
    ranked = () if plan.method.prunes_only_language() else used
    operations = dict.fromkeys((*ranked, *plan.method.operations))
    if config.prune_after and config.kv == "compact":
        operations |= {"compact_kv": None}
    device = settings.base.vision_tower.device
    run.backend = {op: ops.backend_for(op, device, config.backend)[0] for op in operations}

"""LLaVA with fewer visual tokens: what happens to a model whose vision tower says `attn_implementation="vtc"`.

The route of a prompt. Of each image's N placeholders K stay, before anything has read the prompt (`vtc.hf.prompt`). The
vision tower runs up to the feature layer; a method (`vtc.methods`), with the [CLS] rows of the scored layers for
instance, leaves K tokens of its patches; only these pass the projector and fill the K placeholders. From there on
transformers sees a prompt that simply is shorter: masks, positions, caches, beams and decoding need no care.
`generate()` finally puts the caller's full prompt back in front.

An adaptive method says only then how many tokens each image has; its images are encoded before their prompt is
shortened.

With `prune_layer` > 0 the route is another one: the prompt keeps all N placeholders, all patches pass the projector,
and `vtc.hf.prune` drops tokens between two layers of the language model.

The hooks are guards on two classes of each model (`install`, at the end). They hand over to the stock method at once
unless the model's vision tower says "vtc". Settings live in `model.config.vtc`, a plain dict, so that they follow the
model through deepcopy and save_pretrained; stock transformers loads and ignores it. How models and towers differ is
written in `vtc.hf.families`.
"""

import dataclasses
import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtc import methods, ops
from vtc.config import VTCConfig, kept_count
from vtc.hf import attention, prune
from vtc.hf import families as adapters
from vtc.hf.families import Model, Tower, Visual
from vtc.hf.prompt import FullPrompt, shorten

PROMPT_METHODS = tuple(name for name, method in methods.METHODS.items() if method.prunes_only_language())
NEEDS_IDS = "VTC finds the places of the images in input_ids; pass input_ids and no inputs_embeds"


class Selection(NamedTuple):
    """The patches kept of B images: indices `[B, K]` int64 ascending, scores `[B, N]` float32, grid (rows, columns).

    A tower's register tokens come before the patches and count: patch p is token N - rows * columns + p. Where images
    keep different numbers of patches, counts `[B]` int64 says how many, and the rest of an image's indices is -1. What
    a method makes by merging is no patch and not counted.
    """

    indices: torch.Tensor
    scores: torch.Tensor
    grid: tuple[int, int]
    counts: torch.Tensor | None = None


@dataclasses.dataclass
class Scope:
    """One open `vtc.compress` block: its settings, its thread, and what it has counted (a `vtc.Run`)."""

    config: VTCConfig
    run: Any
    thread: int = dataclasses.field(default_factory=threading.get_ident)


def scope_of(base: torch.nn.Module) -> Scope | None:
    """Return the innermost open scope of this thread; a thread that opened none is in the one opened last."""
    scopes: tuple[Scope, ...] = base.__dict__.get("_vtc_scopes", ())
    if len(scopes) < 2:
        return scopes[0] if scopes else None
    thread = threading.get_ident()
    return next((scope for scope in reversed(scopes) if scope.thread == thread), scopes[-1])


def settings(base: torch.nn.Module) -> VTCConfig:
    """Return the settings of the open scope, or those stored in the model's config, or the defaults."""
    scope = scope_of(base)
    return scope.config if scope else VTCConfig.of(**getattr(base.config, "vtc", None) or {})


def find_llava(model: torch.nn.Module) -> Any:
    """Return the LLaVA inside `model`, which may be wrapped (an adapter, for instance), or raise ValueError."""
    for module in model.modules():
        if adapters.model_of(module):
            return module.base_model if hasattr(module, "base_model") else module
    raise ValueError(
        f"{type(model).__name__} holds no LLaVA model; vtc works on transformers' "
        + ", ".join(adapters.classes(known)[1] for known in adapters.MODELS.values())
    )


def is_on(model: Any) -> bool:
    """Return whether `model`, one of the guarded classes, compresses: its vision tower alone decides."""
    return model.base_model.vision_tower.config._attn_implementation == attention.NAME


# --- one picture ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The settings applied to one model and size of pictures: the images, tiles or frames that its tower sees."""

    config: VTCConfig
    method: methods.Method
    tower: Tower
    grid: tuple[int, int]
    tokens: int  # N, visual tokens per picture
    kept: int  # K; 0 for tiles, whose budget is the image's
    rows: int  # what the method makes of K: the tokens that are left, the most there can be if it is adaptive
    features: tuple[int, ...]  # number of vision layers before each feature layer
    stop: int  # number of vision layers that run
    scored: range  # those whose [CLS] row counts
    pool: int  # the tokens of pool x pool patches become one, before the selection

    @classmethod
    def of(
        cls,
        base: Any,
        pixel_values: torch.Tensor | None = None,
        feature_layer: int | list[int] | None = None,
        strategy: str | None = None,
        config: VTCConfig | None = None,
        layout: str | None = None,
    ) -> "Plan":
        config = config or settings(base)
        family = _family(base)
        layout = layout or family.visuals[0].layout
        vision = base.vision_tower.config
        tower = adapters.tower_of(vision)
        if refusal := tower.refusal(config.method) or family.refusal(config.method):
            work = [method for method in family.methods() if method in tower.methods()]
            raise ValueError(
                f"method {config.method!r} {refusal}; methods that work with it: {', '.join(map(repr, work))}, e.g. "
                f"vtc.configure(model, method={work[0]!r})"
            )
        if config.prune_after:
            if [visual.layout for visual in family.visuals] != ["whole"]:
                raise ValueError(
                    f"prune_layer={config.prune_after} is for models whose images are one picture each, which those of "
                    f"{family.name} are not; use prune_layer=0"
                )
            prune.check(base.language_model, config)
        method = config.build_method()
        features = _feature_layers(base, vision.num_hidden_layers, feature_layer)
        strategy = strategy or getattr(base.config, "vision_feature_select_strategy", "default")
        wanted = "default" if tower.cls else "full"
        if strategy != wanted:
            reason = "drops [CLS] from the features" if tower.cls else "keeps all of a tower without [CLS]"
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} is not supported; VTC accepts {wanted!r}, which {reason}"
            )
        stop, last = max(features), vision.num_hidden_layers - 1
        end = min(stop, last)  # the last layer is never scored
        if method.needs.keys == "last":
            stop = max(stop, last)  # that layer does not run, but those before it do
        scored = method.scored_layers(end)
        if pixel_values is not None and pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be [images, 3, height, width], got shape {tuple(pixel_values.shape)}")
        size = _pair(vision.image_size) if pixel_values is None else pixel_values.shape[-2:]
        pool = base.config.spatial_pool_stride if layout == "frames" else 1
        rows, columns = (side // patch // pool for side, patch in zip(size, _pair(vision.patch_size), strict=True))
        tokens = tower.visual_tokens(vision, rows * columns)
        if layout != "whole" and tokens != rows * columns:
            raise ValueError(f"{tower.name} puts register tokens among the patches, which tiles and frames cannot have")
        kept = 0 if layout == "tiles" else kept_count(config, tokens)
        left = 0 if layout == "tiles" else method.num_outputs(tokens, kept)
        return cls(config, method, tower, (rows, columns), tokens, kept, left, features, stop, scored, pool)


def check(base: Any, config: VTCConfig) -> None:
    """Raise ValueError if `config` asks for what this model cannot do."""
    if config.compresses:
        Plan.of(base, config=config)


def _family(base: Any) -> Model:
    family = adapters.model_of(base)
    if family is None:
        raise ValueError(f"{type(base).__name__} is not a model that VTC knows: {', '.join(adapters.MODELS)}")
    return family


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _feature_layers(base: Any, depth: int, given: Any) -> tuple[int, ...]:
    """How many layers of the tower come before each feature layer; several are put side by side, as VipLLaVA does."""
    config = base.config
    own: Any = getattr(config, "vision_feature_layer", None)
    own = getattr(config, "vision_feature_layers", None) if own is None else own  # VipLLaVA's, until transformers 5.2x
    given = own if given is None else given
    layers = [given] if isinstance(given, int) else list(given)
    if len(layers) != (1 if isinstance(own, int) else len(own)):
        raise ValueError(
            f"vision_feature_layer={given!r}, but the model's projector was made for {own!r}; leave it away"
        )
    stops = tuple(layer if layer >= 0 else depth + 1 + layer for layer in layers)
    if not all(0 < stop <= depth for stop in stops):
        raise ValueError(f"vision_feature_layer={given!r} does not exist; the tower has {depth} layers")
    return stops


def encode(base: Any, pixel_values: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, Selection | None]:
    """Encode pictures `[B, 3, height, width]`: the rows `[B, R, D]` that are left before the projector, and which.

    The selection is None if the method chooses no patches.
    """
    tokens, _ = compress(base, pixel_values, plan)
    if tokens.indices is None or tokens.scores is None:
        return tokens.features, None
    indices, counts = tokens.indices, tokens.counts
    if plan.method.keeps_patches():  # ascending, and as many of each
        return tokens.features, Selection(indices, tokens.scores, plan.grid)
    places = torch.arange(indices.shape[1], device=indices.device)
    if counts is not None:
        counts = counts - (tokens.features.shape[1] - indices.shape[1])  # less what was merged
        indices = indices.masked_fill(places >= counts[:, None], plan.tokens)
    indices = indices.sort(1).values
    return tokens.features, Selection(indices.masked_fill(indices == plan.tokens, -1), tokens.scores, plan.grid, counts)


def compress(base: Any, pixel_values: torch.Tensor, plan: Plan) -> tuple[methods.Tokens, list[int]]:
    """Encode pictures `[B, 3, height, width]`: the tokens that are left, and how many of each picture.

    Where pictures differ in that, the host has to know before it can shorten a prompt: reading the counts back is the
    one wait for the device that an adaptive method costs.
    """
    tower, used = run_tower(base, pixel_values, plan)
    tokens = plan.method.reduce(tower, plan.kept)
    counts, after = [plan.rows] * len(pixel_values), plan.rows
    if tokens.counts is not None:
        counts = tokens.counts.tolist()
        if max(counts) > plan.tokens:
            raise ValueError(
                f"{plan.config.method} made {max(counts)} tokens of image {counts.index(max(counts))}, which kept all "
                f"its {plan.tokens} patches and has one more; a prompt has {plan.tokens} places for an image: use "
                "another method, or a smaller keep and no adaptive_count"
            )
        after = round(sum(counts) / len(counts))
    _count(base, plan, used, len(pixel_values), plan.tokens, after)
    return tokens, counts


def run_tower(base: Any, pixel_values: torch.Tensor, plan: Plan) -> tuple[methods.VisionOutputs, list[str]]:
    """Run the vision tower as far as the method needs: what it leaves, and the operations that the scores took."""
    tower, about, needs = base.vision_tower, plan.tower, plan.method.needs
    layers = about.layers_of(tower)
    scores = attention.ClsScores(plan.config, keeps_keys=needs.keys == "feature")
    kept = {*plan.features, len(layers) - 1} if needs.keys == "last" else set(plan.features)
    hidden = about.embed(tower, pixel_values)  # [B, 1 + N, D], without the 1 if there is no [CLS]
    states = {0: hidden} if 0 in kept else {}  # by the number of layers before them
    for number, layer in zip(range(plan.stop), layers, strict=False):
        hidden = about.run_layer(layer, hidden, scores if number in plan.scored else None)
        if number + 1 in kept:
            states[number + 1] = hidden
    if len(plan.features) > 1:
        features = torch.cat([states[stop] for stop in plan.features], -1)
    else:
        features = states[plan.features[0]]
    has_cls, query, keys = about.cls, None, scores.keys
    if needs.keys == "last":
        flat_query, flat_keys = about.projections(layers[-1], states[len(layers) - 1])
        heads = tower.config.num_attention_heads
        query, keys = flat_query.unflatten(1, (heads, -1)), flat_keys.unflatten(2, (heads, -1)).transpose(1, 2)
    if plan.pool > 1:
        features, has_cls = features[:, int(has_cls) :], False
        scores.pool(math.isqrt(features.shape[1]), plan.pool)
        features = base.vision_resampler(features)  # takes pictures for square, too
    rows = scores.rows() if needs.cls_probs else None
    pixels = pixel_values if needs.pixels else None
    return methods.VisionOutputs(features, plan.grid, rows, keys, query, pixels, has_cls), scores.ops


def _count(base: Any, plan: Plan, used: list[str], images: int, before: int, after: int) -> None:
    """Tell the open scope. Not in a compiled graph: a counter there would mean a new graph for each of its values."""
    if (scope := scope_of(base)) is not None and not torch.compiler.is_compiling():
        run, device = scope.run, base.vision_tower.device
        run.tokens_before, run.tokens_after = before, after
        run.images += images
        ranked = () if plan.config.method in PROMPT_METHODS else used
        operations = dict.fromkeys((*ranked, *plan.method.operations))
        if plan.config.prune_after and plan.config.kv == "compact":
            operations |= {"compact_kv": None}
        run.backend = {op: ops.backend_for(op, device, plan.config.backend)[0] for op in operations}


# --- the images of one call ------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The images or videos of one call, as pictures `[T, 3, height, width]`, and how many tokens each gets.

    For tiles, `tiles` holds of each image the number of its pictures and the layout of its tokens `[n]`, int64 on the
    CPU: in the order of its placeholders the number of each token among all of its pictures' (picture * N + token), and
    -1 for a newline.
    """

    plan: Plan
    pictures: torch.Tensor
    counts: list[tuple[int, int]]  # of each image: placeholders, and how many of them stay
    tiles: list[tuple[int, torch.Tensor]]

    @classmethod
    def of(cls, base: Any, visual: Visual, call: dict[str, Any]) -> "Batch":
        pixels = call[visual.pixels]
        layer = call.get("vision_feature_layer", call.get("vision_feature_layers"))
        strategy = call.get("vision_feature_select_strategy")
        if visual.layout == "whole":
            if call.get("image_sizes") is not None:
                raise ValueError("image_sizes is for towers that take images of any size, which VTC does not support")
            plan = Plan.of(base, pixels, layer, strategy)
            return cls(plan, pixels, [(plan.tokens, plan.rows)] * len(pixels), [])
        if visual.layout == "frames":
            if pixels.ndim != 5:
                raise ValueError(
                    f"{visual.pixels} must be [videos, frames, 3, height, width], got shape {tuple(pixels.shape)}"
                )
            plan = Plan.of(base, pixels[0], layer, strategy, layout="frames")
            frames = pixels.shape[1]
            return cls(plan, pixels.flatten(0, 1), [(frames * plan.tokens, frames * plan.rows)] * len(pixels), [])
        sizes = call.get("image_sizes")
        if sizes is None:
            raise ValueError("image_sizes is needed to know an image's tiles; pass on what the processor returned")
        tiles = _tiles(base, sizes)
        if pixels.ndim == 5 and len(pixels) == len(tiles):  # each image padded to the most tiles of all
            pixels = torch.cat([own[:count] for own, (count, _) in zip(pixels, tiles, strict=True)])
        if pixels.ndim != 4 or len(pixels) != sum(count for count, _ in tiles):
            raise ValueError(
                f"{visual.pixels} of shape {tuple(call[visual.pixels].shape)} does not hold the "
                f"{[count for count, _ in tiles]} tiles of image_sizes; it must be [images, tiles, 3, height, width] "
                "as the processor makes it"
            )
        plan = Plan.of(base, pixels, layer, strategy, layout="tiles")
        counts = [(len(layout), kept_count(plan.config, len(layout))) for _, layout in tiles]
        return cls(plan, pixels, counts, tiles)

    def encode(self, base: Any) -> tuple[torch.Tensor, "Batch"]:
        """Projected features `[images, K, D]` of the kept tokens; what follows the tokens of images with fewer counts
        for nothing. And the batch with the `counts` that an adaptive method has found; until then they are the most.
        """
        if self.tiles:
            return torch.nn.utils.rnn.pad_sequence(_encode_tiles(base, self), batch_first=True), self
        tokens, counts = compress(base, self.pictures, self.plan)
        if tokens.counts is not None:
            counted = self._replace(counts=[(self.plan.tokens, count) for count in counts])
            return base.multi_modal_projector(tokens.features[:, : max(counts)]), counted
        kept = base.multi_modal_projector(tokens.features)
        return kept.reshape(len(self.counts), -1, kept.shape[-1]), self


def _tiles(base: Any, sizes: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Of images of `sizes` `[images, 2]` (height, width): the number of pictures, and the layout `[n]` of the tokens.

    It is transformers' own code that unpads and puts newlines, here on the tokens' numbers.
    """
    vision, module = base.config.vision_config, sys.modules[_family(base).module]
    tokens = (vision.image_size // vision.patch_size) ** 2
    tiles = []
    for size in sizes.cpu():
        count = module.image_size_to_num_patches(size, base.config.image_grid_pinpoints, vision.image_size)
        numbers = torch.arange(count * tokens, device="cpu").view(count, tokens, 1)
        newline = torch.tensor([-1], device="cpu")
        packed, _ = base.pack_image_features([numbers], size[None], "default", image_newline=newline)
        tiles.append((count, packed[0][:, 0]))
    return tiles


def _encode_tiles(base: Any, batch: Batch) -> list[torch.Tensor]:
    """Of each image the projected features `[K, D]` of its kept tokens, newlines among them."""
    plan = batch.plan
    tower, used = run_tower(base, batch.pictures, plan)
    features, total = tower.patches, plan.method.select(tower, 1)[1]  # [T, N, D], [T, N]
    chosen, first = [], 0
    for (tiles, layout), (tokens, kept) in zip(batch.tiles, batch.counts, strict=True):
        ranking = share_out(total[first : first + tiles], layout, plan.config.tiles)
        layout = layout.to(features.device)
        rows = layout[ops.topk(ranking[None], kept, backend=plan.config.backend)[0]]
        chosen.append(torch.where(rows < 0, rows, rows + first * plan.tokens))
        first += tiles
        _count(base, plan, used, 1, tokens, kept)
    rows = torch.cat(chosen)
    if all(tokens == kept for tokens, kept in batch.counts):  # exactly what the stock model computes
        features = base.multi_modal_projector(features)
    visual = ops.compact(features.flatten(0, 1)[None], rows.clamp(min=0)[None], backend=plan.config.backend)[0]
    if any(tokens != kept for tokens, kept in batch.counts):
        visual = base.multi_modal_projector(visual)
    visual = torch.where(rows[:, None] < 0, base.image_newline.to(visual), visual)
    return list(visual.split([kept for _, kept in batch.counts]))


def share_out(scores: torch.Tensor, layout: torch.Tensor, how: str) -> torch.Tensor:
    """Ranking `[n]` of an image's tokens: its K largest are each tile's best, with the tiles' shares as `how` says.

    The token of rank r = 0, 1, 2, ... in its tile gets mass / (r + 1/2), with the tile's mass the sum of its scores
    ("mass") or 1 ("equal"). Taking the largest of these is how Sainte-Lague shares out seats: shares are proportional,
    rounded without bias, and what a small tile cannot use goes to the others. Newlines come last.

    Parameters
    ----------
    scores : Tensor [T, N], floating point
        Of the tokens of an image's pictures, the base picture first; NaN ranks last.
    layout : Tensor [n], int64, on the CPU
        As in `Batch`.
    how : {"mass", "equal"}
    """
    tile = torch.where(layout < 0, len(scores), layout // scores.shape[1])
    sizes = tile.bincount(minlength=len(scores) + 1)
    start = (sizes.cumsum(0) - sizes).to(scores.device)
    tile, layout = tile.to(scores.device), layout.to(scores.device)
    score = scores.flatten()[layout.clamp(min=0)].float()
    order = score.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    order = order[tile[order].argsort(stable=True)]  # tile after tile, each from its best to its worst
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start[tile[order]]
    mass = torch.ones_like(start, dtype=torch.float32)
    if how == "mass":
        own = tile == torch.arange(len(start), device=tile.device)[:, None]
        mass = torch.where(own, score.nan_to_num(nan=0.0), 0.0).sum(1)
    return torch.where(layout < 0, -1.0, mass[tile] / (rank + 0.5))


def encode_all(base: Any, pixels: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For `prune_layer` > 0: projected features `[images, N, D]` of all patches, and the indices `[images, K]` kept.

    The indices are None if the method chooses inside the language model.
    """
    tower, used = run_tower(base, pixels, plan)
    indices = None if plan.config.method in PROMPT_METHODS else plan.method.select(tower, plan.kept)[0]
    _count(base, plan, used, len(pixels), plan.tokens, plan.kept)
    return base.multi_modal_projector(tower.patches), indices


# --- one prompt -----------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """A note left on a cache (`_vtc_seen`), for a further turn has to know what the cache's columns are.

    The conversation's first `length` tokens went in as `input_ids` and `attention_mask` `[B, L']`, its images with
    the settings `budget` ("method='vtc-cls', keep=64"). Whatever was generated after them is in the cache unchanged.
    """

    length: int
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    budget: str | None


def _compress_prompt(base: Any, call: dict[str, Any]) -> tuple[dict[str, Any], _Seen, list[int]]:
    """Shorten the prompt of `call` and encode its images.

    Returns the arguments that replace the caller's, the note for the cache, and the number of images of each row.

    The new `pixel_values` are the projected features `[images, K, D]`. Some versions of transformers encode images in
    `generate()` before the prefill, others in the model's forward, and both do it by calling `get_image_features` on
    `pixel_values`; ours returns such features as they are. So three dimensions mean: encoded, and the prompt is short.
    Where images have different numbers of rows, `image_sizes` says how many, `[images]` int64 on the CPU.
    """
    ids: Any = call.get("input_ids")
    mask: Any = call.get("attention_mask")
    if ids is None or call.get("inputs_embeds") is not None:
        raise ValueError(NEEDS_IDS)
    visuals, config = _family(base).visuals, settings(base)
    batches = {visual: Batch.of(base, visual, call) for visual in visuals if call.get(visual.pixels) is not None}
    size = f"keep={config.keep}" if config.ratio is None else f"ratio={config.ratio}"
    budget = f"method={config.method!r}, {size}"
    seen, start = _seen_before(base, ids, mask, call.get("past_key_values"), budget if batches else None)
    encoded = {}
    for visual, batch in batches.items():
        if batch.plan.method.adaptive:  # how long the prompt becomes is known only when its images are encoded
            encoded[visual], batches[visual] = batch.encode(base)
    positions, labels = call.get("position_ids"), call.get("labels")
    if seen and positions is not None:
        raise ValueError("position_ids cannot be given for a further turn; leave them to generate()")
    short: Any = (ids[:, start:], None if mask is None else mask[:, start:], positions, labels)
    images = [0] * len(ids)
    for visual in visuals:
        short, own = shorten(
            *short,
            placeholder=getattr(base.config, visual.token),
            counts=batches[visual].counts if visual in batches else [],
            pad=base.config.get_text_config().pad_token_id or 0,
        )
        images = [a + b for a, b in zip(images, own, strict=True)]
    arguments = {name: given for name, given in short._asdict().items() if given is not None}
    if seen:  # the old columns as the cache has them, and then the new ones
        old = seen.attention_mask if seen.attention_mask is not None else torch.ones_like(seen.input_ids)
        arguments["input_ids"] = torch.cat([seen.input_ids, ids[:, seen.length : start], short.input_ids], 1)
        arguments["attention_mask"] = torch.cat([old, mask[:, seen.length : start], arguments["attention_mask"]], 1)
        arguments.pop("position_ids", None)  # generate() counts them from the mask
    if (scope := scope_of(base)) is not None:
        scope.run.prompt_before, scope.run.prompt_after = ids.shape[1], arguments["input_ids"].shape[1]
    for visual, batch in batches.items():
        arguments[visual.pixels] = encoded[visual] if visual in encoded else batch.encode(base)[0]
        if visual in encoded:
            arguments["image_sizes"] = torch.tensor([count for _, count in batch.counts], device="cpu")
    budget = budget if batches else seen.budget if seen else None  # type: ignore[assignment]
    return arguments, _Seen(ids.shape[1], arguments["input_ids"], arguments.get("attention_mask"), budget), images


def _seen_before(base: Any, ids: torch.Tensor, mask: Any, cache: Any, budget: str | None) -> tuple[_Seen | None, int]:
    """Return the note on a cache that is not empty, and how many columns of the full `ids` `[B, L]` it holds."""
    count = 0 if cache is None else int(cache.get_seq_length())
    if not count:
        return None, 0
    seen = getattr(cache, "_vtc_seen", None)
    if seen is None:
        if any((ids[:, :count] == getattr(base.config, visual.token)).any() for visual in _family(base).visuals):
            raise ValueError("past_key_values holds images that are not compressed; start without it, or vtc.disable")
        seen = _Seen(count, ids[:, :count], mask[:, :count], None)
    if budget and seen.budget and budget != seen.budget:
        raise ValueError(
            f"past_key_values holds images compressed with {seen.budget}, the settings say {budget}; use "
            f"vtc.configure(model, {seen.budget}), or start without past_key_values"
        )
    start = seen.length + count - seen.input_ids.shape[1]
    if len(ids) != len(seen.input_ids) or not seen.length <= start < ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {start} tokens of {len(seen.input_ids)} prompt(s), input_ids {tuple(ids.shape)}; "
            "for a further turn pass the ids of the whole conversation: what generate() returned, then the new question"
        )
    return seen, start


def _is_encoded(base: Any, pixels: torch.Tensor) -> bool:
    return pixels.ndim == 3 and pixels.shape[-1] == base.config.get_text_config().hidden_size


# --- hooks ----------------------------------------------------------------------------------------------------------


def _get_features(visual: Visual, stock: Callable[..., Any], self: Any, call: dict[str, Any]) -> Any:
    """In place of `get_image_features` and `get_video_features`."""
    if not settings(self).compresses:
        return _count_stock(self, visual, stock(**call))
    pixels = call.pop("pixel_values") if visual.pixels not in call else call[visual.pixels]  # transformers 5.17: videos
    call[visual.pixels] = pixels
    indices = None
    if not _is_encoded(self, pixels) and settings(self).prune_after:
        pixels, indices = encode_all(self, pixels, Batch.of(self, visual, call).plan)
    if _is_encoded(self, pixels):
        kept = _kept_again(self, visual, call, pixels)
    else:
        batch = Batch.of(self, visual, call)
        pixels, batch = batch.encode(self)
        kept = [count for _, count in batch.counts]
    each: Any = [own[:count] for own, count in zip(pixels, kept, strict=True)]
    output = BaseModelOutputWithPooling(
        last_hidden_state=pixels, pooler_output=pixels if _family(self).stacked else each
    )
    output._vtc_indices = indices
    return output.to_tuple() if call.get("return_dict") is False else output


def _count_stock(base: Any, visual: Visual, output: Any) -> Any:
    """Tell the open scope what the stock model encoded, and return it."""
    if (scope := scope_of(base)) is not None and not torch.compiler.is_compiling():
        features = output[1] if isinstance(output, tuple) else output.pooler_output
        scope.run.images += len(features)
        scope.run.tokens_before = scope.run.tokens_after = len(features[-1])
    return output


def _kept_again(base: Any, visual: Visual, call: dict[str, Any], pixels: torch.Tensor) -> list[int]:
    """How many rows of encoded `[images, K, D]` belong to each image: all, but for tiles with a ratio and where
    `image_sizes` says so.
    """
    config = settings(base)
    if visual.layout == "whole" and call.get("image_sizes") is not None:
        return call["image_sizes"].tolist()
    if visual.layout != "tiles" or config.ratio is None:
        return [pixels.shape[1]] * len(pixels)
    return [kept_count(config, len(layout)) for _, layout in _tiles(base, call["image_sizes"])]


def _forward(stock: Callable[..., Any], self: Any, call: dict[str, Any]) -> Any:
    base, cache = self.base_model, call.get("past_key_values")  # type: Any, Any
    note: _Seen | None = getattr(cache, "_vtc_seen", None)
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    pixels = [call[visual.pixels] for visual in _family(base).visuals if call.get(visual.pixels) is not None]
    scope = scope_of(base)
    images = bool(pixels) or (call.get("mm_encoder_outputs") or {}).get("image") is not None
    if prune.note_on(cache) or (images and settings(base).prune_after):
        return _forward_pruned(stock, self, call, images)
    if not note and not settings(base).compresses:
        if scope is not None and ids is not None and (pixels or call.get("mm_encoder_outputs")):
            scope.run.prompt_before = scope.run.prompt_after = ids.shape[1]
    elif not all(_is_encoded(base, given) for given in pixels):
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("images on top of past_key_values need the whole conversation; use generate()")
        if isinstance(call.get("logits_to_keep"), torch.Tensor):
            raise ValueError("logits_to_keep holds positions of the full prompt; pass how many last positions to keep")
        short, note, _ = _compress_prompt(base, call)
        call |= dict.fromkeys(("attention_mask", "position_ids")) | short
    elif note and ids is not None and mask is not None and mask.ndim == 2:
        columns = cache.get_seq_length() + ids.shape[1]
        if mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, but the compressed prompt and the new tokens "
                f"have {columns}; use generate(), or leave attention_mask away if nothing is padded"
            )
    outputs = stock(**call)
    cache = getattr(outputs, "past_key_values", None)
    if cache is not None and note:
        cache._vtc_seen = note
    if scope is not None and cache is not None and (pixels or call.get("mm_encoder_outputs")):
        scope.run.saw_cache(cache)
    return outputs


def _forward_pruned(stock: Callable[..., Any], self: Any, call: dict[str, Any], images: bool) -> Any:
    """As `_forward`, for a prompt that is pruned inside the language model and for what comes after it."""
    base, cache = self.base_model, call.get("past_key_values")  # type: Any, Any
    ids: Any = call.get("input_ids")
    if images and (call.get("labels") is not None or isinstance(call.get("logits_to_keep"), torch.Tensor)):
        raise ValueError(
            "labels and positions in logits_to_keep belong to tokens of which prune_layer > 0 drops some on the way; "
            "use prune_layer=0 for them"
        )
    if self is not base:  # the class with the head calls that without
        return stock(**call)
    note = prune.note_on(cache)
    if note and not images:
        new: Any = call.get("inputs_embeds") if ids is None else ids
        if new.shape[1] > 1 and not int(cache.get_seq_length()):
            del cache._vtc_pruned  # the cache was reset
            return stock(**call)
        return prune.decode(stock, base.language_model, call, note)
    if cache is not None and int(cache.get_seq_length()):
        raise ValueError(
            "images on top of past_key_values cannot be pruned inside the language model; start without it, with the "
            "whole conversation and all of its images"
        )
    if ids is None or call.get("inputs_embeds") is not None:
        raise ValueError(NEEDS_IDS)
    config, visual = settings(base), _family(base).visuals[0]
    if call.get(visual.pixels) is not None:
        plan = Batch.of(base, visual, call).plan
        tokens = plan.tokens
        call[visual.pixels], indices = encode_all(base, call[visual.pixels], plan)
    else:
        encoded = call["mm_encoder_outputs"]["image"]
        tokens, indices = len(encoded.pooler_output[0]), getattr(encoded, "_vtc_indices", None)
        if indices is None and config.method not in PROMPT_METHODS:
            raise ValueError("got mm_encoder_outputs, but VTC has to encode the images itself; pass pixel_values")
    kept = kept_count(config, tokens)
    if kept == tokens:
        return stock(**call)
    static = bool(getattr(cache, "is_compileable", False))
    placeholder = getattr(base.config, visual.token)
    prompt = prune.Prompt.of(ids, call.get("attention_mask"), static, placeholder, tokens, kept)
    outputs = prune.prefill(stock, base.language_model, call, config, prompt, indices)
    if (scope := scope_of(base)) is not None:
        scope.run.prompt_before, scope.run.prompt_after = ids.shape[1], prompt.length
        scope.run.saw_cache(getattr(outputs, "past_key_values", None), config.prune_after if config.kv == "full" else 0)
    return outputs


def _generate_pruned(stock: Callable[..., Any], self: Any, call: dict[str, Any], images: bool, option: Any) -> Any:
    """As `_generate`; the prompt keeps its length for transformers, so there is nothing to restore afterwards."""
    cache, config = call.get("past_key_values"), settings(self.base_model)
    if cache is not None and int(cache.get_seq_length()):
        note = prune.note_on(cache)
        if images or note is None or note.compact:
            raise ValueError(
                "a further turn cannot go on from past_key_values pruned inside the language model, unless it brings "
                'no image and kv="full"; start without past_key_values, with the whole conversation and all its images'
            )
        return stock(**call)
    if cache is not None and prune.note_on(cache):
        del cache._vtc_pruned
    if not images:
        return stock(**call)
    ids: Any = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
    if ids is None or call.get("inputs_embeds") is not None:
        raise ValueError(NEEDS_IDS)
    if option("use_cache") is False and (config.kv == "compact" or config.method in PROMPT_METHODS):
        raise ValueError(
            f"method={config.method!r} with kv={config.kv!r} and prune_layer={config.prune_after} drops tokens once, "
            "when the prompt is read, and needs the cache to remember; use use_cache=True, or "
            'method="vtc-cls" and kv="full"'
        )
    for name in ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens"):
        if call.get(name) is not None or option(name):
            raise ValueError(f"prune_layer > 0 needs the prompt in one piece and one token at a time; unset {name}")
    copies = max(option("num_beams") or 1, option("num_return_sequences") or 1)
    if copies > 1 and "mm_encoder_outputs" not in inspect.signature(self.forward).parameters:
        visual = _family(self.base_model).visuals[0]
        plan = Batch.of(self.base_model, visual, call).plan
        if int((ids == getattr(self.base_model.config, visual.token)).sum(1).max()) > plan.tokens:
            raise ValueError(
                "this transformers mixes up the images of a prompt when it copies the prompt for num_beams or "
                "num_return_sequences; upgrade it, or use one image per prompt"
            )
    return stock(**call)


@torch.no_grad()
def _generate(stock: Callable[..., Any], self: Any, call: dict[str, Any]) -> Any:
    if call.get("mm_encoder_outputs"):
        raise ValueError("got mm_encoder_outputs, but VTC has to encode the images itself; pass pixel_values")
    cache: Any = call.get("past_key_values")
    images = any(call.get(visual.pixels) is not None for visual in _family(self.base_model).visuals)

    def option(name: str) -> Any:
        given = call.get(name)
        return getattr(call.get("generation_config") or self.generation_config, name, None) if given is None else given

    if prune.note_on(cache) or (images and settings(self.base_model).prune_after):
        return _generate_pruned(stock, self, call, images, option)
    if not (images and settings(self.base_model).compresses) and not (
        hasattr(cache, "_vtc_seen") and cache.get_seq_length()
    ):
        return stock(**call)  # nothing to shorten, and nothing short in the cache
    if call.get("inputs") is not None:
        call["input_ids"] = call.pop("inputs")

    full: Any = call.get("input_ids")
    if full is not None and call.get("attention_mask") is None:  # inferred as transformers would from the full prompt
        pad, eos = option("pad_token_id"), option("eos_token_id")
        padded = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
        call["attention_mask"] = full.ne(pad).long() if padded else torch.ones_like(full)
    short, note, per_row = _compress_prompt(self.base_model, call)
    call |= short
    if "mm_encoder_outputs" not in inspect.signature(self.forward).parameters:  # an older transformers
        if option("prefill_chunk_size"):
            raise ValueError("this transformers drops the images of a chunked prefill; unset prefill_chunk_size")
        if max(option("num_beams") or 1, option("num_return_sequences") or 1) > 1 and max(per_row) > 1:
            raise ValueError(
                "this transformers mixes up the images of a prompt when it copies the prompt for num_beams or "
                "num_return_sequences; upgrade it, or use one image per prompt"
            )
    prompt = FullPrompt(full, call["input_ids"].shape[1])
    prompt.wrap(call)
    for name in ("max_length", "min_length"):  # these count the caller's prompt
        if option(name):
            call[name] = max(option(name) - full.shape[1] + prompt.short_length, 0)
    output = stock(**call)
    for used in (cache, getattr(output, "past_key_values", None)):  # the caller's own, the one returned
        if used is not None:
            used._vtc_seen = note
    if isinstance(output, torch.Tensor):
        return prompt.restore(output)
    output.sequences = prompt.restore(output.sequences)
    return output


def _guard(owner: type, name: str, ours: Callable[..., Any]) -> None:
    stock = getattr(owner, name)
    parameters = inspect.signature(stock).parameters.values()
    names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(stock)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_on(self) or len(args) > len(names):  # too many arguments: stock says so
            return stock(self, *args, **kwargs)
        return ours(functools.partial(stock, self), self, dict(zip(names, args, strict=False)) | kwargs)

    guarded._vtc_guard = True  # type: ignore[attr-defined]
    setattr(owner, name, guarded)


def install() -> None:
    """Put the guards on the classes of every known model that transformers has imported by now; once on each."""
    for family in adapters.MODELS.values():
        base, head = (getattr(sys.modules.get(family.module), name, None) for name in adapters.classes(family))
        if base is None or head is None or hasattr(base.forward, "_vtc_guard"):
            continue
        for visual in family.visuals:
            _guard(base, visual.get, functools.partial(_get_features, visual))
        _guard(base, "forward", _forward)
        _guard(head, "forward", _forward)
        _guard(head, "generate", _generate)


attention.register()
install()

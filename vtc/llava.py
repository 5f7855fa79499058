"""LLaVA with fewer visual tokens: what happens to a model whose vision tower says `attn_implementation="vtc"`.

The route of a prompt. Of each image's N placeholders K stay, before anything has read the prompt (`vtc.prompt`). The
vision tower runs up to the feature layer; the [CLS] rows of the scored layers choose K patches; only these pass the
projector and fill the K placeholders. From there on transformers sees a prompt that simply is shorter: masks,
positions, caches, beams and decoding need no care. `generate()` finally puts the caller's full prompt back in front.

The hooks are guards on two classes of transformers (`install`, at the end). They hand over to the stock method at once
unless the model's vision tower says "vtc". Settings live in `model.config.vtc`, a plain dict, so that they follow the
model through deepcopy and save_pretrained; stock transformers loads and ignores it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel

from vtc import attention, ops
from vtc.config import VTCConfig, kept_count
from vtc.methods.random import random_scores
from vtc.prompt import FullPrompt, shorten

# Vision towers that are known to put a [CLS] token first: config.model_type of each.
TOWERS = ("clip_vision_model",)


class Selection(NamedTuple):
    """The patches kept of B images: indices `[B, K]` int64 ascending, scores `[B, N]` float32, grid (rows, columns)."""

    indices: torch.Tensor
    scores: torch.Tensor
    grid: tuple[int, int]


def settings(base: LlavaModel) -> VTCConfig:
    """Return the settings stored in the model's config, or the defaults."""
    return VTCConfig().updated(**getattr(base.config, "vtc", None) or {})


def find_llava(model: torch.nn.Module) -> LlavaModel:
    """Return the LLaVA inside `model`, which may be wrapped (an adapter, for instance), or raise ValueError."""
    for module in model.modules():
        if isinstance(module, LlavaModel):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no LLaVA model; vtc works on transformers' LlavaForConditionalGeneration "
        "and LlavaModel"
    )


def is_on(model: Any) -> bool:
    """Return whether `model`, one of the two guarded classes, compresses: its vision tower alone decides."""
    return model.base_model.vision_tower.config._attn_implementation == attention.NAME


# --- one image ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The settings applied to one model and image size."""

    grid: tuple[int, int]
    tokens: int  # N, visual tokens per image
    kept: int  # K
    stop: int  # number of vision layers that run
    scored: range  # those whose [CLS] row counts

    @classmethod
    def of(
        cls,
        base: LlavaModel,
        pixel_values: torch.Tensor | None = None,
        feature_layer: int | None = None,
        strategy: str | None = None,
        config: VTCConfig | None = None,
    ) -> "Plan":
        config = config or settings(base)
        vision = base.vision_tower.config
        if vision.model_type not in TOWERS:
            raise ValueError(
                f"the vision tower {vision.model_type!r} is not supported: VTC needs a tower that starts with a [CLS] "
                f"token and knows {', '.join(TOWERS)}; use a LLaVA with such a tower, or vtc.disable(model)"
            )
        if feature_layer is None:
            feature_layer = base.config.vision_feature_layer  # type: ignore[assignment]
        strategy = strategy or base.config.vision_feature_select_strategy
        if not isinstance(feature_layer, int) or strategy != "default":
            raise ValueError(
                f"vision_feature_layer={feature_layer!r} with vision_feature_select_strategy={strategy!r} is not "
                'supported; VTC accepts one layer (an int) and "default", which drops [CLS] from the features'
            )
        depth = vision.num_hidden_layers
        stop = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
        if not 0 < stop <= depth:
            raise ValueError(f"vision_feature_layer={feature_layer} does not exist; the tower has {depth} layers")
        end = min(stop, depth - 1)  # the last layer is never scored
        first = end - config.ensemble_layers if config.start_layer is None else config.start_layer
        if config.method == "random":
            first = end = 0
        elif not 0 <= first < end:
            raise ValueError(
                f"cannot score vision layers {first} to {end - 1}: scored layers end at the feature layer, here "
                f"{end - 1} of 0 to {depth - 1}; use ensemble_layers 1 to {end} or start_layer 0 to {end - 1}, "
                f"got ensemble_layers={config.ensemble_layers}, start_layer={config.start_layer}"
            )
        if pixel_values is not None and pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be [images, 3, height, width], got shape {tuple(pixel_values.shape)}")
        height, width = (vision.image_size,) * 2 if pixel_values is None else pixel_values.shape[-2:]
        grid = (height // vision.patch_size, width // vision.patch_size)
        tokens = grid[0] * grid[1]
        return cls(grid, tokens, kept_count(config, tokens), stop, range(first, end))


def encode(base: LlavaModel, pixel_values: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, Selection]:
    """Vision tower up to the feature layer, scores, selection: kept rows `[B, K, D]` before the projector."""
    config, tower = settings(base), base.vision_tower
    scores = attention.ClsScores(config)
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))  # [B, 1+N, D]
    for number, layer in zip(range(plan.stop), tower.encoder.layers, strict=False):
        hidden = layer(hidden, None, **({"vtc_scores": scores} if number in plan.scored else {}))
    if config.method == "random":
        total = random_scores(pixel_values, plan.tokens, config.seed)
        indices = ops.topk(total, plan.kept, backend=config.backend)
    else:
        indices, total = scores.select(plan.kept)
    if (run := base.__dict__.get("_vtc_run")) is not None:
        run.tokens_before, run.tokens_after = plan.tokens, plan.kept
        run.images += pixel_values.shape[0]
        used = (*scores.ops, "topk", "compact")
        run.backend = {op: ops.backend_for(op, hidden.device, config.backend)[0] for op in used}
    return ops.compact(hidden[:, 1:], indices, backend=config.backend), Selection(indices, total, plan.grid)


# --- one prompt -----------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """A note left on a cache (`_vtc_seen`), for a further turn has to know what the cache's columns are.

    The conversation's first `length` tokens went in as `input_ids` and `attention_mask` `[B, L']`, each image with
    (N, K) = `tokens`. Whatever was generated after them is in the cache unchanged.
    """

    length: int
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    tokens: tuple[int, int] | None


def _compress_prompt(base: LlavaModel, call: dict[str, Any]) -> tuple[dict[str, Any], _Seen, list[int]]:
    """Shorten the prompt of `call` and encode its images.

    Returns the arguments that replace the caller's, the note for the cache, and the number of images of each row.

    The new `pixel_values` are the projected features `[images, K, D]`. Some versions of transformers encode images in
    `generate()` before the prefill, others in the model's forward, and both do it by calling `get_image_features` on
    `pixel_values`; ours returns such features as they are. So three dimensions mean: encoded, and the prompt is short.
    """
    ids: Any = call.get("input_ids")
    pixel_values: Any = call.get("pixel_values")
    mask: Any = call.get("attention_mask")
    if ids is None or call.get("inputs_embeds") is not None:
        raise ValueError("VTC finds the places of the images in input_ids; pass input_ids and no inputs_embeds")
    plan = None
    if pixel_values is not None:
        plan = Plan.of(base, pixel_values, call.get("vision_feature_layer"), call.get("vision_feature_select_strategy"))
    tokens = (plan.tokens, plan.kept) if plan else None
    seen, start = _seen_before(base, ids, mask, call.get("past_key_values"), tokens)
    tokens = tokens or (seen.tokens if seen else None) or (1, 1)  # (1, 1): no image at all, nothing to drop
    positions, labels = call.get("position_ids"), call.get("labels")
    if seen and positions is not None:
        raise ValueError("position_ids cannot be given for a further turn; leave them to generate()")
    short = shorten(
        ids[:, start:],
        None if mask is None else mask[:, start:],
        positions,
        labels,
        image_token=base.config.image_token_id,
        tokens=tokens[0],
        kept=tokens[1],
        images=len(pixel_values) if plan else 0,
        pad=base.config.get_text_config().pad_token_id or 0,
    )
    arguments = {name: given for name, given in short._asdict().items() if given is not None and name != "images"}
    if seen:  # the old columns as the cache has them, and then the new ones
        old = seen.attention_mask if seen.attention_mask is not None else torch.ones_like(seen.input_ids)
        arguments["input_ids"] = torch.cat([seen.input_ids, ids[:, seen.length : start], short.input_ids], 1)
        arguments["attention_mask"] = torch.cat([old, mask[:, seen.length : start], arguments["attention_mask"]], 1)
        arguments.pop("position_ids", None)  # generate() counts them from the mask
    if (run := base.__dict__.get("_vtc_run")) is not None:
        run.prompt_before, run.prompt_after = ids.shape[1], arguments["input_ids"].shape[1]
    if plan is not None:
        arguments["pixel_values"] = base.multi_modal_projector(encode(base, pixel_values, plan)[0])
    note = _Seen(ids.shape[1], arguments["input_ids"], arguments.get("attention_mask"), tokens)
    return arguments, note, short.images


def _seen_before(
    base: LlavaModel, ids: torch.Tensor, mask: Any, cache: Any, tokens: tuple[int, int] | None
) -> tuple[_Seen | None, int]:
    """Return the note on a cache that is not empty, and how many columns of the full `ids` `[B, L]` it holds."""
    count = 0 if cache is None else int(cache.get_seq_length())
    if not count:
        return None, 0
    seen = getattr(cache, "_vtc_seen", None)
    if seen is None:
        if (ids[:, :count] == base.config.image_token_id).any():
            raise ValueError("past_key_values holds images that are not compressed; start without it, or vtc.disable")
        seen = _Seen(count, ids[:, :count], mask[:, :count], None)
    if tokens and seen.tokens and tokens != seen.tokens:
        raise ValueError(
            f"past_key_values holds images of {seen.tokens[1]} tokens, the settings ask for {tokens[1]}; use "
            f"vtc.configure(model, keep={seen.tokens[1]}), or start without past_key_values"
        )
    start = seen.length + count - seen.input_ids.shape[1]
    if len(ids) != len(seen.input_ids) or not seen.length <= start < ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {start} tokens of {len(seen.input_ids)} prompt(s), input_ids {tuple(ids.shape)}; "
            "for a further turn pass the ids of the whole conversation: what generate() returned, then the new question"
        )
    return seen, start


def _is_encoded(base: LlavaModel, pixel_values: torch.Tensor) -> bool:
    return pixel_values.ndim == 3 and pixel_values.shape[-1] == base.config.get_text_config().hidden_size


# --- hooks ----------------------------------------------------------------------------------------------------------


def _get_image_features(
    stock: Callable[..., Any],
    self: LlavaModel,
    pixel_values: torch.Tensor,
    vision_feature_layer: int | None = None,
    vision_feature_select_strategy: str | None = None,
    *,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    if kwargs.get("image_sizes") is not None:
        raise ValueError("image_sizes is for towers that take images of any size, which VTC does not support")
    if not _is_encoded(self, pixel_values):
        plan = Plan.of(self, pixel_values, vision_feature_layer, vision_feature_select_strategy)
        pixel_values = self.multi_modal_projector(encode(self, pixel_values, plan)[0])
    per_image: Any = list(pixel_values)  # as transformers has it, against its own annotation
    output = BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=per_image)
    return output.to_tuple() if return_dict is False else output


def _forward(
    stock: Callable[..., Any],
    self: Any,
    input_ids: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    base, cache = self.base_model, past_key_values
    note: _Seen | None = getattr(cache, "_vtc_seen", None)
    names = ("input_ids", "pixel_values", "attention_mask", "position_ids")
    values = (input_ids, pixel_values, attention_mask, position_ids)
    if pixel_values is not None and not _is_encoded(base, pixel_values):
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("images on top of past_key_values need the whole conversation; use generate()")
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise ValueError("logits_to_keep holds positions of the full prompt; pass how many last positions to keep")
        short, note, _ = _compress_prompt(base, kwargs | dict(zip(names, values, strict=True)))
        values = tuple(short.pop(name, None) for name in names)  # type: ignore[assignment]
        kwargs |= short  # labels
    elif note and input_ids is not None and attention_mask is not None and attention_mask.ndim == 2:
        columns = cache.get_seq_length() + input_ids.shape[1]
        if attention_mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the compressed prompt and the new tokens "
                f"have {columns}; use generate(), or leave attention_mask away if nothing is padded"
            )
    outputs = stock(self, *values, cache, *args, **kwargs)
    cache = getattr(outputs, "past_key_values", None)
    if cache is not None and note:
        cache._vtc_seen = note
    run = base.__dict__.get("_vtc_run")
    if run is not None and cache is not None and (pixel_values is not None or kwargs.get("mm_encoder_outputs")):
        run.saw_cache(cache)
    return outputs


_GENERATE = inspect.signature(LlavaForConditionalGeneration.generate)


@torch.no_grad()
def _generate(stock: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    call = _GENERATE.bind(self, *args, **kwargs).arguments
    call |= call.pop("kwargs", {})
    del call["self"]
    if call.get("mm_encoder_outputs"):
        raise ValueError("got mm_encoder_outputs, but VTC has to encode the images itself; pass pixel_values")
    cache: Any = call.get("past_key_values")
    if call.get("pixel_values") is None and not (hasattr(cache, "_vtc_seen") and cache.get_seq_length()):
        return stock(self, **call)  # no image, none in the cache: nothing to shorten
    if call.get("inputs") is not None:
        call["input_ids"] = call.pop("inputs")

    def option(name: str) -> Any:
        given = call.get(name)
        return getattr(call.get("generation_config") or self.generation_config, name, None) if given is None else given

    full: Any = call.get("input_ids")
    if full is not None and call.get("attention_mask") is None:  # inferred as transformers would from the full prompt
        pad, eos = option("pad_token_id"), option("eos_token_id")
        padded = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
        call["attention_mask"] = full.ne(pad).long() if padded else torch.ones_like(full)
    short, note, images = _compress_prompt(self.base_model, call)
    call |= short
    if "mm_encoder_outputs" not in inspect.signature(self.forward).parameters:  # an older transformers
        if option("prefill_chunk_size"):
            raise ValueError("this transformers drops the images of a chunked prefill; unset prefill_chunk_size")
        if max(option("num_beams") or 1, option("num_return_sequences") or 1) > 1 and max(images) > 1:
            raise ValueError(
                "this transformers mixes up the images of a prompt when it copies the prompt for num_beams or "
                "num_return_sequences; upgrade it, or use one image per prompt"
            )
    prompt = FullPrompt(full, call["input_ids"].shape[1])
    prompt.wrap(call)
    for name in ("max_length", "min_length"):  # these count the caller's prompt
        if option(name):
            call[name] = max(option(name) - full.shape[1] + prompt.short_length, 0)
    output = stock(self, **call)
    for used in (cache, getattr(output, "past_key_values", None)):  # the caller's own, the one returned
        if used is not None:
            used._vtc_seen = note
    if isinstance(output, torch.Tensor):
        return prompt.restore(output)
    output.sequences = prompt.restore(output.sequences)
    return output


def _guard(owner: type, name: str, ours: Callable[..., Any]) -> None:
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(stock, self, *args, **kwargs) if is_on(self) else stock(self, *args, **kwargs)

    setattr(owner, name, guarded)


def install() -> None:
    """Register "vtc" with transformers and put the guards on LLaVA's two classes. Runs once, when this is imported."""
    attention.register()
    _guard(LlavaModel, "get_image_features", _get_image_features)
    _guard(LlavaModel, "forward", _forward)
    _guard(LlavaForConditionalGeneration, "forward", _forward)
    _guard(LlavaForConditionalGeneration, "generate", _generate)


install()

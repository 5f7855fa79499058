"""Train the bundled model from nothing: `python -m vtc.tiny.train --out DIR`.

The recipe is LLaVA's, with what LLaVA takes ready-made trained first:

1. `vision`: a CLIP vision tower with a [CLS] token, by image-caption contrast. A caption is a set of phrases; every
   phrase of the vocabulary is scored against every image with the sigmoid loss (SigLIP, arXiv 2303.15343), and since
   the scene is known, so is which phrases are true of it: there are no false negatives.
2. `text`: the language model alone, on captions as text followed by questions and answers.
3. `projector`: LLaVA's first stage. The projector alone learns, vision tower and language model are frozen.
4. `language`: LLaVA's second stage. Projector and language model learn, the vision tower stays frozen.

In stage 4 the words of the questions and of a caption are learnt too, at a tenth of an answer's weight: after "is the
red" comes the shape of the red object, and so the model learns where to look before it learns what was asked. The
caption follows the picture directly and the questions are LLaVA's conversation, so the two cannot be confused.

All visual tokens are always present. Pictures grow from phase to phase (70 to 336 pixels), because small ones show more
objects per token; a small one is a window on the canvas and uses that window's position embeddings. The last phases mix
sizes, then shapes and close-ups: where something is and how much there is must be read from the features, not from how
many visual tokens there are, how long their lines are, or how many of them show background. In the last ones pictures
share a prompt, and the question is how many objects they show together, which the share of visual tokens that show
objects does not tell; least of all in albums, where pictures differ in shape and some are blank. Every batch is drawn
from its own seed, so a run can be interrupted and resumed, and two runs on one machine agree.

Weight matrices between layers learn with Muon (arXiv 2502.16982), which takes far fewer steps here; everything else
with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtc.tiny.scenes import CANVAS, COUNTING, PATCH, PHRASES, WORDS, Scene

GRID = CANVAS // PATCH
PHRASE_NUMBER = {phrase: number for number, phrase in enumerate(PHRASES)}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
WORD_WEIGHT = 0.1  # of a word in a question or a caption, against 1 for an answer


class Alike(NamedTuple):
    """Pictures of a batch that can be stacked: how many, their width and height in pixels, and their content."""

    number: int
    size: tuple[int, int]
    zoom: float = 1.0
    blank: bool = False  # nothing but background


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one kind of data and one learning-rate cycle."""

    stage: str  # "vision" | "text" | "projector" | "language"
    size: int  # pixels
    steps: int
    batch: int
    lr: float  # the peak
    draws: int = 2  # in the language stages: rounds of questions about each scene
    mixed: str = ""  # "sizes" | "shapes" | "close-ups" | "zooms" | "albums": pictures vary, see `kinds_of`
    cycle: int | None = None  # steps of the learning-rate cycle, for a phase that ends before it
    pictures: int = 1  # up to so many share a prompt, which then asks how many objects they show together
    objects: int = 9  # at most, in all pictures of a prompt
    zoom: float = 1.0  # of "albums": some windows are zoomed up to so much
    counting: float = 1.0  # weight of the answer to "how many": it is asked once a picture, other things many times

    def kinds_of(self, step: int) -> list[Alike]:
        """The pictures of batch `step`."""
        width = height = self.size
        zoom = 1.0
        if self.mixed == "albums" and step % 4:
            rng = np.random.default_rng(step)
            canvas = self.size, self.size
            window, other, close = (
                (int(across) * PATCH, int(down) * PATCH)
                for across, down in rng.integers(70 // PATCH, self.size // PATCH + 1, (3, 2))
            )
            kinds = [
                (0.25, canvas, 1.0, False),
                (0.25, window, 1.0, False),
                (0.17, canvas, 1.0, True),
                (0.17, other, 1.0, True),
            ]
            if self.zoom > 1:
                kinds.append((0.25, close, float(rng.uniform(1, min(self.zoom, close[0] / 70, close[1] / 70))), False))
            return [
                Alike(max(1, round(share * self.batch * self.size / math.sqrt(w * h))), (w, h), zoom, blank)
                for share, (w, h), zoom, blank in kinds
            ]
        if self.mixed == "sizes":
            width = height = MIXED_SIZES[step % len(MIXED_SIZES)]
        elif self.mixed == "close-ups" and step % 3 == 1:
            zoom = (1.5, 2.0)[step % 2]
        elif self.mixed == "zooms" and step % 4:
            rng = np.random.default_rng(step)
            width, height = (int(side) * PATCH for side in rng.integers(112 // PATCH, self.size // PATCH + 1, 2))
            zoom = float(rng.uniform(1, min(3, width / 112, height / 112)))
        elif self.mixed in ("shapes", "close-ups") and step % 3:
            sides = np.random.default_rng(step).integers(70 // PATCH, self.size // PATCH + 1, 2)
            width, height = (int(side) * PATCH for side in sides)
        return [Alike(int(self.batch * self.size / math.sqrt(width * height)), (width, height), zoom)]

    def pictures_of(self, step: int) -> int:
        """Up to how many pictures share a prompt of batch `step`."""
        if self.mixed == "albums" and step % 4 == 0:
            return 1
        return 1 + int(np.random.default_rng(step).integers(self.pictures))


MIXED_SIZES = (112, 168, 224, 280, CANVAS)
RECIPE = (
    Phase("vision", 70, 1000, 64, 1e-3),
    Phase("vision", 112, 500, 48, 1e-3),
    Phase("vision", 224, 400, 16, 7e-4),
    Phase("vision", 336, 300, 12, 5e-4),
    Phase("text", 112, 100, 32, 1e-3),
    Phase("projector", 112, 60, 32, 1e-3),
    Phase("language", 112, 700, 32, 1e-3),
    Phase("language", 336, 400, 10, 1e-3, draws=3, mixed="sizes", cycle=1000),
    Phase("language", 336, 600, 10, 1e-3, draws=3, mixed="shapes", cycle=1100),
    Phase("language", 336, 200, 10, 7e-4, draws=3, mixed="close-ups", cycle=450),
    Phase("language", 336, 300, 10, 6e-4, draws=3, mixed="close-ups", counting=5.0),
    Phase("language", 336, 300, 10, 8e-4, draws=1, mixed="zooms", cycle=1000, counting=5.0),
    Phase("language", 336, 700, 12, 8e-4, draws=1, mixed="zooms", pictures=3, counting=5.0),
    Phase("language", 336, 600, 16, 8e-4, draws=1, mixed="albums", pictures=4, counting=5.0),
    Phase("language", 336, 100, 14, 7e-4, 1, "albums", cycle=400, pictures=4, objects=5, zoom=3.0, counting=5.0),
    Phase("language", 336, 60, 14, 2e-4, 1, "albums", pictures=4, objects=5, zoom=3.0, counting=5.0),
)
QUICK = tuple(replace(phase, steps=2, batch=2) for phase in RECIPE)  # exercises every line, learns nothing


# --- model and tokenizer -----------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; case does not matter; what it does not know becomes `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor() -> LlavaProcessor:
    """The stock processor: resize, crop, normalise, and one `<image>` per visual token."""
    side = {"height": CANVAS, "width": CANVAS}
    template = (
        "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n"
        "{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": CANVAS}, crop_size=side),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def build_model() -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 in miniature: 6-layer CLIP tower, 4-layer Llama, random weights."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=192,
        hidden_act="gelu_pytorch_tanh",
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 is for ten times the width
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID**2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    _start_well(model.model.vision_tower)
    return model


@torch.no_grad()
def _start_well(tower: CLIPVisionModel) -> None:
    """Initial values from which a small vision transformer learns quickly: only the start differs from stock CLIP.

    Positions start as 2-D sines; queries and keys start equal, so that every token first looks at tokens that resemble
    it (mimetic initialisation, arXiv 2305.09828).
    """
    width = tower.config.hidden_size
    frequencies = 1.5 * (1 / 24) ** (torch.arange(width // 4) / (width // 4 - 1))  # radians per patch
    angles = torch.arange(GRID)[:, None] * frequencies
    waves = 0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)  # [GRID, width / 2]
    rows, columns = waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)
    tower.embeddings.position_embedding.weight[1:] = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    for layer in tower.encoder.layers:
        attention: Any = layer.self_attn
        nn.init.normal_(attention.q_proj.weight, std=0.6 * width**-0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)


def encode(tower: CLIPVisionModel, pixels: Tensor, origins: Tensor) -> list[Tensor]:
    """Hidden states `[B, 1 + n, C]` before the first layer and after each, for windows on the canvas.

    `pixels` is `[B, 3, height, width]`, `origins` the windows' corners `[B, 2]` (x, y) in patches. For the whole canvas
    this is what `CLIPVisionModel.forward` computes.
    """
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    rows, columns = (torch.arange(side // PATCH) for side in pixels.shape[2:])
    window = (rows[:, None] * GRID + columns).flatten()  # [n]
    ids = 1 + origins[:, :1] + origins[:, 1:] * GRID + window  # [B, n]
    first = embeddings.class_embedding + embeddings.position_embedding.weight[0]
    hidden = torch.cat([first.expand(len(pixels), 1, -1), patches + embeddings.position_embedding(ids)], dim=1)
    states = [tower.pre_layrnorm(hidden)]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    return states


class PhraseContrast(nn.Module):
    """Cosine similarity of images and phrases; a phrase is the bag of its words, passed through a small network."""

    def __init__(self, tower: CLIPVisionModel, width: int = 192) -> None:
        super().__init__()
        self.tower = tower
        self.words = nn.EmbeddingBag(len(WORDS), width, mode="sum")
        self.phrase_head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.image_head = nn.Linear(tower.config.hidden_size, width)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        flat = [WORDS.index(word) for phrase in PHRASES for word in phrase.split()]
        lengths = [len(phrase.split()) for phrase in PHRASES]
        self.register_buffer("flat", torch.tensor(flat), persistent=False)
        self.register_buffer("offsets", torch.tensor([0, *np.cumsum(lengths)[:-1]]), persistent=False)

    def forward(self, pixels: Tensor, origins: Tensor) -> Tensor:
        """Logits `[B, len(PHRASES)]` of pictures `[B, 3, height, width]`."""
        pooled = self.tower.post_layernorm(encode(self.tower, pixels, origins)[-1][:, 0])
        images = F.normalize(self.image_head(pooled), dim=-1)
        phrases = F.normalize(self.phrase_head(self.words(self.flat, self.offsets)), dim=-1)
        return self.log_scale.exp() * images @ phrases.T + self.bias


# --- data --------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Pictures with true phrases (vision stage) or packed questions (other stages); what a stage needs not is empty."""

    pixels: list[Tensor]  # of each kind, [S, 3, height, width] fp32
    origins: list[Tensor]  # of each kind, [S, 2] int64, in patches
    order: list[int]  # in which the pictures of all kinds follow each other in the prompts
    phrases: Tensor  # [S, P] fp32, 1 where the phrase is true
    tokens: Tensor  # [B, T] int64, `<image>` where a visual token goes
    segments: Tensor  # [B, T]: 0 for the part every question sees, 1.. for each question, -1 for padding
    targets: Tensor  # [B, T] int64, the next token
    weights: Tensor  # [B, T] fp32, how much the target counts; 0 where there is none


class Scenes(Dataset):
    """Item i is batch i of the phase: no scene is seen twice."""

    def __init__(self, phase: Phase, first: int) -> None:
        self.phase, self.first = phase, first
        self.tokenizer = build_tokenizer()

    def __len__(self) -> int:
        return self.phase.steps

    def __getitem__(self, step: int) -> Batch:
        start = self.first + step * self.phase.batch
        scenes: list[Scene] = []
        pixels, origins = [], []
        for number, size, zoom, blank in self.phase.kinds_of(step):
            alike = [Scene("train", start + len(scenes) + i, size, zoom, blank) for i in range(number)]
            if self.phase.stage != "text":
                stacked = np.stack([np.asarray(scene.image, np.float32) for scene in alike])
                stacked = ((stacked / 255 - MEAN) / STD).astype(np.float32)
                pixels.append(torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous())
                origins.append(torch.tensor([scene.origin for scene in alike]) // PATCH)
            scenes += alike
        order = list(range(len(scenes)))
        if len(pixels) > 1:
            order = np.random.default_rng(step).permutation(order).tolist()
        truth = torch.zeros(0)
        rows: list[tuple[Tensor, ...]] = [(torch.zeros(0),) * 4]
        if self.phase.stage == "vision":
            truth = torch.zeros(len(scenes), len(PHRASES))
            for row, scene in zip(truth, scenes, strict=True):
                row[[PHRASE_NUMBER[phrase] for phrase in scene.phrases]] = 1
        else:
            rows = [self._pack(group) for group in self._grouped([scenes[i] for i in order], step)]
        packed = (
            nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True, padding_value=value)
            for i, value in enumerate((0, -1, 0, 0))
        )
        return Batch(pixels, origins, order, truth, *packed)

    def _grouped(self, scenes: list[Scene], step: int) -> list[list[Scene]]:
        """The scenes of each prompt: as many in all of the batch, but where these are too many objects or tokens."""
        most = self.phase.pictures_of(step)
        groups: list[list[Scene]] = []
        for scene in scenes:
            more = [*groups[-1], scene] if groups else []
            objects, area = sum(len(s.objects) for s in more), sum(s.width * s.height for s in more)
            if 0 < len(more) <= most and objects <= self.phase.objects and area <= 3 * CANVAS**2:
                groups[-1].append(scene)
            else:
                groups.append([scene])
        return groups

    def _pack(self, scenes: list[Scene]) -> tuple[Tensor, ...]:
        """Many questions about the same pictures in one row; each sees them and itself, as if asked alone."""
        scene = scenes[0]

        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False).input_ids

        if self.phase.stage == "text":
            shown = ids(scene.caption)
        else:
            shown = [SPECIAL.index("<image>")] * sum(s.width * s.height // PATCH**2 for s in scenes)
        tokens = [SPECIAL.index("<s>"), *ids("USER:"), *shown]
        segments, targets, weights = [0] * len(tokens), [0] * len(tokens), [0.0] * len(tokens)
        asked = [question for draw in range(self.phase.draws) for question in scene.ask(draw)]
        weight = {"counting": self.phase.counting}
        said = [(f"{q.text} ASSISTANT:", q.answer, weight.get(q.family, 1.0)) for q in dict.fromkeys(asked)]
        if len(scenes) > 1:
            said = [(f"{COUNTING} ASSISTANT:", str(sum(len(s.objects) for s in scenes)), self.phase.counting)]
        if self.phase.stage == "projector":
            said = []
        if self.phase.stage != "text" and len(scenes) == 1 and scene.caption:
            said.append((scene.caption, "", 1.0))
        for number, (before, answer, counts) in enumerate(said, start=1):
            asking, reply = ids(before), [*ids(answer), SPECIAL.index("</s>")]
            tokens += asking + reply
            segments += [number] * (len(asking) + len(reply))
            # A position's target is the token after it.
            targets += [*asking[1:], *reply, 0]
            weights += [WORD_WEIGHT] * (len(asking) - 1) + [counts] * len(reply) + [0.0]
        return torch.tensor(tokens), torch.tensor(segments), torch.tensor(targets), torch.tensor(weights)


def attention_of(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Which token sees which, `[B, 1, T, T]` bool, and positions `[B, T]`, from `segments` `[B, T]`."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    shown = segments[:, None, :] == 0
    same = segments[:, None, :] == segments[:, :, None]
    allowed = causal & (shown | same)
    # The number of tokens it sees, less one, is a token's position in its own conversation.
    return allowed[:, None], allowed.sum(-1) - 1


# --- training ----------------------------------------------------------------------------------------------------


def vision_loss(contrast: PhraseContrast, batch: Batch) -> tuple[Tensor, float]:
    """Sigmoid loss summed over phrases; the figure beside it is how many true phrases rank among the top ones."""
    logits = contrast(batch.pixels[0], batch.origins[0]).float()
    loss = F.binary_cross_entropy_with_logits(logits, batch.phrases, reduction="sum") / len(logits)
    hit = ((logits > 0) & (batch.phrases > 0)).sum() / batch.phrases.sum()
    return loss, hit.item()


@torch.no_grad()
def features(tower: CLIPVisionModel, batch: Batch) -> Tensor:
    """What the tower says of every visual token, `[V, C]`, as they follow each other in the prompts of the batch."""
    seen: list[Tensor] = []  # one a picture, [n, C]
    for pixels, origins in zip(batch.pixels, batch.origins, strict=True):
        seen += encode(tower, pixels, origins)[-2][:, 1:]
    return torch.cat([seen[i] for i in batch.order])


def language_loss(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, float]:
    """Weighted cross-entropy; the figure beside it is the share of the answers' tokens that are right."""
    embeds = model.get_input_embeddings()(batch.tokens)
    if batch.pixels:
        visual = model.model.multi_modal_projector(features(model.model.vision_tower, batch))
        where = (batch.tokens == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, visual.to(embeds.dtype))
    allowed, positions = attention_of(batch.segments)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=allowed, position_ids=positions, use_cache=False
    ).last_hidden_state
    learnt = batch.weights > 0
    targets, weights = batch.targets[learnt], batch.weights[learnt]
    logits = model.lm_head(hidden[learnt]).float()
    loss = (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / weights.sum()
    right = (logits.argmax(-1) == targets)[weights >= 1].float().mean().item()
    return loss, right


def trainable(stage: str, contrast: PhraseContrast, model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Freeze everything but what this stage learns; return that by name."""
    learns: dict[str, list[nn.Module]] = {
        "vision": [contrast],
        "text": [model.model.language_model, model.lm_head],
        "projector": [model.model.multi_modal_projector],
        "language": [model.model.multi_modal_projector, model.model.language_model, model.lm_head],
    }
    everything = nn.ModuleDict({"contrast": contrast, "model": model})
    everything.requires_grad_(False)
    for module in learns[stage]:
        module.requires_grad_(True)
    return {name: p for name, p in everything.named_parameters() if p.requires_grad}


def optimizers_of(parameters: dict[str, nn.Parameter], lr: float) -> dict[torch.optim.Optimizer, float]:
    """Muon for the matrices between layers and AdamW for the rest, each with its peak learning rate."""
    hidden = [p for name, p in parameters.items() if p.ndim == 2 and (".layers." in name or "projector" in name)]
    rest = [p for p in parameters.values() if all(p is not matrix for matrix in hidden)]
    return {
        torch.optim.Muon(hidden, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"): lr,
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.02): lr / 2,
    }


def train(
    out: Path,
    recipe: tuple[Phase, ...] = RECIPE,
    seed: int = 0,
    minutes: float | None = None,
    start: Path | None = None,
) -> bool:
    """Run the recipe; False if time ran out before the end.

    Resumes from `out/state.pt` where that exists; or else begins with the checkpoint in `start`, if given, and skips
    the phases that made it, which must be the first ones of the recipe.
    """
    torch.manual_seed(seed)
    model = build_model()
    contrast = PhraseContrast(model.model.vision_tower)
    out.mkdir(parents=True, exist_ok=True)
    state_file, begun = out / "state.pt", time.time()
    at_phase, at_step, spent = 0, 0, 0.0
    optimizer_states: list[dict[str, Any]] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        contrast.load_state_dict(state["contrast"])
        at_phase, at_step, optimizer_states = state["phase"], state["step"], state["optimizers"]
        spent = state["seconds"]
    elif start:
        at_phase, spent = _load_checkpoint(model, start, recipe)
    for number in range(at_phase, len(recipe)):
        phase = recipe[number]
        parameters = trainable(phase.stage, contrast, model)
        optimizers = optimizers_of(parameters, phase.lr)
        for optimizer, state in zip(optimizers, optimizer_states, strict=False):
            optimizer.load_state_dict(state)
        optimizer_states = []

        def save(phase_number: int, step: int, states: list[dict[str, Any]]) -> None:
            snapshot: dict[str, Any] = dict(model=model.state_dict(), contrast=contrast.state_dict(), optimizers=states)
            snapshot |= dict(phase=phase_number, step=step, seconds=spent + time.time() - begun)
            torch.save(snapshot, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)

        figures = np.zeros(3)
        for step, batch in _batches(recipe, number, at_step):
            for optimizer, peak in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = peak * _cycle(step / (phase.cycle or phase.steps))
                optimizer.zero_grad()
            # Faster where the processor has bf16 instructions, far slower where it has not.
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False)):
                loss, right = vision_loss(contrast, batch) if phase.stage == "vision" else language_loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            figures += (loss.item(), right, 1)
            if (step + 1) % 25 == 0 or step + 1 == phase.steps:
                mean, rate = figures[:2] / figures[2], spent + time.time() - begun
                print(
                    f"{phase.stage:>9} {phase.size} step {step + 1:>5}/{phase.steps} "
                    f"loss {mean[0]:.3f} right {mean[1]:.3f} {rate / 60:6.1f} min",
                    flush=True,
                )
                figures[:] = 0
            out_of_time = minutes is not None and time.time() - begun > 60 * minutes
            if (step + 1) % 100 == 0 or out_of_time:
                save(number, step + 1, [optimizer.state_dict() for optimizer in optimizers])
            if out_of_time:
                return False
        at_step = 0
        save(number + 1, 0, [])
    _export(model, out, recipe, seed, spent + time.time() - begun)
    return True


def _load_checkpoint(model: LlavaForConditionalGeneration, start: Path, recipe: tuple[Phase, ...]) -> tuple[int, float]:
    """Load the weights of `start`; return how many phases of the recipe it has behind it, and the seconds they took."""
    made = json.loads((start / "training.json").read_text())
    count = len(made["recipe"])
    if made["recipe"] != [asdict(phase) for phase in recipe[:count]]:
        raise ValueError(
            f"{start} was not made by the first {count} phases of this recipe; append new phases to its own"
        )
    if any(phase.stage == "vision" for phase in recipe[count:]):
        raise ValueError("a checkpoint has no phrases to contrast images with: the vision stage cannot go on from one")
    model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict())
    return count, 60 * made["minutes"]


def _cycle(progress: float) -> float:
    """Linear warm-up over the first 5 %, then half a cosine down to 2 %."""
    if progress < 0.05:
        return progress / 0.05 + 1e-3
    return 0.02 + 0.98 * (0.5 + 0.5 * float(np.cos(np.pi * (progress - 0.05) / 0.95)))


def _batches(recipe: tuple[Phase, ...], number: int, start: int) -> Iterator[tuple[int, Batch]]:
    """The phase's batches from `start` on, made in a worker process."""
    phase = recipe[number]
    first = sum(p.steps * p.batch for p in recipe[:number])
    scenes = Scenes(phase, first)
    todo = range(start, phase.steps)
    loader = DataLoader(scenes, batch_size=None, sampler=todo, num_workers=1, prefetch_factor=4)
    return zip(todo, loader, strict=True)


def _export(
    model: LlavaForConditionalGeneration, out: Path, recipe: tuple[Phase, ...], seed: int, spent: float
) -> None:
    """Write `out/checkpoint` as stock transformers reads it, fp16, with the recipe that made it."""
    target = out / "checkpoint"
    model.half().save_pretrained(target)
    build_processor().save_pretrained(target)
    made = {"seed": seed, "minutes": round(spent / 60, 1), "torch": torch.__version__}
    made |= {"recipe": [asdict(phase) for phase in recipe]}
    (target / "training.json").write_text(json.dumps(made, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model from nothing; resumes where it left off.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the state, and the checkpoint at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so long; the next run resumes")
    parser.add_argument("--quick", action="store_true", help="two steps a phase: does it run at all?")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, made by the recipe's first phases")
    chosen = parser.parse_args()
    finished = train(chosen.out, QUICK if chosen.quick else RECIPE, chosen.seed, chosen.minutes, chosen.start)
    print(f"checkpoint in {chosen.out / 'checkpoint'}" if finished else "stopped; run again to resume")


if __name__ == "__main__":
    main()

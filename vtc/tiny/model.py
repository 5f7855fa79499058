"""The bundled model before training: tokenizer, processor, a LLaVA with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
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

from vtc.tiny.scenes import CANVAS, PATCH, PHRASES, WORDS

GRID = CANVAS // PATCH
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, lower case; unknown words become `<unk>`."""
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
    init_weights(model.model.vision_tower)
    return model


@torch.no_grad()
def init_weights(tower: CLIPVisionModel) -> None:
    """Initial values with which a small vision transformer learns quickly; everything else is stock CLIP.

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
        """Logits `[B, len(PHRASES)]` of images `[B, 3, height, width]`."""
        pooled = self.tower.post_layernorm(encode(self.tower, pixels, origins)[-1][:, 0])
        images = F.normalize(self.image_head(pooled), dim=-1)
        phrases = F.normalize(self.phrase_head(self.words(self.flat, self.offsets)), dim=-1)
        return self.log_scale.exp() * images @ phrases.T + self.bias

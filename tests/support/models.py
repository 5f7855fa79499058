"""Small random LLaVAs whose every part matters, and prompts for them."""

import torch
import transformers as t
from transformers import LlavaForConditionalGeneration

IMAGE, PAD, BOS, EOS = 3, 0, 1, 2
VOCAB = 97
GRID = 6
TOKENS = GRID * GRID  # N


VIDEO = 4  # placeholder of a video, where the model has them
REGISTERS = 2
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "image_size": 14 * GRID, "patch_size": 14}
TOWERS = {
    "clip_vision_model": lambda **kw: t.CLIPVisionConfig(intermediate_size=96, **kw),
    "dinov2": lambda **kw: t.Dinov2Config(mlp_ratio=2, **kw),
    "dinov2_with_registers": lambda **kw: t.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=REGISTERS, **kw),
    "vit": lambda **kw: t.ViTConfig(intermediate_size=96, **kw),
    "siglip_vision_model": lambda **kw: t.SiglipVisionConfig(intermediate_size=96, **kw),
}
PINPOINTS = [[14 * GRID * rows, 14 * GRID * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1))]
FAMILIES = {
    "llava": (t.LlavaConfig, t.LlavaForConditionalGeneration, {"image_token_id": IMAGE}),
    "vipllava": (
        t.VipLlavaConfig,
        t.VipLlavaForConditionalGeneration,
        {
            "image_token_index": IMAGE,
            "vision_feature_layer": [-2, -4, 2],
        },
    ),
    "llava_next": (
        t.LlavaNextConfig,
        t.LlavaNextForConditionalGeneration,
        {"image_token_index": IMAGE, "image_grid_pinpoints": PINPOINTS},
    ),
    "llava_next_video": (
        t.LlavaNextVideoConfig,
        t.LlavaNextVideoForConditionalGeneration,
        {"image_token_index": IMAGE, "video_token_index": VIDEO, "image_grid_pinpoints": PINPOINTS},
    ),
}


def build(
    layers: int = 6,
    seed: int = 0,
    family: str = "llava",
    tower: str = "clip_vision_model",
    text: type = t.LlamaConfig,
    text_layers: int = 2,
    **overrides,
) -> LlavaForConditionalGeneration:
    """Return a float32 LLaVA in eval mode: CLIP tower of `layers` layers, 84 px in 6 x 6 patches; Llama.

    Or one of another `family` or with another `tower`. Freshly initialised weights give nearly uniform attention, so
    that neither the selection nor the positions would matter. Here query and key weights are large: attention is
    peaked, outputs depend on every position. Still larger ones would amplify rounding to more than the golden path's
    tolerance.
    """
    make_config, make_model, fixed = FAMILIES[family]
    config = make_config(
        vision_config=TOWERS[tower](num_hidden_layers=layers, **SMALL),
        text_config=text(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        **fixed | overrides,
    )
    torch.manual_seed(seed)
    model = make_model._from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
            else:
                peaked = 2.0 if any(part in name for part in ("q_proj", "k_proj", "query", "key")) else 1.2
                fan_in = weight[0].numel() if "embed" not in name or "projection" in name else 1
                weight.copy_(torch.randn(weight.shape, generator=generator) * peaked * fan_in**-0.5)
    model.generation_config.eos_token_id = None  # random models must not stop early
    model.generation_config.pad_token_id = PAD
    return model


def image_features(output) -> torch.Tensor:
    """The projected features `[tokens, D]` that a forward pass used, of all images; transformers renamed the field."""
    if hasattr(output, "image_outputs"):
        return torch.cat(list(output.image_outputs.pooler_output))
    return output.image_hidden_states.flatten(0, -2)


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Return pixel_values `[count, 3, 84, 84]`, smooth enough that patches differ from each other."""
    generator = torch.Generator().manual_seed(1000 + seed)
    coarse = torch.randn(count, 3, GRID, GRID, generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=14) + 0.3 * torch.randn(
        count, 3, 14 * GRID, 14 * GRID, generator=generator
    )


def ids(*parts: int | str, seed: int = 0) -> list[int]:
    """Build a prompt: an int is that many random text tokens, "image" is one image's placeholders."""
    generator = torch.Generator().manual_seed(2000 + seed)
    row = [BOS]
    for part in parts:
        row += [IMAGE] * TOKENS if part == "image" else torch.randint(4, VOCAB, (part,), generator=generator).tolist()
    return row


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-pad rows to `input_ids` and `attention_mask`, both `[B, L]`."""
    length = max(map(len, rows))
    padded = [[PAD] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

"""Small random LLaVAs on disk, with processors, which vLLM and transformers load.

    python checkpoints.py FOLDER NAME...

saves those of `MODELS`. vLLM changes classes of transformers in its process, so `saved` asks the Python of VTC_PYTHON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).parent.parent
SIDE, PATCH = 84, 14
TOKENS = (SIDE // PATCH) ** 2  # of a view
IMAGE = 4  # the placeholder of the bundled tokenizer
# The arguments of `support.models.build`.
MODELS = {
    "clip": {},
    "dinov2": {"tower": "dinov2"},
    "registers": {"tower": "dinov2_with_registers"},
    "vit": {"tower": "vit"},
    "siglip": {"tower": "siglip_vision_model", "vision_feature_select_strategy": "full"},
    "vipllava": {"family": "vipllava"},
    "next": {"family": "llava_next"},
    "next-siglip-layers": {  # as Granite Vision
        "family": "llava_next",
        "tower": "siglip_vision_model",
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-4, -2],
    },
}


def saved(folder: Path, names: Iterable[str] = MODELS) -> dict[str, Path]:
    """Save models into folders of these names, and return the folders."""
    command = [os.environ["VTC_PYTHON"], __file__, str(folder), *names]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(command, env=environment, check=True)
    return {name: folder / name for name in names}


def draw(path: Path, size: tuple[int, int], seed: int) -> str:
    """Save an image of `size` (width, height) whose patches differ, and return its path."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def pil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines read images as the reference does, which may lack torchvision: that one picks other pixels."""
    monkeypatch.setattr("transformers.models.auto.image_processing_auto.is_torchvision_available", lambda: False)


def _save(folder: Path, name: str) -> None:
    import torch
    import transformers as t
    from support import models

    from vtc import tiny

    given = MODELS[name]
    family = given.get("family", "llava")

    def text(**own):  # attention of vLLM on CPUs takes heads of 32, not of 16
        return t.LlamaConfig(**{**own, "head_dim": 32, "max_position_embeddings": 1024})

    token = "image_token_id" if family == "llava" else "image_token_index"
    model = models.build(text=text, **given, **{token: IMAGE})
    with torch.no_grad():  # the tokenizer has fewer words than the model, and answers hold no special one
        model.lm_head.weight[len(t.AutoTokenizer.from_pretrained(tiny.CHECKPOINT)) :] = 0
        model.lm_head.weight[[IMAGE, models.PAD, models.EOS]] = 0
    if "siglip" in name:  # as LLaVAs have it; the head runs not in vLLM's Transformers backend
        model.model.vision_tower.head = None
        model.config.vision_config.vision_use_head = False
    model.save_pretrained(folder / name)
    if family == "vipllava":  # the name on the Hub, which all versions of transformers read
        path = folder / name / "config.json"
        path.write_text(path.read_text().replace('"vision_feature_layer"', '"vision_feature_layers"'))
    t.GenerationConfig(pad_token_id=models.PAD).save_pretrained(folder / name)
    _processor(name, model.config).save_pretrained(folder / name)


def _processor(name, config):
    import transformers as t

    from vtc import tiny

    strategy = getattr(config, "vision_feature_select_strategy", "default")
    arguments = {
        "tokenizer": t.AutoTokenizer.from_pretrained(tiny.CHECKPOINT),
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": (strategy == "default")
        + getattr(config.vision_config, "num_register_tokens", 0),
        "image_token": "<image>",
    }
    # Nearest pixels: versions of Pillow round the others in different ways.
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 0}
    if config.model_type == "llava_next":
        pinpoints = config.image_grid_pinpoints
        return t.LlavaNextProcessor(t.LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **size), **arguments)
    return t.LlavaProcessor(t.CLIPImageProcessor(**size), **arguments)


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    for each in sys.argv[2:]:
        _save(Path(sys.argv[1]), each)

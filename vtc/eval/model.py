"""Load a LLaVA model and its processor; where it runs, and in which dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vtc import tiny
from vtc.hf.families import FAMILIES

BUNDLED = "bundled"
DTYPES = ("auto", "float32", "float16", "bfloat16")


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default the first GPU if there is one. Raises ValueError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here; try cpu, cuda or cuda:0") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is float16 on a GPU and float32 on a CPU."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return getattr(torch, name)


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it runs. It can be sent to another process, which loads it.

    Attributes
    ----------
    model : str
        A folder, a hub id, or "bundled".
    device, dtype : str
        As on the command line, resolved: "cuda:0", "float16".
    revision : str, optional
        Of the hub.
    attn_implementation : str, optional
        Of transformers; by default its own choice.
    """

    model: str = BUNDLED
    device: str = "cpu"
    dtype: str = "float32"
    revision: str | None = None
    attn_implementation: str | None = None

    @property
    def source(self) -> str:
        """The folder or the hub id."""
        return str(tiny.CHECKPOINT if self.model == BUNDLED else Path(self.model).expanduser())

    def config(self) -> Any:
        """The model's config. Raises ValueError if there is no such model, or VTC does not support it."""
        if self.model.startswith((".", "/", "~")) and not Path(self.source).is_dir():
            raise ValueError(f"model {self.model!r} is no directory; pass a model directory or a hub id")
        with _load_errors(self.model):
            config = AutoConfig.from_pretrained(self.source, revision=self.revision)
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"model {self.model!r} is of type {config.model_type!r}; VTC supports {', '.join(FAMILIES)}"
            )
        return config

    def processor(self) -> Any:
        """The model's processor. Raises ValueError if it has none for images.

        Images are prepared by Pillow, as for the published figures: torchvision, where it is installed, rounds
        differently.
        """
        config = self.config()
        with _load_errors(self.model):
            processor = AutoProcessor.from_pretrained(self.source, revision=self.revision, backend="pil")
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"model {self.model!r} comes without an image processor; add its preprocessor_config.json")
        if processor.patch_size is None:  # processors saved before transformers 4.46 leave these three to the model
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            processor.num_additional_image_tokens = 1
        return processor

    def load(self) -> Any:
        """The model in evaluation mode. Raises ValueError if it cannot be loaded."""
        self.config()
        with _load_errors(self.model):
            model = AutoModelForImageTextToText.from_pretrained(
                self.source,
                revision=self.revision,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attn_implementation,
            )
        return model.eval().to(self.device)


@contextlib.contextmanager
def _load_errors(model: str) -> Iterator[None]:
    """Errors of loading become a ValueError in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model {model!r} cannot be loaded: {str(error).splitlines()[0]}") from error

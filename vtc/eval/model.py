"""Load a LLaVA model and its processor; where it runs, and in which dtype."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from vtc import tiny
from vtc.eval import BUNDLED, checkpoint

DTYPES = ("auto", "float32", "float16", "bfloat16")
_log = logging.getLogger("vtc")


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default the first GPU if there is one. Raises ValueError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, but they hold no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        raise ValueError(f"device {name!r} cannot be used here; use {' or '.join(['cpu', *gpus])}") from error
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
        if "://" in self.model:
            raise ValueError(f"model {self.model!r} is a URL; pass its id alone, such as llava-hf/llava-1.5-7b-hf")
        if self.revision is not None and Path(self.source).is_dir():
            raise ValueError(f"got revision {self.revision!r}, but model {self.model!r} is a folder, which has none")
        if self.model.startswith((".", "/", "~")) and not Path(self.source).is_dir():
            raise ValueError(f"model {self.model!r} is no directory; pass a model directory or a hub id")
        with checkpoint.loading(self.model, "config"):
            raw, _ = PreTrainedConfig.get_config_dict(self.source, revision=self.revision)
        checkpoint.require_type(self.model, raw)
        with checkpoint.loading(self.model, "config"):
            config = AutoConfig.from_pretrained(self.source, revision=self.revision, trust_remote_code=False)
            vision = config.vision_config
            if not 0 < vision.patch_size <= vision.image_size:
                raise ValueError(f"patch_size is {vision.patch_size}, image_size {vision.image_size}")
            return config

    def processor(self) -> Any:
        """The model's processor. Raises ValueError if it has none for images.

        Images are prepared by Pillow, as for the published figures: torchvision, where it is installed, rounds
        differently.
        """
        config = self.config()
        checkpoint.require_files(self.model, self.source, checkpoint.TOKENIZERS, "a tokenizer")
        checkpoint.require_files(self.model, self.source, checkpoint.PROCESSORS, "an image processor")
        with checkpoint.loading(self.model, "processor"):
            processor = AutoProcessor.from_pretrained(
                self.source, revision=self.revision, backend="pil", trust_remote_code=False
            )
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"model {self.model!r} comes without an image processor; add its preprocessor_config.json")
        if not hasattr(processor, "patch_size"):
            raise ValueError(f"the processor of model {self.model!r} is a {type(processor).__name__}, not a LLaVA's")
        if processor.patch_size is None:  # processors saved before transformers 4.46 leave these three to the model
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            processor.num_additional_image_tokens = 1
        return processor

    def load(self) -> Any:
        """The model in evaluation mode. Its own code is never run.

        Raises
        ------
        ValueError
            If it cannot be loaded, its weights are pickled, missing, unexpected or of another shape, or one of them is
            NaN or infinite.
        """
        config = self.config()
        if getattr(config, "auto_map", None):
            _log.warning("model %r brings code of its own. It is not run; transformers' own class is used", self.model)
        checkpoint.require_json(self.model, self.source, "generation_config.json")
        checkpoint.require_safetensors(
            self.model, self.source, getattr(config, "quantization_config", None) is not None
        )
        with checkpoint.loading(self.model, "weights"):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                self.source,
                revision=self.revision,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attn_implementation,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are among `info`
                output_loading_info=True,
            )
            model, info = loaded
            model = model.eval().to(self.device)
        checkpoint.require_weights(self.model, info)
        checkpoint.require_finite(self.model, model)
        checkpoint.require_ends(self.model, model.generation_config)
        return model

"""The bundled model: a LLaVA small enough to ship, trained from nothing on `vtc.tiny.scenes`.

`scenes` makes images with known content, `train` makes the model from `recipe`, `checkpoint/` is the trained model. Its
model card is `checkpoint/README.md`; `vtc eval scenes` measures its accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtc.tiny import scenes as scenes

CHECKPOINT = Path(__file__).parent / "checkpoint"


def load(**kwargs: Any) -> tuple[Any, Any]:
    """The bundled model and its processor, loaded by stock transformers.

    Parameters
    ----------
    **kwargs
        Passed to `LlavaForConditionalGeneration.from_pretrained`, for instance `attn_implementation="vtc"`.

    Returns
    -------
    tuple of LlavaForConditionalGeneration and LlavaProcessor
        The model in evaluation mode, fp32 unless `dtype` says otherwise.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, **{"dtype": torch.float32, **kwargs})
    return model.eval(), AutoProcessor.from_pretrained(CHECKPOINT)


def prompt(question: str) -> str:
    """The prompt the model was trained with, which is LLaVA-1.5's."""
    return f"USER: <image>\n{question} ASSISTANT:"

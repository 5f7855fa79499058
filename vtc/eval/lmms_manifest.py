"""What lmms-eval loads to know the model `vtc_llava`: names only, so that it cannot fail and takes no time."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The names of the classes, which lmms-eval imports when the model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vtc_llava",
        simple_class_path="vtc.eval.lmms.VTCLlava",
        chat_class_path="vtc.eval.lmms.VTCLlavaChat",
    )

"""What differs between versions of transformers, and the supported versions. No other module knows a version."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

OLDEST, NEWEST = "5.23", "5.24"  # minor versions: the first that VTC works with, the last that it was tested with
CACHE_WORDS = ("cache", "past_key_values")  # since 5.24, and before

# The KV cache among the arguments of forward(), generate(), a layer and create_causal_mask, and among the outputs.
CACHE = next(word for word in CACHE_WORDS if word in inspect.signature(create_causal_mask).parameters)

_log = logging.getLogger("vtc")


def read_call(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with the KV cache under the one word "cache", whichever word the caller used.

    Raises
    ------
    ValueError
        If both words are given.
    """
    given = {word: call[word] for word in CACHE_WORDS if call.get(word) is not None}
    if len(given) > 1:
        raise ValueError("got both cache and past_key_values, two names of one argument; pass one of them")
    renamed = {name: value for name, value in call.items() if name not in CACHE_WORDS}
    if given:
        (renamed["cache"],) = given.values()
    return renamed


def stock_call(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `read_call` under the names of the installed transformers."""
    return {CACHE if name == "cache" else name: value for name, value in call.items()}


def cache_of(outputs: Any) -> Any:
    """The KV cache in the outputs of a model or of `generate()`, also in a tuple; None if there is none."""
    if isinstance(outputs, tuple):
        return next((each for each in outputs if isinstance(each, Cache)), None)
    return getattr(outputs, CACHE, None)


def note_images(outputs: Any, modality: str, encoded: Any, features: torch.Tensor) -> None:
    """Set what a stock `forward()` notes of its images in its `outputs`: since 5.24 the encoder's, before the features.

    `features` are those of all images of the `modality`, as the language model got them.
    """
    word = f"{modality}_outputs"
    if hasattr(outputs, word):
        outputs[word] = encoded
    else:
        outputs[f"{modality}_hidden_states"] = features


def let_record(model: Any) -> None:
    """Let `model` return hidden states in a process that unpickled it.

    transformers remembers what a class can return when an instance is built, and unpickling builds none.
    """
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as known

    if not known.get(model):
        for module in model.modules():
            if hasattr(module, "_can_record_outputs"):
                known[module] = module._can_record_outputs


def is_supported() -> bool:
    """Whether the installed transformers is new enough for models; the rest of VTC works with older ones, too."""
    return Version(transformers.__version__).release[:2] >= Version(OLDEST).release


# Whether a list as `output_hidden_states` names the states to return, the first layer's input as 0. With an older
# transformers it counts without that one, so a model is asked for all states.
SELECTS_STATES = is_supported()


def require_supported() -> None:
    """Raise ValueError if the installed transformers is too old for models."""
    if not is_supported():
        raise ValueError(
            f"VTC compresses models of transformers {OLDEST} or newer, and this is {transformers.__version__}, where "
            f"answers would be wrong; use pip install 'transformers>={OLDEST}' (vtc.ops and vtc.methods still work)"
        )


@functools.cache
def warn_if_untested() -> None:
    """Log one warning if the installed transformers is newer than the newest tested one."""
    if Version(transformers.__version__).release[:2] > Version(NEWEST).release:
        _log.warning(
            "transformers %s is newer than %s, the newest that VTC was tested with; compare answers with and without "
            "VTC, or use an older transformers",
            transformers.__version__,
            NEWEST,
        )

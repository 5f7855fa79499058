"""What a checkpoint must be: transformers' own format, complete, finite, without code. Each check is a ValueError."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from vtc.eval.memory import is_out_of_memory
from vtc.hf.families import FAMILIES, type_refusal
from vtc.hf.unsupported import UNSUPPORTED, format_refusal

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# What transformers raises for files that it cannot read, or that do not fit together.
_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)


@contextlib.contextmanager
def loading(model: str, part: str) -> Iterator[None]:
    """Errors while `part` of `model` is loaded become a ValueError of one line that names both.

    A full memory says nothing about the checkpoint: its error is raised as it is.
    """
    try:
        yield
    except _ERRORS as error:
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            why = "it brings code of its own, which VTC never runs; use a checkpoint of transformers' own classes"
        elif "use_safetensors" in text:
            why = _PICKLED
        else:
            if isinstance(error, json.JSONDecodeError):
                text = f"a JSON file of it is damaged ({text})"
            short = text if len(text) <= 300 else f"{text[:300]} ..."
            why = short if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {short}"
        raise ValueError(f"the {part} of model {model!r} cannot be loaded: {why}") from error


_PICKLED = (
    "it has no safetensors, and pickled weights (pytorch_model.bin) can run code when they are read; convert them with "
    "from_pretrained and save_pretrained of transformers, where you trust them"
)


def require_type(model: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError if `config`, what is in its config.json, is not that of a LLaVA in transformers' format."""
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"the config.json of model {model!r} names no model_type; VTC needs that of a LLaVA")
    kind = config["model_type"]
    refusal = None if kind in UNSUPPORTED else format_refusal(model, config)
    if refusal := refusal or type_refusal(kind):
        code = (
            "" if kind in FAMILIES or "auto_map" not in config else "; it brings code of its own, which VTC never runs"
        )
        raise ValueError(f"model {model!r} {refusal}{code}")
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in ("_attn_implementation", "attn_implementation"):
            if "/" in str(part.get(name)):
                raise ValueError(
                    f"model {model!r} asks for the attention {part[name]!r}, whose code would be downloaded; VTC never "
                    f"runs such code: take {name} out of its config.json"
                )


def require_files(model: str, source: str, names: tuple[str, ...], what: str) -> None:
    """Raise ValueError if `source` is a folder and has none of the files `names`, which hold `what`."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise ValueError(f"model {model!r} comes without {what}; add its {names[0]}")


def require_json(model: str, source: str, name: str) -> None:
    """Raise ValueError if `source` is a folder whose file `name` is no JSON object: transformers ignores some such."""
    file = Path(source) / name
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"the {name} of model {model!r} is damaged ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"the {name} of model {model!r} holds no JSON object; download it again")


def require_safetensors(model: str, source: str, quantised: bool) -> None:
    """Raise ValueError if `source` is a folder that has pickled weights and no others, or integers without a meaning.

    Parameters
    ----------
    quantised : bool
        Whether its config says what integer weights mean.
    """
    folder = Path(source)
    pickled = [file.name for end in ("bin", "pt", "pth") for file in folder.glob(f"*.{end}")]
    if pickled and not any(folder.glob("*.safetensors*")):
        raise ValueError(f"the weights of model {model!r} cannot be loaded: {_PICKLED}")
    if quantised:
        return
    for file in folder.glob("*.safetensors"):
        with loading(model, "weights"), safe_open(file, framework="pt") as weights:
            kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118, it is no dict
        if odd := {
            name for name, kind in kinds.items() if kind[0] != "F" and kind != "BF16" and "position_ids" not in name
        }:
            raise ValueError(
                f"{len(odd)} of the weights of model {model!r} are of type {kinds[min(odd)]} ({_first(odd)}), and its "
                "config.json has no quantization_config that says what they mean"
            )


def require_weights(model: str, info: Mapping[str, Any]) -> None:
    """Raise ValueError if weights are missing, unexpected, or of another shape. `info`: transformers' loading info."""
    mismatched = {
        f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in info.get("mismatched_keys", ())
    }
    problems = {
        "missing": set(info.get("missing_keys", ())),
        "unexpected": set(info.get("unexpected_keys", ())),
        "of another shape": mismatched,
    }
    if found := [f"{len(names)} {what} ({_first(names)})" for what, names in problems.items() if names]:
        raise ValueError(
            f"the weights of model {model!r} do not fit its config.json: {', '.join(found)}; download it again, or "
            "convert it for this class of transformers"
        )


def require_ends(model: str, generation: Any) -> None:
    """Raise ValueError if the ids of special tokens in a generation config are no integers."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation, name, None)
        ids = value if isinstance(value, list) else [value]
        if not all(each is None or type(each) is int for each in ids):
            raise ValueError(f"the generation config of model {model!r} has {name}={value!r}; it must be an integer")


def require_finite(model: str, module: torch.nn.Module) -> None:
    """Raise ValueError if a weight is NaN or infinite. Each is read once, where it is; a device is waited for once."""
    weights = {
        name: weight.detach()
        for name, weight in module.named_parameters()
        if weight.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) and weight.numel()
    }
    ends = {name: torch.stack(weight.aminmax()) for name, weight in weights.items() if not weight.is_meta}
    finite = [end.isfinite().all() for end in ends.values()]
    devices = {each.device for each in finite}
    ok = {device: torch.stack([each for each in finite if each.device == device]).all() for device in devices}
    if all(bool(each) for each in ok.values()):
        return
    bad = {name for name, each in zip(ends, finite, strict=True) if not each}
    is_half = any(weights[name].dtype == torch.float16 for name in bad)
    raise ValueError(
        f"{len(bad)} of the weights of model {model!r} have NaN or infinite values ({_first(bad)}); they are damaged"
        + (", or too large for float16: try bfloat16" if is_half else "")
    )


def _first(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")

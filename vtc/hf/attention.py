"""The attention implementation "vtc": fast attention, and in scored vision layers the [CLS] token's probabilities.

An attention function knows its module and arguments only. So the integration passes the vision tower one more argument,
`vtc_scores`, which knows the scored layers. Every other layer, also of the language model, runs plain attention:
flash-attn where it can run, else SDPA. Where a tower has another attention implementation, hooks read its scores.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtc import ops
from vtc.hf import names
from vtc.hf.settings import NAME
from vtc.scores import ClsScores

FLASH_HEAD_DIM = 256  # flash-attn's largest
_log = logging.getLogger("vtc")


def plain_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int = 64, masked: bool = False
) -> tuple[str, str]:
    """Which attention runs where nothing is scored, and why.

    Parameters
    ----------
    device, dtype, head_dim
        Of query, key and value.
    masked : bool
        Whether there is a mask tensor: rows are padded, or the cache is static. Causal attention needs none.

    Returns
    -------
    choice : {"flash-attn", "sdpa"}
    reason : str
        A clause for people to read.
    """
    if device.type != "cuda":
        return "sdpa", f"tensors on {device.type}; flash-attn needs a CUDA GPU"
    if flash_attention() is None:
        return "sdpa", "flash-attn is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"{str(dtype).removeprefix('torch.')}; flash-attn needs float16 or bfloat16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa", "flash-attn needs compute capability 8.0 or newer"
    if head_dim > FLASH_HEAD_DIM:
        return "sdpa", f"head size {head_dim}; flash-attn takes at most {FLASH_HEAD_DIM}"
    if masked:
        return "sdpa", "there is a mask; flash-attn takes none"
    return "flash-attn", "installed, and the tensors qualify"


@torch.compiler.assume_constant_result
@functools.cache
def flash_attention() -> Callable[..., torch.Tensor] | None:
    """Return `flash_attn_func`, or None; imported on first need, because it is optional and slow to import."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


@functools.cache
def _announce(choice: str, reason: str) -> None:
    _log.info("attention without scores uses %s: %s", choice, reason)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query `[B, H, N, D]` over key and value `[B, H_kv, M, D]`: `([B, N, H, D], None)`."""
    masked = attention_mask is not None or kwargs.get("position_bias") is not None
    choice, reason = plain_attention(query.device, query.dtype, query.shape[-1], masked)
    if not torch.compiler.is_compiling():
        _announce(choice, reason)
    flash = flash_attention() if choice == "flash-attn" else None
    if flash is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    length, causal = query.shape[2], kwargs.get("is_causal")
    causal = length > 1 and (getattr(module, "is_causal", True) if causal is None else causal)
    if causal:  # SDPA aligns the first query with the first key, flash-attn the last query with the last key
        key, value = key[:, :, :length], value[:, :, :length]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    dropout = kwargs.get("dropout", 0.0)
    return flash(query, key, value, dropout_p=dropout, softmax_scale=scaling, causal=causal), None


def vtc_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    vtc_scores: ClsScores | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query `[B, H, N, D]` over key and value `[B, H_kv, M, D]`, any strides: `([B, N, H, D], None)`.

    In a layer that `vtc_scores` knows, the first query's probabilities are added to it, without an N x N matrix. The
    queries and keys of these layers live until the last of them has run.
    """
    if vtc_scores is None:
        return _attend(module, query, key, value, attention_mask, scaling, **kwargs)
    vtc_scores.read(module, query, key, scaling)
    if vtc_scores.is_scored(module):
        if vtc_scores.fuses(query, kwargs.get("dropout", 0.0)):
            out, cls_probs = ops.cls_attention(query, key, value, scale=scaling, backend=vtc_scores.config.backend)
            vtc_scores.add(cls_probs)
            return out, None
        vtc_scores.note(query, key, scaling)
    return _attend(module, query, key, value, attention_mask, scaling, **kwargs)


def _refuse(*args: Any, **kwargs: Any) -> Any:
    names.require_supported()


def register() -> None:
    """Make "vtc" a value of transformers' `attn_implementation`, with the mask that SDPA expects.

    With a transformers that is too old for models it is a value, too, and the first layer that runs raises an error.
    """
    AttentionInterface.register(NAME, vtc_attention if names.is_supported() else _refuse)
    AttentionMaskInterface.register(NAME, sdpa_mask)

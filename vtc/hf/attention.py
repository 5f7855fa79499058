"""The attention implementation "vtc": fast attention, and in scored vision layers the [CLS] token's probabilities.

An attention function knows its module and arguments only. So the integration passes the vision tower one more argument,
`vtc_scores`, which knows the scored layers. Every other layer, also of the language model, runs plain attention:
flash-attn where it can run, else SDPA. Where a tower has another attention implementation, hooks read its scores.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtc import ops
from vtc.config import VTCConfig
from vtc.hf import names
from vtc.hf.settings import NAME

FLASH_HEAD_DIM = 256  # flash-attn's largest
_log = logging.getLogger("vtc")


class ClsScores:
    """The [CLS] token's probabilities for the patches of one batch of images, layer after layer.

        cls_probs[l, h, n] = softmax_j(q_lh[CLS] . k_lh[j] / sqrt(d))[n]

    with j over all 1+N keys. One object belongs to one pass through the vision tower.

    Parameters
    ----------
    config : VTCConfig
    scored : list of Module
        The attention modules of the scored layers.
    compared : Module or None
        The attention module whose keys, and whose query of the first token, the method compares.
    receiving : list of Module
        The attention modules of the layers in which patches are ranked by the attention that they receive.
    cls : bool
        Whether the first token is [CLS], which is no patch.

    Attributes
    ----------
    cls_probs : Tensor [L, B, H, N] or [L, B, 1, N], float32, or None
        Of all scored layers, the probabilities of every head or their mean. None before the last one has run.
    keys : Tensor [B, H, 1 + N, D] or None
        Of `compared`.
    query : Tensor [B, H, D] or None
        Of `compared`.
    received : Tensor [L, B, N], float32, or None
        The attention that each patch receives, of all layers that are `receiving`. None before the last one has run.
    ops : list of str
        The operations that computed `cls_probs` and `received`.
    """

    def __init__(
        self,
        config: VTCConfig,
        scored: list[torch.nn.Module],
        compared: torch.nn.Module | None = None,
        receiving: Sequence[torch.nn.Module] = (),
        cls: bool = True,
    ) -> None:
        self.config, self.scored, self.compared = config, scored, compared
        self.receiving, self.cls = list(receiving), cls
        self._received: list[torch.Tensor] = []
        # Of the scored layers that have run: the probabilities, or the first query, the key and the scale.
        self._layers: list[torch.Tensor | tuple[torch.Tensor, torch.Tensor, float | None]] = []
        self.cls_probs: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None
        self.query: torch.Tensor | None = None
        self.received: torch.Tensor | None = None
        self.ops: list[str] = []

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The attention modules whose query and key are needed."""
        others = [*([] if self.compared is None else [self.compared]), *self.receiving]
        return list({id(module): module for module in (*self.scored, *others)}.values())

    @property
    def is_complete(self) -> bool:
        """Whether every layer that is needed has run."""
        has_keys = self.compared is None or self.keys is not None
        return has_keys and all(
            found is not None or not needed
            for needed, found in ((self.scored, self.cls_probs), (self.receiving, self.received))
        )

    def is_scored(self, module: torch.nn.Module) -> bool:
        """Return whether an attention module belongs to a scored layer."""
        return any(module is each for each in self.scored)

    def read(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> None:
        """Note what the method needs of the query `[B, H, 1 + N, D]` and key of an attention module."""
        if module is self.compared:
            self.query, self.keys = query[:, :, 0], key
        if times := sum(module is each for each in self.receiving):  # a layer may be asked for twice
            backend, skip = self.config.backend, int(self.cls)
            self._received += [ops.received(query, key, scale=scale, skip=skip, backend=backend)] * times
            if len(self._received) == len(self.receiving):
                self.received = torch.stack(self._received)
                self.ops.append("received")

    def note(self, query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> None:
        """Note the query and key `[B, H, 1 + N, D]` of a scored layer: views, of which nothing is copied."""
        self._add("cls_probs", (query[:, :, 0], key, scale))

    def add(self, cls_probs: torch.Tensor) -> None:
        """Add the probabilities `[B, H, 1 + N]` float32 of a scored layer, computed by `cls_attention`."""
        self._add("cls_attention", cls_probs[:, :, 1:])

    def _add(self, op: str, layer: torch.Tensor | tuple[torch.Tensor, torch.Tensor, float | None]) -> None:
        self._layers.append(layer)
        if op not in self.ops:
            self.ops.append(op)
        if len(self._layers) == len(self.scored):
            self.cls_probs = self._finish()
            self._layers = []  # the views keep whole tensors alive

    def _finish(self) -> torch.Tensor:
        """The probabilities of all layers `[L, B, H, N]`; layers that are noted and have one scale take one launch."""
        found: list[Any] = list(self._layers)
        noted = {number: layer for number, layer in enumerate(self._layers) if isinstance(layer, tuple)}
        for scale in dict.fromkeys(scale for _, _, scale in noted.values()):
            numbers = [number for number, layer in noted.items() if layer[2] == scale]
            queries, keys = ([noted[number][part] for number in numbers] for part in (0, 1))
            cls_probs = ops.cls_probs(queries, keys, scale=scale, skip=1, backend=self.config.backend)  # type: ignore
            if len(numbers) == len(found):
                return cls_probs
            for number, own in zip(numbers, cls_probs, strict=True):
                found[number] = own
        return torch.stack(found)

    def fuses(self, query: torch.Tensor, dropout: float = 0.0) -> bool:
        """Return whether a scored layer runs `cls_attention`. It has no gradient and no dropout."""
        if torch.is_grad_enabled() or dropout:
            return False
        if self.config.fused is not None:
            return self.config.fused
        return ops.fused_is_faster(query.device, query.dtype, query.shape[-1], self.config.backend)

    def pool(self, side: int, size: int) -> None:
        """Average the scores over `size` x `size` cells of `side` x `side` patches; incomplete cells are dropped."""
        if self.cls_probs is not None:
            self.cls_probs = _pooled(self.cls_probs.mean(2), side, size).unsqueeze(2)
        if self.received is not None:
            self.received = _pooled(self.received, side, size)


def _pooled(scores: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Scores `[L, B, side * side]`, averaged over cells."""
    return torch.nn.functional.avg_pool2d(scores.unflatten(2, (side, side)), size).flatten(2)


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

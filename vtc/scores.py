"""What a method needs of the attention of a vision tower, collected while the tower runs. It knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vtc import ops
from vtc.config import VTCConfig


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
    over_ranks : callable, optional
        The mean of a tensor over the processes of a tower whose heads are split among them, the same number to each.
        Then every result is a mean over all heads, with H = 1, and there is no `query`.

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
        over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.config, self.scored, self.compared = config, scored, compared
        self.receiving, self.cls, self.over_ranks = list(receiving), cls, over_ranks
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
            if self.over_ranks is not None:
                self.query, self.keys = None, self.over_ranks(key.mean(1, keepdim=True, dtype=torch.float32))
        if times := sum(module is each for each in self.receiving):  # a layer may be asked for twice
            backend, skip = self.config.backend, int(self.cls)
            self._received += [ops.received(query, key, scale=scale, skip=skip, backend=backend)] * times
            if len(self._received) == len(self.receiving):
                self.received = torch.stack(self._received)
                if self.over_ranks is not None:
                    self.received = self.over_ranks(self.received)
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
            if self.over_ranks is not None:
                self.cls_probs = self.over_ranks(self.cls_probs.mean(2, keepdim=True))
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

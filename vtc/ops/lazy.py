"""Greedy maximum coverage on the CPU: the choices of `vtc.reference.coverage`, with a tenth of its evaluations.

What is covered never falls, so no gain ever rises, in floating point either: a sum in a fixed order is monotone. The
last gain of a column is therefore a bound of its next one. A heap holds the columns by their bounds. If its first
column has been evaluated since the last choice, or its bound is 0, no other can have a larger gain, or an equal one
and a lower index.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from vtc import reference

_LANES = 1024  # terms this far apart are added one after the other
_BATCH = 32  # columns that are evaluated at once


def coverage(
    cover: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    allowed: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `vtc.reference.coverage`, image by image. It reads the device's memory, so it is for the CPU."""
    order = torch.zeros((cover.shape[0], k), dtype=torch.int64, device=cover.device)
    for image, columns in enumerate(cover.mT):
        count = k if counts is None else int(counts[image])
        weights = None if weight is None else weight[image]
        candidates = list(range(len(columns)))
        last: list[int] = []
        if allowed is not None:
            last = [n for n, first in enumerate(allowed[image].tolist()) if not first]
            candidates = [n for n, first in enumerate(allowed[image].tolist()) if first]
        chosen = _choose(columns, candidates, min(count, len(candidates)), weights)
        order[image, :count] = torch.tensor((chosen + last)[:count])
    return reference.sorted_choices(order, cover.shape[2], counts)


def _choose(columns: Tensor, candidates: list[int], count: int, weight: Tensor | None) -> list[int]:
    """`count` of the candidates, as they are chosen."""
    gains = _Gains(columns, weight)
    heap = []
    for start in range(0, len(candidates), _BATCH):
        batch = candidates[start : start + _BATCH]
        heap += [(-gain, n) for gain, n in zip(gains.of(batch), batch, strict=True)]
    heapq.heapify(heap)
    evaluated = [0] * len(columns)  # in which step
    chosen: list[int] = []
    while len(chosen) < count:
        batch = []
        while heap and len(batch) < _BATCH and heap[0][0] < 0 and evaluated[heap[0][1]] < len(chosen):
            batch.append(heapq.heappop(heap)[1])
        if batch:
            for gain, n in zip(gains.of(batch), batch, strict=True):
                evaluated[n] = len(chosen)
                heapq.heappush(heap, (-gain, n))
        else:
            chosen.append(heapq.heappop(heap)[1])
            gains.cover(chosen[-1])
    return chosen


class _Gains:
    """The gains of columns [N, R], given what is covered: at first nothing."""

    def __init__(self, columns: Tensor, weight: Tensor | None) -> None:
        infinity = float("inf")
        self.columns = columns.nan_to_num(nan=0.0, posinf=infinity, neginf=-infinity)  # a copy
        self.covered = torch.zeros_like(columns[0])
        self.weight = weight
        self.terms = torch.zeros((_BATCH, columns.shape[1]), dtype=columns.dtype)
        self.folds = []  # views of the terms: what each step of the sum adds to what; the other terms of a step are 0
        for start in range(_LANES, columns.shape[1], _LANES):
            block = self.terms[:, start : start + _LANES]
            self.folds.append((self.terms[:, : block.shape[1]], block))
        size = _LANES
        while size > 1:
            size //= 2
            upper = self.terms[:, size : 2 * size]
            if upper.shape[1]:
                self.folds.append((self.terms[:, : upper.shape[1]], upper))

    def of(self, batch: list[int]) -> list[float]:
        """At most `_BATCH` columns' gains, summed as in `vtc.reference.coverage`."""
        index = torch.tensor(batch)
        columns = self.columns.index_select(0, index)
        torch.sub(columns, self.covered, out=self.terms[: len(batch)]).relu_()
        for lower, upper in self.folds:
            lower.add_(upper)
        gain = self.terms[: len(batch), 0]
        if self.weight is not None:
            weight = self.weight.index_select(0, index)
            gain = torch.where((weight > 0) & (gain > 0), weight * gain, 0.0)
        return gain.tolist()

    def cover(self, n: int) -> None:
        self.covered = torch.maximum(self.covered, self.columns[n])
        whole = self.covered.isinf()
        if whole.any():  # no column adds to these rows, and inf - inf would be NaN
            self.columns[:, whole] = 0.0

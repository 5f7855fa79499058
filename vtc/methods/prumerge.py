"""PruMerge and PruMerge+: the kept patches take up those like them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, Tokens, Tower


@dataclasses.dataclass(frozen=True)
class PruMerge(Method):
    """Outliers of the last layer's [CLS] attention, each merged with its most similar patches (arXiv 2403.15388).

    ::

        s        = softmax_j(q[CLS] · k[j] / √C)      q, k: the last layer's, not split into heads; j over all 1 + N
        K        = ⌊N · fraction of patches with s[n] > Q3 + 1.5 · (Q3 - Q1)⌋       quartiles of the image's own s
        kept     = the K patches with the largest s, the largest first
        row_i    = x_i + Σ_j s[j] · x_j               j: the 32 other patches whose k is most similar, by its cosine
        one more = Σ_j s[j] · x_j                     j: the patches that are not kept

    K depends on the image, from 0 to a quarter of its patches.

    Parameters
    ----------
    adaptive_count : bool
        Whether K is the one above. If not, K = keep - 1, so that there are `keep` rows with the one more.
    neighbors : int
        32 in the paper; all others where they are fewer.
    """

    name: ClassVar[str] = "prumerge"
    scores: ClassVar[str] = "[CLS] attention, the last vision layer, heads not split; similar keys merge"
    paper: ClassVar[str] = "arXiv 2403.15388"
    needs: ClassVar[Needs] = Needs(keys="last", query=True)
    adaptive: ClassVar[bool] = True
    operations: ClassVar[tuple[str, ...]] = ("row_scores", "topk", "merge")

    adaptive_count: bool = True
    neighbors: int = 32

    def capacity(self, num_tokens: int, keep: int) -> int:
        return self._most(num_tokens, keep) + 1

    def _most(self, num_tokens: int, keep: int) -> int:
        """Most patches that can be kept: of N values at most N / 4 lie above the third quartile."""
        if not self.adaptive_count and keep < 2:
            raise ValueError(f"{self.name} keeps a patch at least and one more row, got keep={keep}; use 2 or more")
        return max(1, num_tokens // 4) if self.adaptive_count else keep - 1

    def compress(self, tower: Tower, keep: int) -> Tokens:
        keys, query = self.needed(tower, "keys"), self.needed(tower, "query")
        key = keys.transpose(1, 2).flatten(2)  # [B, 1 + N, C]: the heads side by side
        scores = ops.row_scores(query.flatten(1).unsqueeze(1), key.unsqueeze(1), skip=1, backend=self.backend)
        targets, counts = self._targets(scores, keep)
        rows, _ = ops.merge(
            tower.hidden[:, 1:],
            key[:, 1:],
            targets,
            scores,
            neighbors=self.neighbors,
            counts=counts,
            backend=self.backend,
        )
        return Tokens(rows, None if counts is None else counts + 1, targets, scores)

    def _targets(self, scores: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
        """The kept patches `[B, most]` as selected, and how many of them count `[B]`; None if all do."""
        targets = _largest_first(scores, self._most(scores.shape[1], keep), self.backend)
        return targets, _fraction_count(_outliers(scores), scores.shape[1]) if self.adaptive_count else None


@dataclasses.dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with a uniform sample of the grid beside the patches of the largest scores (arXiv 2403.15388).

    ::

        kept = the c patches with the largest s, the largest first; then those of 0, step, 2·step, ... < N - 1 that are
               not among them, ascending;   step = ⌊stride / 3⌋

    Scores, merging and the one more row are PruMerge's. How many patches are kept depends on how many of the sample are
    among the c.

    Parameters
    ----------
    adaptive_count : bool
        The paper's own version: c is PruMerge's K and stride = ⌊1 / fraction⌋; where no score is an outlier, patch 0
        alone. If False, c and stride are what the VTC-CLS authors ran, for 576 patches: 13 and 33 for keep = 64, 40 and
        18 for 128, 95 and 9 for 256. For other numbers: the smallest step with which the sample is at most 5/6 of
        `keep`, and c so that about `keep` patches are expected.
    neighbors : int
        32 in the paper; all others where they are fewer.
    """

    name: ClassVar[str] = "prumerge+"
    scores: ClassVar[str] = "as prumerge, and a uniform sample of the grid"
    paper: ClassVar[str] = "arXiv 2403.15388"

    adaptive_count: bool = False

    def _most(self, num_tokens: int, keep: int) -> int:
        """Most patches that can be kept: with an adaptive step, all of them."""
        if self.adaptive_count:
            return num_tokens
        if keep < 2:
            raise ValueError(f"{self.name} keeps the best patches and a sample, got keep={keep}; use 2 or more")
        best, step = top_and_step(num_tokens, keep)
        return min(num_tokens, best + len(range(0, num_tokens - 1, step)))

    def _targets(self, scores: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
        num_tokens = scores.shape[1]
        n = torch.arange(num_tokens, device=scores.device)
        if self.adaptive_count:
            outliers = _outliers(scores)
            best, count = max(1, num_tokens // 4), _fraction_count(outliers, num_tokens)
            stride = torch.where(outliers > 0, 1 / _fraction(outliers, num_tokens), 3 * num_tokens).long()
            step = (stride // 3).unsqueeze(1)  # [B, 1]
        else:
            best, fixed_step = top_and_step(num_tokens, keep)
            count = torch.full_like(scores[:, 0], best, dtype=torch.int64)
            step = torch.full_like(count, fixed_step).unsqueeze(1)
        largest = _largest_first(scores, best, self.backend)  # [B, c]
        # The places in the order of selection: 0 to c - 1, then N + n for the sample, then 3 N for what is not kept.
        place = torch.where((n % step == 0) & (n < num_tokens - 1), num_tokens + n, 3 * num_tokens)
        rank = n[:best].expand_as(largest)
        place = place.scatter(1, largest, torch.where(rank < count.unsqueeze(1), rank, place.gather(1, largest)))
        order = place.sort(dim=1, stable=True).indices[:, : self._most(num_tokens, keep)]
        return order, (place < 3 * num_tokens).sum(dim=1)


_PUBLISHED = {64: (13, 33), 128: (40, 18), 256: (95, 9)}  # of 576 patches: c and stride


def top_and_step(num_tokens: int, keep: int) -> tuple[int, int]:
    """How many patches of the largest scores PruMerge+ takes for a fixed `keep`, and the step of its sample."""
    if num_tokens == 576 and keep in _PUBLISHED:
        best, stride = _PUBLISHED[keep]
        return best, stride // 3
    most = 5 * keep // 6
    step = next((s for s in range(2, num_tokens) if len(range(0, num_tokens - 1, s)) <= most), num_tokens)
    sample = len(range(0, num_tokens - 1, step))
    # Of the c largest, one in `step` is expected to be in the sample anyway.
    return min(num_tokens, max(1, round((keep - sample) * step / (step - 1)))) if step > 1 else 1, step


def _largest_first(scores: Tensor, k: int, backend: str) -> Tensor:
    """Indices `[B, k]` of the largest scores in descending order; ties in the order of the patches, NaN as -inf."""
    kept = ops.topk(scores, k, backend=backend)
    values = scores.gather(1, kept)
    values = values.masked_fill(values.isnan(), float("-inf"))
    return kept.gather(1, values.sort(dim=1, descending=True, stable=True).indices)


def _outliers(scores: Tensor) -> Tensor:
    """How many scores of each row lie more than 1.5 interquartile ranges above the third quartile, `[B]` int64."""
    ascending = scores.double().sort(dim=1).values

    def quantile(share: float) -> Tensor:
        position = share * (scores.shape[1] - 1)
        below = ascending[:, int(position)]
        above = ascending[:, min(int(position) + 1, scores.shape[1] - 1)]
        return below + (above - below) * (position - int(position))

    first, third = quantile(0.25), quantile(0.75)
    return (scores.double() > (third + 1.5 * (third - first)).unsqueeze(1)).sum(dim=1)


def _fraction_count(outliers: Tensor, num_tokens: int) -> Tensor:
    """⌊N · (outliers / N)⌋ in float64, which is how the paper's code counts; for some N it is one less."""
    return (_fraction(outliers, num_tokens) * num_tokens).long()


def _fraction(outliers: Tensor, num_tokens: int) -> Tensor:
    """outliers / N in float64. N is a tensor: to divide by a number, PyTorch multiplies by its inverse on a GPU."""
    return outliers.double() / torch.full_like(outliers, num_tokens, dtype=torch.float64)

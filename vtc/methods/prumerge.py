"""PruMerge and PruMerge+: merge similar patches into the kept ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, Tokens, VisionOutputs
from vtc.methods.checks import check_bool, check_integer


@dataclasses.dataclass(frozen=True)
class PruMerge(Method):
    """Outliers of the last layer's [CLS] attention, each merged with its most similar patches (arXiv 2403.15388).

    ::

        s        = softmax_j(q[CLS] · k[j] / √C)      q, k: the last layer's, not split into heads; j over all 1 + N
        K        = ⌊N · fraction of patches with s[n] > Q3 + 1.5 · (Q3 - Q1)⌋       quartiles of the image's own s
        kept     = the K patches with the largest s, the largest first
        token_i  = x_i + Σ_j s[j] · x_j               j: the `neighbors` other patches whose k has the largest cosine
        extra    = Σ_j s[j] · x_j                     j: the patches that are not kept

    The tokens of an image are the K merged ones, then the extra token. K is from 0 to a quarter of the patches and
    depends on the image.

    Parameters
    ----------
    adaptive_count : bool
        Default True: choose K per image by the outliers of its scores, as above, and ignore `keep`. False: K =
        keep - 1, which makes `keep` tokens with the extra one.
    neighbors : int
        How many similar patches are merged into each kept one; all others if there are fewer. Default 32, as in the
        paper.
    """

    name: ClassVar[str] = "prumerge"
    scores: ClassVar[str] = "[CLS] attention, the last vision layer, heads not split; similar keys merge"
    paper: ClassVar[str] = "arXiv 2403.15388"
    needs: ClassVar[Needs] = Needs(keys="last", query=True)
    adaptive: ClassVar[bool] = True
    operations: ClassVar[tuple[str, ...]] = ("row_scores", "topk", "merge_neighbors")

    adaptive_count: bool = True
    neighbors: int = 32

    def check(self) -> None:
        check_bool("adaptive_count", self.adaptive_count)
        check_integer("neighbors", self.neighbors, 1)

    def without_effect(self) -> dict[str, str]:
        why = "each image has as many tokens as it has outliers, unless adaptive_count=False"
        return super().without_effect() | (dict.fromkeys(("keep", "ratio"), why) if self.adaptive_count else {})

    def num_outputs(self, num_tokens: int, keep: int) -> int:
        return self._max_kept(num_tokens, keep) + 1

    def _max_kept(self, num_tokens: int, keep: int) -> int:
        """The largest number of patches that can be kept. At most N / 4 of N scores lie above the third quartile."""
        if not self.adaptive_count and keep < 2:
            raise ValueError(
                f"{self.name} keeps at least one patch and the extra token, got keep={keep}; use 2 or more"
            )
        return max(1, num_tokens // 4) if self.adaptive_count else keep - 1

    def reduce(self, outputs: VisionOutputs, keep: int) -> Tokens:
        keys, query = self.require(outputs, "keys"), self.require(outputs, "query")
        key = keys.transpose(1, 2).flatten(2)  # [B, 1 + N, C]: the heads side by side
        scores = ops.row_scores(query.flatten(1).unsqueeze(1), key.unsqueeze(1), skip=1, backend=self.backend)
        targets, counts = self._targets(scores, keep)
        features, _ = ops.merge_neighbors(
            outputs.hidden[:, 1:],
            key[:, 1:],
            targets,
            scores,
            neighbors=self.neighbors,
            counts=counts,
            backend=self.backend,
        )
        return Tokens(features, None if counts is None else counts + 1, targets, scores)

    def _targets(self, scores: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
        """Kept patches `[B, max_kept]` in the order of selection, and how many each image keeps `[B]`; None if all."""
        targets = _largest_first(scores, self._max_kept(scores.shape[1], keep), self.backend)
        return targets, _fraction_count(_outliers(scores), scores.shape[1]) if self.adaptive_count else None


@dataclasses.dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge that also keeps a uniform sample of the grid (arXiv 2403.15388).

    ::

        kept = the c patches with the largest s, the largest first; then those of 0, step, 2·step, ... < N - 1 that are
               not among them, ascending;   step = ⌊stride / 3⌋

    Scores, merging and the extra token are PruMerge's. The number of kept patches depends on how many of the sample
    are among the c.

    Parameters
    ----------
    adaptive_count : bool
        Default False: c and stride follow from `keep`. Of 576 patches they are those that the VTC-CLS authors ran: 13
        and 33 for keep = 64, 40 and 18 for 128, 95 and 9 for 256. Elsewhere step is the smallest one whose sample is at
        most 5/6 of `keep`, and c makes the expected number of patches about `keep`.
        True: the paper's own version, which ignores `keep`. c is PruMerge's K, and stride = ⌊1 / fraction⌋. An image
        without outliers keeps patch 0 only.
    neighbors : int
        How many similar patches are merged into each kept one; all others if there are fewer. Default 32, as in the
        paper.
    """

    name: ClassVar[str] = "prumerge+"
    scores: ClassVar[str] = "as prumerge, and a uniform sample of the grid"
    paper: ClassVar[str] = "arXiv 2403.15388"

    adaptive_count: bool = False

    def _max_kept(self, num_tokens: int, keep: int) -> int:
        """The largest number of patches that can be kept: all of them if the step is adaptive."""
        if self.adaptive_count:
            return num_tokens
        if keep < 2:
            raise ValueError(f"{self.name} keeps the top-scoring patches and a sample, got keep={keep}; use 2 or more")
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
        # Place in the order of selection: 0 to c - 1 for the top-scoring, N + n for the sample, 3 N if not kept.
        place = torch.where((n % step == 0) & (n < num_tokens - 1), num_tokens + n, 3 * num_tokens)
        rank = n[:best].expand_as(largest)
        place = place.scatter(1, largest, torch.where(rank < count.unsqueeze(1), rank, place.gather(1, largest)))
        order = place.sort(dim=1, stable=True).indices[:, : self._max_kept(num_tokens, keep)]
        return order, (place < 3 * num_tokens).sum(dim=1)


_PUBLISHED = {64: (13, 33), 128: (40, 18), 256: (95, 9)}  # of 576 patches: c and stride


def top_and_step(num_tokens: int, keep: int) -> tuple[int, int]:
    """How many top-scoring patches PruMerge+ keeps for a fixed `keep`, and the step of its sample."""
    if num_tokens == 576 and keep in _PUBLISHED:
        best, stride = _PUBLISHED[keep]
        return best, stride // 3
    most = 5 * keep // 6
    step = next((s for s in range(2, num_tokens) if len(range(0, num_tokens - 1, s)) <= most), num_tokens)
    sample = len(range(0, num_tokens - 1, step))
    # One in `step` of the c largest is expected to be in the sample too.
    return min(num_tokens, max(1, round((keep - sample) * step / (step - 1)))) if step > 1 else 1, step


def _largest_first(scores: Tensor, k: int, backend: str) -> Tensor:
    """Indices `[B, k]` of the largest scores in descending order; ties in the order of the patches, NaN as -inf."""
    kept = ops.topk(scores, k, backend=backend)
    values = scores.gather(1, kept)
    values = values.masked_fill(values.isnan(), float("-inf"))
    return kept.gather(1, values.sort(dim=1, descending=True, stable=True).indices)


def _outliers(scores: Tensor) -> Tensor:
    """How many scores of each image lie more than 1.5 interquartile ranges above the third quartile, `[B]` int64."""
    ascending = scores.double().sort(dim=1).values

    def quantile(share: float) -> Tensor:
        position = share * (scores.shape[1] - 1)
        below = ascending[:, int(position)]
        above = ascending[:, min(int(position) + 1, scores.shape[1] - 1)]
        return below + (above - below) * (position - int(position))

    first, third = quantile(0.25), quantile(0.75)
    return (scores.double() > (third + 1.5 * (third - first)).unsqueeze(1)).sum(dim=1)


def _fraction_count(outliers: Tensor, num_tokens: int) -> Tensor:
    """⌊N · (outliers / N)⌋ in float64, as in the paper's code; rounding makes it one less for some N."""
    return (_fraction(outliers, num_tokens) * num_tokens).long()


def _fraction(outliers: Tensor, num_tokens: int) -> Tensor:
    """outliers / N in float64. N is a tensor: to divide by a number, PyTorch multiplies by its inverse on a GPU."""
    return outliers.double() / torch.full_like(outliers, num_tokens, dtype=torch.float64)

"""Scores of a tower whose heads are split among processes: those of the whole tower, whatever a process sees."""

from __future__ import annotations

import pytest
import torch

from vtc.config import VTCConfig
from vtc.methods import VisionOutputs, class_of
from vtc.scores import ClsScores

LAYERS, IMAGES, HEADS, TOKENS, SIZE = 2, 3, 4, 17, 8  # 16 patches
RANKS = 2


class Ranks:
    """The processes of a tower, one after the other: the first pass notes what each would send, the second receives."""

    def __init__(self) -> None:
        self.sent: list[list[torch.Tensor]] = [[] for _ in range(RANKS)]

    def sending(self, rank: int):
        def over_ranks(x: torch.Tensor) -> torch.Tensor:
            self.sent[rank].append(x)
            return x

        return over_ranks

    def receiving(self):
        means = iter([torch.stack(all_ranks).mean(0) for all_ranks in zip(*self.sent, strict=True)])
        return lambda x: next(means)


def heads(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys `[L, B, H, 1 + N, D]` of all heads, of which each attends to patches of its own."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, LAYERS, IMAGES, HEADS, TOKENS, SIZE, generator=generator)
    return 2 * query, 2 * key


def run(query: torch.Tensor, key: torch.Tensor, over_ranks=None) -> ClsScores:
    """The scores of a tower with such heads: of both layers' [CLS], the last one's keys, the attention received."""
    layers: list[torch.nn.Module] = [torch.nn.Identity() for _ in range(LAYERS)]
    scores = ClsScores(VTCConfig(keep=4), layers, layers[-1], layers, over_ranks=over_ranks)
    for layer, own_query, own_key in zip(layers, query, key, strict=True):
        scores.read(layer, own_query, own_key)
        scores.note(own_query, own_key)
    assert scores.is_complete
    return scores


def split(query: torch.Tensor, key: torch.Tensor) -> list[ClsScores]:
    """The scores that each process has."""
    shards = list(zip(query.chunk(RANKS, 2), key.chunk(RANKS, 2), strict=True))
    ranks = Ranks()
    for rank, shard in enumerate(shards):
        run(*shard, over_ranks=ranks.sending(rank))
    return [run(*shard, over_ranks=ranks.receiving()) for shard in shards]


def kept(scores: ClsScores, method: str) -> torch.Tensor:
    """What a method makes of the scores."""
    hidden = torch.randn(IMAGES, TOKENS, 6, generator=torch.Generator().manual_seed(5))
    vision = VisionOutputs(hidden, (4, 4), scores.cls_probs, scores.keys, cls=True, received=scores.received)
    return class_of(method)().reduce(vision, 7).features


def test_each_process_has_the_mean_over_all_heads() -> None:
    query, key = heads(0)
    whole = run(query, key)
    for rank in split(query, key):
        assert rank.cls_probs.shape == (LAYERS, IMAGES, 1, TOKENS - 1)
        torch.testing.assert_close(rank.cls_probs, whole.cls_probs.mean(2, keepdim=True))
        torch.testing.assert_close(rank.keys, whole.keys.mean(1, keepdim=True))
        torch.testing.assert_close(rank.received, whole.received)
        assert rank.query is None  # no method gets the part of one process


@pytest.mark.parametrize("method", ["vtc-cls", "visionzip", "hiprune"])
def test_each_process_keeps_the_same(method) -> None:
    query, key = heads(1)
    whole = kept(run(query, key), method)
    for rank in split(query, key):
        torch.testing.assert_close(kept(rank, method), whole)
    # Alone, a process scores its own heads only, and keeps others.
    half = run(query[:, :, : HEADS // RANKS], key[:, :, : HEADS // RANKS])
    assert not torch.allclose(kept(half, method), whole)

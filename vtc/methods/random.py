"""Random patches: the control that every method should beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vtc.methods.base import Method, Needs, Ranking, VisionOutputs
from vtc.methods.checks import check_integer


@dataclasses.dataclass(frozen=True)
class Random(Method):
    """Uniform scores that depend on the image's own pixels and `seed` only.

    The K patches with the largest scores stay, in their order.

    Parameters
    ----------
    seed : int
        The random seed, from 0 to 2**32 - 1. Default 0.
    """

    name: ClassVar[str] = "random"
    scores: ClassVar[str] = "nothing: uniform, seeded per image"
    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs(pixels=True)

    seed: int = 0

    def check(self) -> None:
        check_integer("seed", self.seed, 0, 2**32 - 1)

    def ranking(self, outputs: VisionOutputs) -> Ranking:
        return Ranking(random_scores(self.require(outputs, "pixel_values"), outputs.patches.shape[1], self.seed))


def random_scores(pixel_values: torch.Tensor, tokens: int, seed: int) -> torch.Tensor:
    """Uniform scores `[B, tokens]` fp32 in [0, 1) that depend on the image's own pixels and `seed` only.

    A generator's numbers for an image would depend on the other images of its batch. Instead the bits of the pixels are
    summed with odd weights (integer sums wrap, so their order does not matter), and splitmix64 turns sum + n into the
    n-th number. Nothing leaves the device.
    """
    bits = pixel_values.detach().float().flatten(1).contiguous().view(torch.int32).long()
    image = (bits * (2 * torch.arange(bits.shape[1], device=bits.device) + 1)).sum(1, keepdim=True)
    x = image + 1_000_003 * seed + torch.arange(tokens, device=bits.device)
    # splitmix64; its constants as signed integers, its logical shifts as arithmetic ones with the sign bits masked off
    x = x * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 40) & (2**24 - 1)).float() / 2**24

"""What every method is: what it asks of the vision tower, what it promises, and what it does with the answer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vtc import ops


class Needs(NamedTuple):
    """What a method asks of the models, apart from the feature layer's hidden states. Vision layers count from 0.

    Attributes
    ----------
    rows : {"ensemble", "feature", None}
        Vision layers whose [CLS] rows it scores by: those that `ensemble_layers` and `start_layer` name, which end at
        the feature layer; or the feature layer alone.
    keys : {"feature", "last", None}
        The vision layer whose keys it compares. The last layer's keys are projections of its normalised input, which
        is the hidden state before it: that layer need not run.
    query : bool
        The [CLS] token's query in the same layer, too.
    pixels : bool
        The pixels themselves.
    prompt : bool
        The attention of the last prompt token in the language-model layer before the one where tokens are dropped.
    grid : bool
        That all visual tokens are patches, in rows and columns: no register tokens among them.
    """

    rows: str | None = None
    keys: str | None = None
    query: bool = False
    pixels: bool = False
    prompt: bool = False
    grid: bool = False


class Tower(NamedTuple):
    """What one pass of B images through the vision tower leaves for a method; None where it did not ask.

    Attributes
    ----------
    hidden : Tensor[B, 1 + N, C]
        Output of the feature layer, [CLS] first; [B, N, C] if not `cls`.
    grid : tuple of int
        Rows and columns of patches, N in all if there are no register tokens.
    rows : Tensor[L, B, H, N], float32
        The [CLS] token's probabilities for the patches in the scored layers, head by head; or their mean, H = 1.
    keys : Tensor[B, H, 1 + N, D]
        Keys of one layer, any strides.
    query : Tensor[B, H, D]
        The [CLS] token's query in that layer.
    pixel_values : Tensor[B, 3, height, width]
    cls : bool
        Whether `hidden` begins with a [CLS] token.
    """

    hidden: Tensor
    grid: tuple[int, int]
    rows: Tensor | None = None
    keys: Tensor | None = None
    query: Tensor | None = None
    pixel_values: Tensor | None = None
    cls: bool = True

    @property
    def patches(self) -> Tensor:
        """`hidden` without the [CLS] token, `[B, N, C]`."""
        return self.hidden[:, 1:] if self.cls else self.hidden


class Tokens(NamedTuple):
    """The visual tokens that are left of B images, before the projector.

    Attributes
    ----------
    rows : Tensor[B, R, C]
        In the order in which the language model sees them. Rows after an image's count are 0.
    counts : Tensor[B], int64, or None
        How many rows each image has; None where all have R.
    indices : Tensor[B, K], int64, or None
        The patches they come from, where that can be said: of `VisionZip` and `PruMerge`, the patches that stay
        themselves. Those after an image's count (without the one more row) are arbitrary.
    scores : Tensor[B, N], float32, or None
        What they were chosen by.
    """

    rows: Tensor
    counts: Tensor | None = None
    indices: Tensor | None = None
    scores: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One method with its parameters. A subclass defines `select`, or `compress` if rows are more than copies.

    Class attributes: `name` is the registry's, `scores` says in a few words what it ranks by, `paper` where it is from,
    `needs` what it asks of the models, `prunes` the places where it can drop tokens ("tower": before the projector,
    "language": after a layer of the language model), `adaptive` whether images can end up with different counts,
    `operations` those of `vtc.ops` that it runs, `chooses` whether its tokens stand for patches that it has chosen.
    """

    name: ClassVar[str]
    scores: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[Needs] = Needs()
    prunes: ClassVar[tuple[str, ...]] = ("tower",)
    adaptive: ClassVar[bool] = False
    operations: ClassVar[tuple[str, ...]] = ("topk", "compact")
    chooses: ClassVar[bool] = True

    backend: str = "auto"

    @classmethod
    def needs_cls(cls) -> bool:
        """Whether the vision tower must have a [CLS] token."""
        return cls.needs.rows is not None or cls.needs.query

    @classmethod
    def copies(cls) -> bool:
        """Whether its tokens are the patches of the largest scores, unchanged: it works across tiles and frames."""
        return cls.select is not Method.select and cls.compress is Method.compress

    def capacity(self, num_tokens: int, keep: int) -> int:
        """R of `compress`: the rows of an image of `num_tokens` patches, the most there can be if it is adaptive.

        Raises
        ------
        ValueError
            If `keep` is too small for the method.
        """
        return keep

    def select(self, tower: Tower, keep: int) -> tuple[Tensor, Tensor]:
        """The patches that stay `[B, keep]` int64, ascending, and what they were chosen by `[B, N]` float32."""
        raise ValueError(f"{self.name} does not choose patches of the vision tower; use compress, or another method")

    def compress(self, tower: Tower, keep: int) -> Tokens:
        """Reduce the patches of `tower` to `capacity(N, keep)` rows; 1 <= keep <= N, which the caller has checked.

        Raises
        ------
        ValueError
            If `tower` lacks what the method needs, or `keep` is too small for it.
        """
        indices, scores = self.select(tower, keep)
        return Tokens(ops.compact(tower.patches, indices, backend=self.backend), None, indices, scores)

    def needed(self, tower: Tower, what: str) -> Tensor:
        """A field of `tower`, or a ValueError that says who needs it."""
        value = getattr(tower, what)
        if value is None:
            raise ValueError(f"{self.name} needs the vision tower's {what}, got None; it asks for {self.needs}")
        return value


def keep_patches(is_image: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Which tokens of prompts stay, if of each image the patches `indices` do: to prune inside the language model.

    Parameters
    ----------
    is_image : Tensor[B, L], bool
        True at image tokens, `num_tokens` for each image; images in the order of the prompts, then of their places.
    indices : Tensor[images, K], int64
        From `Method.select`.
    num_tokens : int
        N.

    Returns
    -------
    Tensor[B, L], bool
        True at all tokens that are no image's, and at the K of each image.
    """
    kept = torch.zeros((len(indices), num_tokens), dtype=torch.bool, device=indices.device).scatter(1, indices, True)
    return (~is_image).masked_scatter(is_image, kept.flatten())


def prompt_indices(stays: Tensor, length: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The positions of the tokens that stay, for prompts that are compacted to one length.

    Parameters
    ----------
    stays : Tensor[B, L], bool
        From `keep_patches` or `FastV.keep_prompt`.
    length : int
        As many as stay in the row in which most do.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    indices : Tensor[B, length], int64
        Ascending, as `vtc.ops.compact_kv` wants them. Rows in which fewer stay are filled up with their first dropped
        tokens.
    valid : Tensor[B, length], bool
        False at what fills up: it must get no attention.
    """
    indices = ops.topk(stays.float(), length, backend=backend)
    return indices, stays.gather(1, indices)

"""The base class of methods: what a method needs from the vision tower, and how it reduces the patches to tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.checks import plain
from vtc.ops.topk import dtype_of_total

_NO_DEFAULT = object()


class Needs(NamedTuple):
    """What a method needs from the vision tower besides the hidden states of the feature layer.

    Attributes
    ----------
    cls_probs : bool
        The [CLS] token's attention probabilities in the layers that `Method.scored_layers` names.
    keys : {"feature", "last", None}
        The vision layer whose keys it compares. "last" is the last layer of the tower.
    query : bool
        The [CLS] token's query in the layer of `keys`.
    pixels : bool
        The pixel values.
    grid : bool
        Every visual token is a patch of the grid, so the tower may have no register tokens.
    received : bool
        The attention that each patch receives, in the layers that `Method.received_layers` names.
    projected : bool
        The patches after the projector.
    question : bool
        The prompt's text tokens, embedded by the language model.
    """

    cls_probs: bool = False
    keys: str | None = None
    query: bool = False
    pixels: bool = False
    grid: bool = False
    received: bool = False
    projected: bool = False
    question: bool = False


class Question(NamedTuple):
    """The text tokens of the prompts that B images are in, as the language model embeds them.

    Attributes
    ----------
    embeddings : Tensor[B, T, E]
    ids : Tensor[B, T], int64
    is_text : Tensor[B, T], bool
        False at what is no text: visual tokens and padding.
    """

    embeddings: Tensor
    ids: Tensor
    is_text: Tensor


class VisionOutputs(NamedTuple):
    """The outputs of one pass of B images through the vision tower. Fields that the method does not need are None.

    Attributes
    ----------
    hidden : Tensor[B, 1 + N, C]
        Output of the feature layer, [CLS] first; [B, N, C] if not `cls`.
    grid : tuple of int
        Rows and columns of patches. Their product is N if the tower has no register tokens.
    cls_probs : Tensor[L, B, H, N], float32
        The [CLS] token's attention probabilities for the patches, per scored layer and head. With H = 1 they are the
        mean over the heads.
    keys : Tensor[B, H, 1 + N, D]
        Keys of one layer, any strides.
    query : Tensor[B, H, D]
        The [CLS] token's query in that layer.
    pixel_values : Tensor[B, 3, height, width]
    cls : bool
        Whether `hidden` begins with a [CLS] token.
    received : Tensor[L, B, N], float32
        The attention that each patch receives from all tokens of the tower, per layer; see `vtc.ops.received`.
    projected : Tensor[B, N, E]
        The patches after the projector.
    question : Question
    """

    hidden: Tensor
    grid: tuple[int, int]
    cls_probs: Tensor | None = None
    keys: Tensor | None = None
    query: Tensor | None = None
    pixel_values: Tensor | None = None
    cls: bool = True
    received: Tensor | None = None
    projected: Tensor | None = None
    question: Question | None = None

    @property
    def patches(self) -> Tensor:
        """`hidden` without the [CLS] token, `[B, N, C]`."""
        return self.hidden[:, 1:] if self.cls else self.hidden

    def of_views(self, views: slice) -> VisionOutputs:
        """The same of some of the B images."""

        def part(x: Tensor | None, layers: bool = False) -> Tensor | None:
            return x if x is None else x[:, views] if layers else x[views]

        question = None if self.question is None else Question(*(x[views] for x in self.question))
        return VisionOutputs(
            self.hidden[views], self.grid, part(self.cls_probs, True), part(self.keys), part(self.query),
            part(self.pixel_values), self.cls, part(self.received, True), part(self.projected), question,
        )  # fmt: skip

    def joined(self, tokens: Tensor) -> VisionOutputs:
        """The same with some patches of the B images, `tokens` `[n]` int64 counted over them, as those of one image.

        It has neither [CLS] nor a grid, and no keys.
        """

        def taken(x: Tensor, dim: int = 0) -> Tensor:
            return x.flatten(dim, dim + 1).index_select(dim, tokens).unsqueeze(dim)

        return VisionOutputs(
            taken(self.patches),
            (1, len(tokens)),
            cls_probs=None if self.cls_probs is None else taken(self.cls_probs.mean(2), 1).unsqueeze(2),
            cls=False,
            received=None if self.received is None else taken(self.received, 1),
            projected=None if self.projected is None else taken(self.projected),
            question=None if self.question is None else Question(*(x[:1] for x in self.question)),
        )


class Tokens(NamedTuple):
    """The visual tokens that B images keep, before the projector.

    Attributes
    ----------
    features : Tensor[B, R, C]
        In the order in which the language model sees them. Rows after an image's count are 0.
    counts : Tensor[B], int64, or None
        Number of tokens of each image; None if every image has R.
    indices : Tensor[B, K], int64, or None
        The patches that were selected; None if the method selects none. A merging method has more tokens than these.
        Entries after the number of patches that an image keeps are arbitrary.
    scores : Tensor[B, N], float32, or None
        The scores by which they were selected.
    """

    features: Tensor
    counts: Tensor | None = None
    indices: Tensor | None = None
    scores: Tensor | None = None


class Ranking(NamedTuple):
    """Scores by which the patches of B images are ranked.

    Attributes
    ----------
    scores : Tensor[B, N] or [L, B, N] or [L, B, H, N], floating point
        Heads are averaged, then layers are combined.
    ensemble : {"sum", "mean", "max", "min"}
        How the L layers are combined.
    """

    scores: Tensor
    ensemble: str = "sum"


@dataclasses.dataclass(frozen=True)
class Method:
    """One method with its options.

    A subclass defines `ranking` if it keeps the patches with the largest scores, `select` if it selects patches in
    another way, or `reduce` if its tokens are not copies of patches.

    Every field but `backend` is an option of the method. A subclass with options checks their values in `check` and
    explains them in its docstring. Numbers of NumPy and 0-d tensors become Python's.

    Class attributes
    ----------------
    name : str
        Its name in the registry.
    scores : str
        What it ranks the patches by, in a few words.
    paper : str
        "arXiv ..."; empty for a control, and by default.
    needs : Needs
        What it needs from the vision tower.
    prunes : tuple of str
        Where it can drop tokens: "tower", before the projector; "language", after a layer of the language model.
    kv : str
        What the KV cache keeps by default in the layers before the one that prunes; see `VTCConfig`.
    adaptive : bool
        Whether the images of a batch can end up with different counts.
    per_view : bool
        Whether an image's base image and tiles can be reduced one by one, each to exactly the same number of tokens.
        Where K = N, an image has all of its tokens, if the method keeps patches or makes views smaller.
    joint : bool
        Whether it chooses among all patches of an image's tiles together, as if they were those of one image.
    rounds_up : bool
        Whether `ratio` rounds up to a number of tokens, or else to the nearest; see `vtc.config.kept_count`.
    operations : tuple of str
        The operations of `vtc.ops` that it runs. By default those of `reduce` here.
    selects : bool
        Whether `reduce` returns the indices of selected patches and their scores.
    reads : {"attention", "states"}
        What a method inside the language model needs of the layer before the one that prunes: the attention of the
        last prompt token, or the keys of all tokens and the hidden states after it. See `vtc.methods.fastv` and
        `vtc.methods.dart`.
    """

    name: ClassVar[str]
    scores: ClassVar[str] = "a score of its own"
    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs()
    prunes: ClassVar[tuple[str, ...]] = ("tower",)
    kv: ClassVar[str] = "compact"
    adaptive: ClassVar[bool] = False
    per_view: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    rounds_up: ClassVar[bool] = True
    operations: ClassVar[tuple[str, ...]] = ("topk", "compact")
    selects: ClassVar[bool] = True
    reads: ClassVar[str] = "attention"

    backend: str = "auto"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def distance(name: str) -> int:
            return next(at for at, each in enumerate(cls.__mro__) if name in vars(each))

        # They follow from how it selects, unless the class that says how also says which.
        if cls.reduce is Method.reduce and min(map(distance, ("ranking", "select"))) < distance("operations"):
            cls.operations = ("select",) if cls.only_ranks() else ("topk", "compact")

    def __post_init__(self) -> None:
        for name in self.options():
            object.__setattr__(self, name, plain(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Check the values of the options.

        Raises
        ------
        ValueError
            If a value is not accepted.
        """

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of the method's own options."""
        # torch.compile traces through __match_args__, the names of a dataclass's fields, and not dataclasses.fields.
        return tuple(name for name in cls.__match_args__ if name != "backend")

    def values(self) -> dict[str, Any]:
        """The values of its own options."""
        return {name: getattr(self, name) for name in self.options()}

    def given(self) -> dict[str, Any]:
        """Those of them that are not the defaults."""
        return {name: value for name, value in self.values().items() if value != getattr(type(self), name, _NO_DEFAULT)}

    def changed(self, **changes: Any) -> Method:
        """A copy with other options, or another `backend`."""
        return type(self)(**{"backend": self.backend, **self.values(), **changes})

    def without_effect(self) -> dict[str, str]:
        """Settings and options that have no effect with its options, and why, as a clause."""
        found = {} if self.required.cls_probs else {"fused": "it scores no vision layers by the attention of [CLS]"}
        if self.per_view:
            found["tiles"] = "each view of an image has the same number of tokens"
        if self.joint:
            found["tiles"] = "it chooses among the patches of all tiles of an image together"
        return found

    @classmethod
    def needs_cls(cls) -> bool:
        """Whether the vision tower must have a [CLS] token."""
        return cls.needs.cls_probs or cls.needs.query

    @classmethod
    def needs_prompt(cls) -> bool:
        """Whether it selects by the question, so that it needs the prompt that an image is in."""
        return cls.needs.question or cls.prunes_only_language()

    @classmethod
    def prunes_only_language(cls) -> bool:
        """Whether it can drop tokens inside the language model only."""
        return cls.prunes == ("language",)

    @classmethod
    def keeps_patches(cls) -> bool:
        """Whether its tokens are exactly the top-scoring patches. Only such a method works across tiles and frames."""
        own = cls.select is not Method.select or cls.ranking is not Method.ranking
        return own and cls.reduce is Method.reduce

    @classmethod
    def only_ranks(cls) -> bool:
        """Whether its `reduce` is one `vtc.ops.select` of its `ranking`."""
        return cls.reduce is Method.reduce and cls.select is Method.select and cls.ranking is not Method.ranking

    def scored_layers(self, end: int, depth: int) -> range:
        """The vision layers, counted from 0, whose attention gives `cls_probs` and the keys of the feature layer.

        Parameters
        ----------
        end : int
            `end - 1` is the feature layer.
        depth : int
            Number of layers of the tower.

        Returns
        -------
        range
            Empty if the method needs neither, else only the feature layer, whichever it is.

        Raises
        ------
        ValueError
            If the options ask for layers that do not exist or may not be scored.
        """
        needs = self.required
        return range(end - 1, end) if needs.cls_probs or needs.keys == "feature" else range(0)

    def received_layers(self, end: int, depth: int) -> tuple[int, ...]:
        """The vision layers, counted from 0, of which `received` is needed; `end` and `depth` as in `scored_layers`."""
        return (end - 1,) if self.required.received else ()

    def for_tower(self, cls: bool) -> Method:
        """The method as it runs with a vision tower with or without a [CLS] token."""
        return self

    @property
    def required(self) -> Needs:
        """What it needs with its options; by default `needs`."""
        return self.needs

    def view_grid(self, grid: tuple[int, int], keep: int) -> tuple[int, int]:
        """Rows and columns of patches that the tower is to see of a view of `grid`; the view is resized to them."""
        return grid

    def num_outputs(self, num_tokens: int, keep: int) -> int:
        """R of `reduce` for an image of `num_tokens` patches; an upper bound of its count if the method is adaptive.

        Raises
        ------
        ValueError
            If `keep` is too small for the method.
        """
        return keep

    def ranking(self, outputs: VisionOutputs) -> Ranking:
        """The scores by which the patches are ranked. The `keep` patches with the largest stay.

        Raises
        ------
        ValueError
            If the method does not rank patches by the image, or `outputs` lacks what the method needs.
        """
        raise ValueError(f"{self.name} does not select patches of the vision tower; use reduce, or another method")

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        """The indices of the selected patches `[B, keep]` int64, ascending, and their scores `[B, N]` float32.

        Raises
        ------
        ValueError
            As `ranking`.
        """
        scores, ensemble = self.ranked(outputs)
        total = torch.empty(outputs.patches.shape[:2], dtype=dtype_of_total(scores), device=scores.device)
        return ops.topk(scores, keep, ensemble=ensemble, total=total, backend=self.backend), total

    def ranked(self, outputs: VisionOutputs) -> Ranking:
        """What `ranking` returns, once its type and shape are those that it promises.

        Raises
        ------
        ValueError
            If they are not.
        """
        found: object = self.ranking(outputs)
        views, num_tokens = outputs.patches.shape[:2]
        if isinstance(found, Ranking) and isinstance(found.scores, Tensor):
            shape = tuple(found.scores.shape)
            if len(shape) in (2, 3, 4) and (shape[len(shape) > 2], shape[-1]) == (views, num_tokens):
                return found
            got = f"scores {list(shape)}"
        else:
            what = found.scores if isinstance(found, Ranking) else found
            got = f"{'scores that are ' if isinstance(found, Ranking) else ''}a {type(what).__name__}"
        raise ValueError(
            f"ranking of method {self.name!r} must return vtc.methods.Ranking(scores), with scores "
            f"{[views, num_tokens]}, [L, {views}, {num_tokens}] or [L, {views}, H, {num_tokens}], got {got}"
        )

    def selected(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        """What `select` returns, once its types and shapes are those that it promises.

        Whether indices ascend and scores are numbers is not looked at: that would synchronise with the device.

        Raises
        ------
        ValueError
            If they are not.
        """
        found: object = self.select(outputs, keep)
        views, num_tokens = outputs.patches.shape[:2]
        if isinstance(found, tuple) and [isinstance(each, Tensor) for each in found] == [True, True]:
            indices, scores = found
            if (indices.dtype, indices.shape, scores.shape) == (torch.int64, (views, keep), (views, num_tokens)):
                return indices, scores
            got = f"{indices.dtype} {list(indices.shape)} and {scores.dtype} {list(scores.shape)}"
        else:
            got = f"a {type(found).__name__}"
        raise ValueError(
            f"select of method {self.name!r} must return the indices, torch.int64 {[views, keep]}, and the scores, "
            f"{[views, num_tokens]}, got {got}"
        )

    def reduce(self, outputs: VisionOutputs, keep: int) -> Tokens:
        """Reduce the patches to `num_outputs(N, keep)` tokens. The caller has checked that 1 <= keep <= N.

        Raises
        ------
        ValueError
            If `outputs` lacks what the method needs, or `keep` is too small for it.
        """
        if self.only_ranks():
            scores, ensemble = self.ranked(outputs)
            features, indices, total = ops.select(
                scores, outputs.patches, keep, ensemble=ensemble, backend=self.backend
            )
            return Tokens(features, None, indices, total)
        indices, scores = self.selected(outputs, keep)
        return Tokens(ops.compact(outputs.patches, indices, backend=self.backend), None, indices, scores)

    def require(self, outputs: VisionOutputs, field: str) -> Any:
        """What `outputs.field` holds.

        Raises
        ------
        ValueError
            If it is None.
        """
        value = getattr(outputs, field)
        if value is None:
            raise ValueError(
                f"{self.name} needs {field} of the vision tower, got None; pass what {self.required} asks for"
            )
        return value


def scores_of(order: Tensor, num_tokens: int) -> Tensor:
    """Scores `[B, N]` float32 for patches that are chosen one after the other, `order` `[B, K]` int64.

    The patch that is chosen i-th, from 0, scores 1 - i / K, and one that is not chosen 0: the k best are the first k.
    """
    steps = torch.arange(order.shape[1], device=order.device, dtype=torch.float32)
    scores = torch.zeros((len(order), num_tokens), dtype=torch.float32, device=order.device)
    return scores.scatter(1, order, (1 - steps / order.shape[1]).expand(order.shape))


def keep_patches(is_image: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Which tokens of the prompts stay when tokens are dropped inside the language model.

    Parameters
    ----------
    is_image : Tensor[B, L], bool
        True at image tokens. Each image has `num_tokens` of them.
    indices : Tensor[images, K], int64
        From `Method.select`. The images of the first prompt come first, in their order, then those of the second.
    num_tokens : int
        N.

    Returns
    -------
    Tensor[B, L], bool
        True at every text token, and at the K selected tokens of each image.
    """
    kept = torch.zeros((len(indices), num_tokens), dtype=torch.bool, device=indices.device).scatter(1, indices, True)
    return (~is_image).masked_scatter(is_image, kept.flatten())

"""CDPruner: diverse patches that go with the question, by a determinantal point process."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, VisionOutputs, scores_of
from vtc.methods.question import sum_of_tokens, token_ids, word_weights


@dataclasses.dataclass(frozen=True)
class CDPruner(Method):
    """Greedy choice of K diverse and relevant patches: MAP of a determinantal point process (arXiv 2506.10967).

    ::

        v       = projector(x);   z = the words of the question, as the language model embeds them
        r_i     = mean_t cos(v_i, z_t),  scaled:  (r_i - min r + 1e-6) / (max r - min r)      per image
        L[i, j] = r_i · cos(v_i, v_j) · r_j
        K times:  choose n with the largest det(L[S + n, S + n]) / det(L[S, S]),  S = the chosen ones

    The K chosen patches stay, in their order. The score of the i-th that is chosen is 1 - i / K. A tie goes to the
    lower index. It needs no [CLS] token. The question is the text of the prompt that the image is in, its template
    included. All tiles of an image count together. It needs all tokens after the projector, so that one runs for all,
    and for the kept ones again.

    This is the variant that takes the relevance from the language model's input embeddings, as OpenVINO runs it on
    models without a text tower. On LLaVA the authors take it from CLIP's text tower, which is no part of a LLaVA
    checkpoint. **The published figures are those of the text tower's variant: for LLaVA no quality of this one is
    published.**

    The choice is K steps of PyTorch, 29 to 36 launches each on a GPU, for the whole batch at once and without waiting
    for the device. Its state is K x N numbers per image in float32.

    Parameters
    ----------
    ignore : tuple of int
        Token ids that do not count as words of the question; see `vtc.methods.question.ignored_ids`. If no other token
        is left, the whole text counts. Default (): all text counts.
    """

    name: ClassVar[str] = "cdpruner"
    scores: ClassVar[str] = "likeness to the question's words, and unlike patches"
    paper: ClassVar[str] = "arXiv 2506.10967"
    needs: ClassVar[Needs] = Needs(projected=True, question=True)
    operations: ClassVar[tuple[str, ...]] = ("similarity", "compact")
    joint: ClassVar[bool] = True

    ignore: tuple[int, ...] = ()

    def check(self) -> None:
        object.__setattr__(self, "ignore", token_ids("ignore", self.ignore))

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        projected, relevance = self.require(outputs, "projected"), self.relevance(outputs)
        likeness = ops.similarity(projected, projected, backend=self.backend)
        order = _most_probable(likeness, relevance, keep)
        return order.sort(dim=1).values, scores_of(order, relevance.shape[1])

    def relevance(self, outputs: VisionOutputs) -> Tensor:
        """The scaled r of every patch, float32 `[B, N]`; 1 where all patches of an image are equally relevant."""
        question = self.require(outputs, "question")
        cosines = ops.similarity(question.embeddings, self.require(outputs, "projected"), backend=self.backend)
        mean = sum_of_tokens(cosines * word_weights(question, self.ignore).unsqueeze(2))
        low, high = mean.aminmax(dim=1, keepdim=True)
        return torch.where(high > low, (mean - low + 1e-6) / (high - low), 1.0)


def _most_probable(likeness: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """Greedy MAP of the process with the kernel relevance · likeness · relevance: `[B, keep]` int64, in their order.

    By the update of the Cholesky factor of Chen, Zhang and Zhou (arXiv 1709.05135). A gain of at most N · 2**-23 times
    the patch's own first gain is rounding, and counts as 0. So when the chosen patches span the others, the lowest
    index is next.

    Parameters
    ----------
    likeness : Tensor[B, N, N], float32
    relevance : Tensor[B, N], float32
    """
    num_images, num_tokens = relevance.shape
    gain = relevance * relevance * likeness.diagonal(dim1=1, dim2=2)  # the squares of the next factor's diagonal
    rounding = gain * (num_tokens * torch.finfo(torch.float32).eps)
    rest = torch.ones_like(gain, dtype=torch.bool)  # not chosen
    factor = gain.new_zeros((num_images, keep, num_tokens))
    lowest = torch.finfo(gain.dtype).min
    order = []
    for step in range(keep):
        competes = gain.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~rest, float("-inf"))
        chosen = competes.argmax(dim=1, keepdim=True)  # the first of equals
        order.append(chosen)
        rest = rest.scatter(1, chosen, False)
        at = chosen.unsqueeze(2)
        row = likeness.gather(1, at.expand(-1, 1, num_tokens)).squeeze(1) * relevance.gather(1, chosen) * relevance
        if step:
            before = factor[:, :step]
            row = row - sum_of_tokens(before * before.gather(2, at.expand(-1, step, 1)))
        square = gain.gather(1, chosen)
        new = torch.where(square > 0, row / square.sqrt(), 0.0)
        factor[:, step] = new
        gain = gain - new * new
        gain = gain.masked_fill(gain <= rounding, 0.0)
    return torch.cat(order, dim=1)

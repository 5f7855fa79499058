"""MMTok: greedy coverage of the image and of the question's words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, VisionOutputs, scores_of
from vtc.methods.checks import check_positive
from vtc.methods.question import token_ids, word_weights


@dataclasses.dataclass(frozen=True)
class MMTok(Method):
    """Greedy maximum coverage of the image's patches and of the question's words (arXiv 2508.18264).

    ::

        Q[i, n] = softmax_n(cos(x_i, x_n) / τ)        N patches x of the feature layer
        T[t, n] = softmax_n(cos(z_t, v_n) / τ_text)   m words z, as the language model embeds them; v = projector(x)
        rows    = alpha / N · Q  above  1 / m · T
        K times:  choose n with the largest Σ_r max(0, rows[r, n] - covered[r])
                  covered[r] = max(covered[r], rows[r, n])

    The K chosen patches stay, in their order. The score of the i-th that is chosen is 1 - i / K. It needs no [CLS]
    token. The question is the text of the prompt that the image is in, its template included, so an image keeps other
    patches for another question, and a cached prefix of one question does not serve another. It needs all tokens after
    the projector, so that one runs for all, and for the kept ones again.

    An image of LLaVA-NeXT covers the patches of all its tiles together, without newline tokens. Of a video, each frame
    is covered alone.

    The paper counts no function words and no special tokens, and it leaves fixed instructions out::

        ignore = vtc.methods.question.ignored_ids(processor.tokenizer, "USER: ASSISTANT:")

    Its published figures come from images that are padded to a square.

    Parameters
    ----------
    temperature : float
        τ, positive. Default 0.2, as in the paper.
    text_temperature : float
        τ_text, positive. Default 0.02, as in the paper for LLaVA.
    alpha : float
        At least 0: how much the image counts beside the question. Default 0.5, as in the paper.
    ignore : tuple of int
        Token ids that do not count as words of the question; see `vtc.methods.question.ignored_ids`. If no other token
        is left, the whole text counts. Default (): all text counts.
    """

    name: ClassVar[str] = "mmtok"
    scores: ClassVar[str] = "coverage of similar patches, and of the question's words"
    paper: ClassVar[str] = "arXiv 2508.18264"
    needs: ClassVar[Needs] = Needs(projected=True, question=True)
    operations: ClassVar[tuple[str, ...]] = ("similarity", "coverage", "compact")
    joint: ClassVar[bool] = True

    temperature: float = 0.2
    text_temperature: float = 0.02
    alpha: float = 0.5
    ignore: tuple[int, ...] = ()

    def check(self) -> None:
        check_positive("temperature", self.temperature)
        check_positive("text_temperature", self.text_temperature)
        check_positive("alpha", self.alpha, or_zero=True)
        object.__setattr__(self, "ignore", token_ids("ignore", self.ignore))

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        indices, order = ops.coverage(self.cover(outputs), keep, backend=self.backend)
        return indices, scores_of(order, outputs.patches.shape[1])

    def cover(self, outputs: VisionOutputs) -> Tensor:
        """The rows that are to be covered, float32 `[B, N + T, N]`, those of the question last. Columns are contiguous.

        A token that is no word has a row of zeros. So an image's sums do not depend on the length of the others'
        questions.
        """
        patches, projected = outputs.patches, self.require(outputs, "projected")
        question = self.require(outputs, "question")
        image = ops.similarity(patches, patches, temperature=self.temperature, backend=self.backend)
        text = ops.similarity(question.embeddings, projected, temperature=self.text_temperature, backend=self.backend)
        weights = word_weights(question, self.ignore).unsqueeze(1)
        return torch.cat([image.mT * (self.alpha / patches.shape[1]), text.mT * weights], dim=2).mT

"""The question that each image's prompt asks, for methods that select by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vtc.hf.lone_image import LoneImage
from vtc.hf.prompt import Prompt
from vtc.hf.settings import Settings
from vtc.methods import Question


@torch.no_grad()
def question_of(
    settings: Settings, prompt: Prompt | LoneImage, sizes: Mapping[int, Sequence[int]], token: int
) -> Question:
    """The text around each image whose placeholder is `token`: that of the row it is in, without synchronising.

    `sizes` are N of each image, as `Prompt.read` got them.
    """
    ids, is_text = prompt.text(sizes)
    ids = ids.masked_fill(~is_text, 0)  # padding need not have an embedding
    return repeated(Question(settings.base.get_input_embeddings()(ids), ids, is_text), prompt.images[token])


def repeated(question: Question, counts: Sequence[int]) -> Question:
    """The question `[B, ...]` with row b `counts[b]` times."""
    if all(count == 1 for count in counts):
        return question
    return Question(*(_repeated(each, counts) for each in question))


def _repeated(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    rows = [row.expand(count, *tensor.shape[1:]) for row, count in zip(tensor.split(1), counts, strict=True)]
    return torch.cat(rows)

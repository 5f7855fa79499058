"""Held-out questions to the bundled model: batches of them, its answers, and how many are right."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from vtc import tiny
from vtc.api import compress
from vtc.tiny.scenes import FAMILIES, Question, Scene


def prepare(model: Any, processor: Any, questions: Sequence[tuple[Scene, Question]]) -> Any:
    """One left-padded batch of model inputs for all of `questions`, on the model's device."""
    images, prompts = zip(*((scene.image, tiny.prompt(question.text)) for scene, question in questions), strict=True)
    inputs = processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def batches(model: Any, processor: Any, questions: Sequence[tuple[Scene, Question]], size: int = 16) -> list[Any]:
    """`questions` as batches of `size` from `prepare`, in their order."""
    return [prepare(model, processor, questions[i : i + size]) for i in range(0, len(questions), size)]


class Answers(NamedTuple):
    """A model's answers, and what they cost."""

    texts: list[str]  # in the order of the questions
    tokens: float | None  # visual tokens left per image, on average; None without compression
    seconds: float


def answer(model: Any, processor: Any, prepared: Sequence[Any], **setting: Any) -> Answers:
    """The model's greedy answers.

    Parameters
    ----------
    model, processor
        What `vtc.tiny.load` returned.
    prepared : sequence
        From `batches`, for instance of `balanced_questions("test", 1000)`.
    **setting
        Options of `vtc.compress`; without any, the model answers as it is configured now.
    """
    texts: list[str] = []
    left, begun = 0, time.perf_counter()
    with compress(model, **setting) if setting else contextlib.nullcontext() as run:
        for batch in prepared:
            texts += greedy(model, processor, batch, max_new_tokens=3)
            left += (run.tokens_after or 0) * len(batch["input_ids"]) if run else 0
    return Answers(texts, left / len(texts) if run else None, time.perf_counter() - begun)


def greedy(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """Greedy answers of any LLaVA, one per row of the batch."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def accuracy(questions: Sequence[tuple[Scene, Question]], answers: Sequence[str]) -> dict[str, float]:
    """Share of right answers for each family and, under "all", for all questions; each between 0 and 1."""
    right = [question.answer == given for (_, question), given in zip(questions, answers, strict=True)]
    table = {}
    for family in FAMILIES:
        mine = [ok for ok, (_, question) in zip(right, questions, strict=True) if question.family == family]
        if mine:
            table[family] = sum(mine) / len(mine)
    table["all"] = sum(right) / len(right)
    return table

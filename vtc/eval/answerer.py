"""Prepare batches of questions, and answer them with one model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vtc.api import compress
from vtc.eval.protocol import Prompt, Protocol
from vtc.eval.question import Answer, Question
from vtc.eval.setting import Setting
from vtc.hf.settings import Run
from vtc.images import ImageError


class Budget(NamedTuple):
    """Visual tokens of an image: those that stay at last, and the mean over the language model's layers.

    See `vtc.config.token_layers`.
    """

    visual_tokens: float
    token_layers: float


@dataclass
class Batch:
    """Questions that are answered at once. All have one image, or none has.

    Attributes
    ----------
    lines : list of int
        Of the questions.
    inputs : dict of Tensor
        For the model, on the CPU. The first dimension of each is that of `lines`.
    seconds : float
        What their preparation took.
    skipped : list of Answer
        Questions whose image cannot be read. They are not in `lines`.
    """

    lines: list[int]
    inputs: dict[str, Tensor]
    seconds: float = 0.0
    skipped: list[Answer] = field(default_factory=list)

    def part(self, rows: slice) -> Batch:
        """Some of its questions."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        lines = self.lines[rows]
        return replace(
            self, lines=lines, inputs=inputs, seconds=self.seconds * len(lines) / len(self.lines), skipped=[]
        )


def prepare(protocol: Protocol, questions: Sequence[Question]) -> Batch:
    """Read the images of the questions and prepare the model's inputs."""
    begun = time.perf_counter()
    lines, prompts, skipped = [], [], []
    for question in questions:
        try:
            images = [] if question.image is None else [_rgb(question)]
        except ImageError as error:
            skipped.append(Answer(question.line, "", skipped=str(error)))
            continue
        lines.append(question.line)
        prompts.append(Prompt(question.text, images))
    inputs = protocol.prepare(prompts) if prompts else {}
    return Batch(lines, inputs, time.perf_counter() - begun, skipped)


def _rgb(question: Question) -> Image.Image:
    """The image of a question. Raises ImageError if it cannot be read, or not converted."""
    if question.image is None:
        raise ImageError(f"question {question.line} has no image")
    image = question.image.open()
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"an image of mode {image.mode} cannot be converted to RGB ({error})") from error


class Answerer:
    """A model that answers batches, greedily.

    Parameters
    ----------
    model
        A LLaVA of transformers. Nothing on it changes.
    processor
        Of the model.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def answer(self, batch: Batch, setting: Setting, max_new_tokens: int) -> list[Answer]:
        """The answers to the batch, in its order, without those that were skipped."""
        if not batch.lines:
            return []
        begun = time.perf_counter()
        texts, new, kept = self.generate(batch.inputs, setting, max_new_tokens=max_new_tokens)
        size = len(batch.lines)
        each = (time.perf_counter() - begun) / size
        prompts = batch.inputs["attention_mask"].sum(1).tolist()
        return [
            Answer(
                line,
                text,
                kept.visual_tokens if kept else None,
                prompt,
                count,
                size,
                round(each, 6),
                round(batch.seconds / size, 6),
                token_layers=round(kept.token_layers, 2) if kept else None,
            )
            for line, text, prompt, count in zip(batch.lines, texts, prompts, new, strict=True)
        ]

    def generate(
        self, inputs: dict[str, Tensor], setting: Setting, **arguments: Any
    ) -> tuple[list[str], list[int], Budget | None]:
        """Texts, numbers of new tokens, and the visual tokens of an image, for prepared inputs.

        `arguments` go to the model's `generate()`. Decoding is greedy unless they say otherwise.
        """
        out, run = self._run(inputs, setting, **arguments)
        new = out.cpu()[:, inputs["input_ids"].shape[1] :]  # waits for the device
        texts = [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        kept = None
        if run is not None and run.tokens_after is not None and run.token_layers is not None:
            kept = Budget(run.tokens_after, run.token_layers)
        if run is None and "pixel_values" in inputs:
            image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
            tokens = (inputs["input_ids"] == image).sum().item() / len(inputs["input_ids"])
            kept = Budget(tokens, tokens)
        return texts, [self._length(row) for row in new], kept

    def log_likelihoods(
        self, inputs: dict[str, Tensor], setting: Setting, continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """For each prompt, the log-probability of its continuation, and whether greedy decoding would say it.

        The continuation is forced upon `generate()`, so that the prompt is compressed as for an answer. It must not
        hold the end-of-sequence token.

        Parameters
        ----------
        continuations : sequence of sequence of int
            The token ids that follow each prompt, at least one. The log-probability is the sum over them, in fp32.
        """
        length, prompt_length = max(map(len, continuations)), inputs["input_ids"].shape[1]

        def forced(row: int, ids: Tensor) -> list[int]:
            return [continuations[row][min(len(ids) - prompt_length, len(continuations[row]) - 1)]]

        out, _ = self._run(
            inputs,
            setting,
            max_new_tokens=length,
            prefix_allowed_tokens_fn=forced,
            output_logits=True,
            return_dict_in_generate=True,
        )
        results = []
        for row, ids in enumerate(continuations):
            logits = torch.stack([step[row] for step in out.logits[: len(ids)]]).float()  # before they are forced
            target = torch.tensor(ids, device=logits.device)
            log_probs = logits.log_softmax(-1).gather(1, target[:, None])
            results.append((log_probs.sum().item(), bool((logits.argmax(-1) == target).all())))
        return results

    def block(self, setting: Setting, inputs: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[Run | None]:
        """A block in which the model answers these inputs as `setting` says; without a run if nothing is compressed."""
        if setting.compresses and "pixel_values" in inputs:
            return compress(self.model, method=setting.method, **setting.options)
        return contextlib.nullcontext()

    def _run(self, inputs: dict[str, Tensor], setting: Setting, **arguments: Any) -> tuple[Any, Any]:
        """What `generate()` returns, on the device, and the run of the block, if there is one.

        Raises
        ------
        ValueError
            If the model has no embedding for one of the ids: a GPU would stop with an error of its own.
        """
        rows, largest = self.model.get_input_embeddings().num_embeddings, int(inputs["input_ids"].max())
        if largest >= rows:
            raise ValueError(
                f"the tokenizer gives the id {largest}, and the model has {rows} embeddings; take both from one "
                "checkpoint"
            )
        on_device = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        # None: a checkpoint's temperature and top_p, which greedy decoding ignores, would be warned of.
        greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if not arguments.get("do_sample"):
            greedy |= {"temperature": None, "top_p": None, "top_k": None}
        with self.block(setting, inputs) as run:
            return self.model.generate(**on_device, **{**greedy, **arguments}), run

    def _length(self, new: Tensor) -> int:
        """The number of tokens of one row up to and with the first end of sequence."""
        ends = self.model.generation_config.eos_token_id
        ids = new.tolist()
        for number, token in enumerate(ids, start=1):
            if token in (ends if isinstance(ends, list) else [ends]):
                return number
        return len(ids)

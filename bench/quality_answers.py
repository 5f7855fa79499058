"""The answers of the bundled model in many settings. Its vision tower sees each batch of images once.

The settings differ after the tower, which takes most of the time on a CPU. So the first setting runs it, and its hidden
states serve the others. Of the scored layers only the projections to queries and keys run again, as VTC reads them
there. The answers are those of single runs, bit by bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from vtc.eval.answerer import Answerer, prepare
from vtc.eval.engine import Job, batches_of
from vtc.eval.model import ModelSpec
from vtc.eval.question import Answer, Question
from vtc.eval.setting import Setting
from vtc.eval.tasks.scenes import Scenes
from vtc.hf.towers import tower_of


def answer_all(
    task: Scenes,
    settings: Sequence[Setting],
    batch_size: int,
    processes: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[Answer]]:
    """For each setting, the answers to all questions, in their order.

    `advance` gets the number of questions that every setting has answered, batch by batch.
    """
    answer = functools.partial(_answer, protocol=task.protocol, settings=settings, max_new_tokens=task.max_new_tokens)
    batches = batches_of(task.questions, batch_size)
    found: list[list[Answer]] = [[] for _ in settings]
    with contextlib.ExitStack() as stack:
        if processes > 1:
            pool = ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))
            results: Any = stack.enter_context(pool).map(answer, batches)
        else:
            results = map(answer, batches)
        for batch, answers in zip(batches, results, strict=True):
            for own, new in zip(found, answers, strict=True):
                own += new
            advance(len(batch))
    return [sorted(own, key=lambda each: each.line) for own in found]


def _answer(
    questions: Sequence[Question], protocol: str, settings: Sequence[Setting], max_new_tokens: int
) -> list[list[Answer]]:
    """The answers to one batch, setting by setting."""
    answerer = _answerer()
    batch = prepare(Job(ModelSpec(), protocol, Setting(), max_new_tokens).prompting(), questions)
    with one_pass(answerer.model.base_model.vision_tower):
        return [answerer.answer(batch, setting, max_new_tokens) for setting in settings]


@functools.cache
def _answerer() -> Answerer:
    return Answerer(ModelSpec().load(), ModelSpec().processor())


@contextlib.contextmanager
def one_pass(tower: Any) -> Iterator[None]:
    """Inside the block, `tower` runs once for the same pixels; later calls get the hidden states of the first.

    Hooks on the projections to queries and keys are called each time, with the same values.
    """
    run = tower.forward
    layers = [_layer_of(tower, attention) for attention in tower_of(tower.config).attentions_of(tower)]
    seen: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    @functools.wraps(run)
    def forward(pixel_values: Tensor, **arguments: Any) -> Any:
        for pixels, states in seen:
            if pixels.shape == pixel_values.shape and torch.equal(pixels, pixel_values):
                for (layer, attention), hidden in zip(layers, states[:-1], strict=True):
                    projections = [each for each in (attention.q_proj, attention.k_proj) if each._forward_hooks]
                    normed = layer.layer_norm1(hidden) if projections else hidden
                    for projection in projections:
                        projection(normed)
                return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)
        outputs = run(pixel_values, **{**arguments, "output_hidden_states": True})
        seen.append((pixel_values, outputs.hidden_states))
        return outputs

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def _layer_of(tower: Any, attention: Any) -> tuple[Any, Any]:
    """The layer that has an attention module, and the module."""
    return next((module, attention) for module in tower.modules() if attention in module._modules.values())

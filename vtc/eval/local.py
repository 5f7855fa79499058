"""Answer batches in this process. Workers prepare the next ones meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from vtc.eval.answerer import Answerer, Batch, prepare
from vtc.eval.engine import Cost, Job
from vtc.eval.memory import is_out_of_memory
from vtc.eval.model import ModelSpec
from vtc.eval.protocol import Protocol
from vtc.eval.question import Answer, Question

_log = logging.getLogger("vtc")


class Prepared(Dataset[Batch]):
    """Item i is batch i, prepared."""

    def __init__(self, protocol: Protocol, batches: Sequence[Sequence[Question]]) -> None:
        self.protocol, self.batches = protocol, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        return prepare(self.protocol, self.batches[number])


class LocalEngine:
    """One model in this process. It is loaded when the first batch is asked for, and once for many runs.

    Attributes
    ----------
    largest : int, optional
        The largest batch that fits into memory in this run; None as long as none was too large.
    """

    models = 1

    def __init__(self) -> None:
        self.largest: int | None = None
        self._loaded: tuple[ModelSpec, Answerer] | None = None

    def answers(self, job: Job, batches: Sequence[Sequence[Question]], cost: Cost) -> Iterator[list[Answer]]:
        """The answers to each batch, in the order of the batches."""
        if not batches:
            return
        self.largest = None  # another setting may need less
        prompting = job.prompting()
        answerer = self.answerer(job.spec, cost)
        # The default of collate_fn for batch_size=None leaves a Batch as it is.
        prepared = iter(DataLoader(Prepared(prompting, batches), batch_size=None, num_workers=job.workers))
        cold = job.spec.device.startswith("cuda")
        while True:
            begun = time.perf_counter()
            batch = next(prepared, None)
            cost.wait += time.perf_counter() - begun
            if batch is None:
                return
            if cold and batch.lines:
                begun = time.perf_counter()
                self.answer(
                    answerer, batch, job
                )  # kernels are compiled and libraries start, which no figure should show
                cost.load += time.perf_counter() - begun
                cold = False
            yield [*batch.skipped, *self.answer(answerer, batch, job)]

    def answerer(self, spec: ModelSpec, cost: Cost | None = None) -> Answerer:
        """The loaded model."""
        if self._loaded is None or self._loaded[0] != spec:
            begun = time.perf_counter()
            self._loaded = spec, Answerer(spec.load(), spec.processor())
            if cost is not None:
                cost.load += time.perf_counter() - begun
        return self._loaded[1]

    def answer(self, answerer: Answerer, batch: Batch, job: Job) -> list[Answer]:
        """The answers to one batch, in smaller ones if it is too large for the memory."""
        size = len(batch.lines)
        if self.largest is not None and size > self.largest:
            parts = [batch.part(slice(i, i + self.largest)) for i in range(0, size, self.largest)]
            return [answer for part in parts for answer in self.answer(answerer, part, job)]
        try:
            return answerer.answer(batch, job.setting, job.max_new_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size < 2:
                raise
            message = str(error).splitlines()[0]
        # Here the exception is gone, and with it the tensors of its frames.
        self.largest = (size + 1) // 2
        _log.warning("out of memory with a batch of %d (%s); going on with %d", size, message, self.largest)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.answer(answerer, batch, job)

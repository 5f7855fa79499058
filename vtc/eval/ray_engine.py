"""Answer batches on a Ray cluster, through Ray Data: actors with one model each, and Ray's own restarts."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.utils.logging import disable_progress_bar

from vtc.eval.answerer import prepare
from vtc.eval.engine import Cost, Job
from vtc.eval.local import LocalEngine
from vtc.eval.question import Answer, Question
from vtc.eval.result import versions


class RayEngine:
    """Models side by side, each in an actor of its own, on every machine of the cluster that Ray is connected to.

    Without a cluster (`RAY_ADDRESS`, or `ray start` on this machine) it starts one on this machine. The questions
    travel to the actors with the paths of their images: data and model must lie at the same place on every machine,
    and vtc must be installed there. Only this process stores answers.

    If the process of an actor is killed, Ray starts another and repeats its batch. An exception ends the run. Out of
    memory: the actor answers that batch, and those after it, in smaller ones.

    What it adds to the cost: `load` is the time until the first model was ready to answer, Ray's start included. `wait`
    is what the models waited for, between two batches and while they prepared one, Ray's work included.

    Parameters
    ----------
    models : int
        How many actors. Each takes a GPU if the model runs on one, else a CPU.

    Raises
    ------
    ValueError
        If Ray is not installed, or the cluster has too few GPUs or CPUs.
    """

    def __init__(self, models: int = 1) -> None:
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"--engine ray needs Ray, which cannot be imported ({error}); install it: pip install 'vtc-cls[ray]'"
            ) from error
        if models < 1:
            raise ValueError(f"the number of actors must be at least 1, got {models}")
        self.models = models

    def answers(self, job: Job, batches: Sequence[Sequence[Question]], cost: Cost) -> Iterator[list[Answer]]:
        """The answers to each batch, in any order, as soon as its actor has them."""
        if not batches:
            return
        import ray

        begun = time.perf_counter()
        if not ray.is_initialized():
            ray.init(log_to_driver=True)
        kind = self._require_resources(job)
        first = True
        rows = self._rows(job, batches, {"num_gpus" if kind == "GPU" else "num_cpus": 1})
        while True:
            try:
                row = next(rows, None)
            except ray.exceptions.RayError as error:
                raise _cause(error) from error
            if row is None:
                return
            done: Done = pickle.loads(row["done"])
            if first:
                cost.load += time.perf_counter() - begun - done.seconds
            cost.wait += done.waited
            first = False
            yield done.answers

    def _require_resources(self, job: Job) -> str:
        """The resource that an actor takes. Raises ValueError if there is too little of it: Ray would wait for ever."""
        import ray

        kind = "GPU" if job.spec.device.startswith("cuda") else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if there < self.models:
            raise ValueError(
                f"{self.models} actors need {self.models} {kind}s, and the cluster has {there}; pass fewer --actors"
            )
        return kind

    def _rows(self, job: Job, batches: Sequence[Sequence[Question]], resources: dict[str, Any]) -> Iterator[Any]:
        import ray

        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True  # else the exception of an actor arrives as text alone
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # it takes an actor's bug for one of Ray's
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are none
        with ray.data.DataContext.current(context):
            # One batch is one block: the answers of a block come back together.
            data = ray.data.from_items(
                [{"batch": ray.cloudpickle.dumps(list(batch))} for batch in batches], override_num_blocks=len(batches)
            )
            # The defaults restart an actor whose process died, repeat its batch, and end the run on an exception.
            done = data.map_batches(
                Actor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=self.models, max_tasks_in_flight_per_actor=2),
                fn_constructor_args=(job, versions()),
                **resources,
            )
            return iter(done.iter_rows())


@dataclasses.dataclass(frozen=True)
class Done:
    """What an actor returns for one batch. Seconds are of the actor's clock."""

    answers: list[Answer]
    seconds: float
    waited: float


class Actor:
    """One model. Ray makes it where it finds a free GPU or CPU."""

    def __init__(self, job: Job, driver: dict[str, str | None]) -> None:
        if versions() != driver:
            raise ValueError(f"this machine would answer otherwise: it has {versions()}, the driver has {driver}")
        device = "cuda" if job.spec.device.startswith("cuda") else job.spec.device  # Ray shows an actor its GPU alone
        self.job = dataclasses.replace(job, spec=dataclasses.replace(job.spec, device=device))
        disable_progress_bar()  # of loading
        self.prompting = job.prompting()
        self.engine = LocalEngine()
        self.answerer = self.engine.answerer(self.job.spec)
        self.ended: float | None = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        batch = prepare(self.prompting, pickle.loads(rows["batch"][0]))
        waited = time.perf_counter() - (self.ended or begun)
        answers = [*batch.skipped, *self.engine.answer(self.answerer, batch, self.job)]
        self.ended = time.perf_counter()
        return {"done": [pickle.dumps(Done(answers, self.ended - begun, waited))]}


def _cause(error: BaseException) -> BaseException:
    """The exception of the actor that Ray has wrapped, or the error itself."""
    import ray

    inner: BaseException | None = error
    while isinstance(inner, ray.exceptions.RayError):
        inner = getattr(inner, "cause", None) or inner.__cause__
    return inner or error

"""The engine on Ray, with CPU actors: one is killed half-way, then the driver; and what ends a run."""

import dataclasses
import pickle
import signal
import sys
import time
from dataclasses import dataclass

import psutil
import pytest
import torch

ray = pytest.importorskip("ray")

from tests.support.attempts import Case, lines, start, texts  # noqa: E402
from vtc.eval.answerer import Answerer  # noqa: E402
from vtc.eval.engine import Cost, Job, batches_of  # noqa: E402
from vtc.eval.model import ModelSpec  # noqa: E402
from vtc.eval.question import EncodedImage  # noqa: E402
from vtc.eval.ray_engine import Actor, RayEngine, _cause  # noqa: E402
from vtc.eval.result import versions  # noqa: E402
from vtc.eval.run import Options, Run  # noqa: E402
from vtc.eval.setting import Setting  # noqa: E402
from vtc.eval.tasks.scenes import Scenes  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file
JOB = Job(ModelSpec(), "hf", Setting("vtc-cls", {"keep": 8}), 3)
COUNT = 16


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster on this machine."""
    context = ray.init(num_cpus=4, include_dashboard=False)
    yield context.address_info["address"]
    ray.shutdown()


def actors():
    """The processes of Ray's that hold a model."""
    everyone = psutil.process_iter(["cmdline"])
    return [each for each in everyone if "ray::MapWorker" in " ".join(each.info["cmdline"] or [])]


def wait_for(condition, seconds=300):
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@dataclass(frozen=True)
class Slow:
    """An image that takes a while, so that there is time to kill."""

    image: object

    def open(self):
        time.sleep(0.2)
        return self.image.open()


@dataclass(frozen=True)
class Buggy:
    """An image whose decoder has a bug."""

    def open(self):
        raise ZeroDivisionError("a bug in an actor")


def test_killed_actors_and_a_killed_driver_lose_and_double_nothing(cluster, tmp_path):
    setting, task = Setting("vtc-cls", {"keep": 8}), Scenes(count=COUNT)
    Run(task, setting, ModelSpec(), Options(tmp_path / "whole", quiet=True)).run()
    whole = texts(tmp_path / "whole")

    driver = start(Case(questions=COUNT, actors=2, address=cluster), tmp_path / "out")
    wait_for(lambda: len(lines(tmp_path / "out")) >= 2)  # answers are stored while others are asked
    assert driver.is_alive()
    driver.kill()
    driver.join(30)
    assert driver.exitcode == -signal.SIGKILL
    before = lines(tmp_path / "out")
    assert 2 <= len(before) < COUNT
    wait_for(lambda: not actors())  # Ray ends the actors of a driver that is gone

    # Resume in this process; one actor is killed when the second new answer has arrived.
    slow = [dataclasses.replace(question, image=Slow(question.image)) for question in task.questions]
    task.questions[:] = slow
    engine = Killing(2)
    result = Run(task, setting, ModelSpec(), Options(tmp_path / "out", quiet=True), engine).run()
    assert len(engine.killed) == 1
    assert result.complete
    assert texts(tmp_path / "out") == whole
    counts = lines(tmp_path / "out")
    assert sorted(counts) == list(range(COUNT))
    assert set(counts.values()) == {1}
    assert result.timing.whole_seconds is None  # the killed driver's is unknown
    assert engine.cost.load > 0
    assert engine.cost.wait > 0.2 * (COUNT - len(before))  # the images took that long


class Killing(RayEngine):
    """It kills one of its actors half-way."""

    killed = ()

    def answers(self, job, batches, cost):
        self.cost = cost
        for number, answers in enumerate(super().answers(job, batches, cost)):
            yield answers
            if number == 1:
                victim = actors()[0]
                victim.kill()
                self.killed = [victim.pid]


def test_an_exception_in_an_actor_ends_the_run_with_it(cluster):
    questions = list(Scenes(count=3).questions)
    questions[1] = dataclasses.replace(questions[1], image=Buggy())
    with pytest.raises(ZeroDivisionError, match="a bug in an actor"):
        list(RayEngine(1).answers(JOB, batches_of(questions, 1), Cost()))


def test_a_cluster_that_is_too_small_is_an_error_and_not_a_wait(cluster):
    with pytest.raises(ValueError, match=r"5 actors need 5 CPUs, and the cluster has 4; pass fewer --actors"):
        list(RayEngine(5).answers(JOB, batches_of(Scenes(count=2).questions, 1), Cost()))
    gpu = dataclasses.replace(JOB, spec=dataclasses.replace(JOB.spec, device="cuda:0"))
    if not ray.cluster_resources().get("GPU"):
        with pytest.raises(ValueError, match="1 actors need 1 GPUs, and the cluster has 0"):
            list(RayEngine(1).answers(gpu, batches_of(Scenes(count=2).questions, 1), Cost()))


def test_nothing_to_ask_starts_nothing():
    assert list(RayEngine(2).answers(JOB, [], Cost())) == []


def test_an_actor_answers_a_batch_that_is_too_large_in_halves_and_skips_a_broken_image(monkeypatch):
    """The class that Ray makes, here without Ray."""
    answer = Answerer.answer

    def small(self, batch, setting, max_new_tokens):
        if len(batch.lines) > 2:
            raise torch.OutOfMemoryError("full")
        return answer(self, batch, setting, max_new_tokens)

    monkeypatch.setattr(Answerer, "answer", small)
    questions = list(Scenes(count=5).questions)
    questions[0] = dataclasses.replace(questions[0], image=EncodedImage("AAAA", "x"))
    done = pickle.loads(Actor(JOB, versions())({"batch": [pickle.dumps(questions)]})["done"][0])
    assert [(answer.line, answer.batch, bool(answer.skipped)) for answer in done.answers] == [
        (0, 1, True),
        (1, 2, False),
        (2, 2, False),
        (3, 2, False),
        (4, 2, False),
    ]
    assert done.seconds >= done.waited > 0


def test_an_actor_on_a_machine_with_other_versions_is_refused():
    with pytest.raises(ValueError, match=r"this machine would answer otherwise: .* the driver has {'torch': '0'}"):
        Actor(JOB, {"torch": "0"})


def test_the_cause_of_a_nested_error_is_found():
    inner = ZeroDivisionError("x")
    outer = ray.exceptions.RayTaskError("f", "trace", inner)
    assert _cause(outer) is inner
    bare = ray.exceptions.ActorDiedError()
    assert _cause(bare) is bare


def test_ray_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ValueError, match=r"--engine ray needs Ray, .* pip install 'vtc-cls\[ray\]'"):
        RayEngine(1)


def test_no_actor_is_an_error():
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        RayEngine(0)

"""The engine in this process: memory, workers, broken images."""

import dataclasses
import logging
import os
import signal
from dataclasses import dataclass

import pytest
import torch

from vtc.eval.answerer import Answerer, Batch
from vtc.eval.engine import Cost, Job, batches_of
from vtc.eval.local import LocalEngine
from vtc.eval.memory import is_out_of_memory
from vtc.eval.model import ModelSpec
from vtc.eval.question import Answer, EncodedImage
from vtc.eval.run import Options, Run
from vtc.eval.setting import Setting
from vtc.eval.tasks.scenes import Scenes

JOB = Job(ModelSpec(), "hf", Setting("vtc-cls", {"keep": 8}), 3)
SCENES = Scenes(count=6)


@pytest.fixture(scope="module")
def engine():
    return LocalEngine()


@pytest.fixture(scope="module")
def reference(engine):
    """The texts, by line, one question at a time."""
    return asked(engine, JOB, batches_of(SCENES.questions, 1))[0]


def asked(engine, job, batches):
    """Texts by line, the answers in their order, and the cost."""
    cost = Cost()
    answers = [answer for batch in engine.answers(job, batches, cost) for answer in batch]
    assert len({answer.line for answer in answers}) == len(answers)
    return {answer.line: answer.text for answer in answers}, answers, cost


class Small(Answerer):
    """A model that has memory for `room` questions; it notes what it is asked."""

    def __init__(self, room, error=torch.OutOfMemoryError, message="CUDA out of memory. Tried\nto allocate"):
        self.room, self.error, self.message, self.sizes = room, error, message, []

    def answer(self, batch, setting, max_new_tokens):
        self.sizes.append(len(batch.lines))
        if len(batch.lines) > self.room:
            raise self.error(self.message)
        rows = batch.inputs["x"].tolist()
        return [Answer(line, str(row), batch=len(rows)) for line, row in zip(batch.lines, rows, strict=True)]


def batch(*lines):
    return Batch(list(lines), {"x": torch.tensor(lines) * 10})


def test_every_question_is_answered_once_with_its_cost(engine, reference):
    assert sorted(reference) == [0, 1, 2, 3, 4, 5]
    texts, answers, cost = asked(engine, JOB, batches_of(SCENES.questions, 4))
    assert texts == reference
    assert [answer.batch for answer in answers] == [4, 4, 4, 4, 2, 2]
    assert {answer.visual_tokens for answer in answers} == {8}
    assert cost.load == 0  # it is loaded already
    assert cost.wait > 0


def test_workers_change_no_answer(engine, reference):
    texts, answers, _ = asked(engine, dataclasses.replace(JOB, workers=2), batches_of(SCENES.questions, 2))
    assert texts == reference
    assert [answer.line for answer in answers] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_in_the_middle_is_recorded_and_the_others_are_answered(engine, reference, workers):
    questions = list(SCENES.questions)
    questions[2] = dataclasses.replace(questions[2], image=EncodedImage("AAAA", "row 2 of x.tsv"))
    texts, answers, _ = asked(engine, dataclasses.replace(JOB, workers=workers), batches_of(questions, 2))
    assert texts == {**reference, 2: ""}
    skipped = {answer.line: answer.skipped for answer in answers if answer.skipped}
    assert list(skipped) == [2]
    assert skipped[2].startswith("the image row 2 of x.tsv cannot be decoded")


def test_a_batch_whose_images_are_all_damaged_asks_nothing(engine):
    questions = [dataclasses.replace(question, image=EncodedImage("AAAA", "x")) for question in SCENES.questions[:2]]
    _, answers, _ = asked(engine, JOB, [questions])
    assert [(answer.line, bool(answer.skipped)) for answer in answers] == [(0, True), (1, True)]


@dataclass(frozen=True)
class Deadly:
    """An image whose decoder is killed, as by a full memory."""

    def open(self):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Buggy:
    """An image whose decoder has a bug."""

    def open(self):
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_is_an_error(engine, workers):
    questions = list(SCENES.questions)
    questions[3] = dataclasses.replace(questions[3], image=Deadly())
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* (is killed by signal|exited unexpectedly)"):
        asked(engine, dataclasses.replace(JOB, workers=workers), batches_of(questions, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_the_preparation_is_raised(engine, workers):
    questions = [SCENES.questions[0], dataclasses.replace(SCENES.questions[1], image=Buggy())]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        asked(engine, dataclasses.replace(JOB, workers=workers), batches_of(questions, 1))


def test_a_batch_that_is_too_large_is_answered_in_halves_and_it_is_said_once(caplog):
    engine, model = LocalEngine(), Small(room=2)
    with caplog.at_level(logging.WARNING, logger="vtc"):
        first = engine.answer(model, batch(0, 1, 2, 3, 4, 5, 6), JOB)
        second = engine.answer(model, batch(7, 8, 9), JOB)
    assert [(answer.line, answer.text) for answer in first + second] == [(line, str(10 * line)) for line in range(10)]
    assert model.sizes == [7, 4, 2, 2, 2, 1, 2, 1]
    assert [answer.batch for answer in first] == [2, 2, 2, 2, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with a batch of 7 (CUDA out of memory. Tried); going on with 4",
        "out of memory with a batch of 4 (CUDA out of memory. Tried); going on with 2",
    ]


def test_one_question_that_is_too_large_raises(caplog):
    model = Small(room=0)
    with pytest.raises(torch.OutOfMemoryError):
        LocalEngine().answer(model, batch(0, 1, 2), JOB)
    assert model.sizes == [3, 2, 1]


def test_a_full_memory_of_the_machine_counts_too_and_other_errors_do_not():
    full = Small(room=1, error=RuntimeError, message="DefaultCPUAllocator: can't allocate memory: you tried")
    assert [answer.text for answer in LocalEngine().answer(full, batch(1, 2), JOB)] == ["10", "20"]
    bug = Small(room=1, error=RuntimeError, message="shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        LocalEngine().answer(bug, batch(1, 2), JOB)
    assert bug.sizes == [2]


def test_a_run_after_one_that_was_too_large_tries_the_whole_batch_again(engine, monkeypatch):
    """Which settings ran before changes no batch, and so no answer in 16 bits."""
    sizes = []
    answer = Answerer.answer

    def spy(self, batch, setting, max_new_tokens):
        sizes.append(len(batch.lines))
        if setting.method == "none" and len(batch.lines) > 1:
            raise torch.OutOfMemoryError("full")
        return answer(self, batch, setting, max_new_tokens)

    monkeypatch.setattr(Answerer, "answer", spy)
    for setting in (Setting(), JOB.setting):
        asked(engine, dataclasses.replace(JOB, setting=setting), batches_of(SCENES.questions[:4], 2))
    assert sizes == [2, 1, 1, 1, 1, 2, 2]


def test_the_result_says_how_many_answers_come_from_smaller_batches(engine, reference, monkeypatch, tmp_path):
    answer = Answerer.answer

    def small(self, batch, setting, max_new_tokens):
        if len(batch.lines) > 2:
            raise torch.OutOfMemoryError("full")
        return answer(self, batch, setting, max_new_tokens)

    monkeypatch.setattr(Answerer, "answer", small)
    run = Run(SCENES, JOB.setting, ModelSpec(), Options(tmp_path, batch_size=4, quiet=True), engine)
    result = run.run()
    assert {line: answer.text for line, answer in run._stored().items()} == reference
    assert result.notes == ("4 answers come from smaller batches, because the memory was full",)


def test_memory_is_freed_before_the_smaller_batch(monkeypatch):
    """The exception holds the frames of the failed attempt, and with them its tensors."""
    import gc
    import weakref

    class Tensors:
        pass

    alive = []

    class Holder(Small):
        def answer(self, batch, setting, max_new_tokens):
            alive.append(sum(ref() is not None for ref in refs))
            tensors = Tensors()
            refs.append(weakref.ref(tensors))
            return super().answer(batch, setting, max_new_tokens)

    refs = []
    gc.disable()
    try:
        LocalEngine().answer(Holder(room=1), batch(0, 1), JOB)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_is_out_of_memory_knows_the_errors_of_torch():
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with"))  # outside of the allocator
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("x"))


class Counting:
    """Notes each line as often as it is answered."""

    def __init__(self):
        self.lines = []

    def answer(self, batch, setting, max_new_tokens):
        self.lines += batch.lines
        return [Answer(line, "x") for line in batch.lines]


@pytest.mark.parametrize(("device", "asked"), [("cuda", [0, 0, 1]), ("cpu", [0, 1])])
def test_a_gpu_answers_its_first_batch_once_before_time_counts(monkeypatch, device, asked):
    fake, cost = Counting(), Cost()
    engine = LocalEngine()
    monkeypatch.setattr(engine, "answerer", lambda spec, cost: fake)
    batches = batches_of(Scenes(count=2).questions, 1)
    found = list(engine.answers(Job(dataclasses.replace(JOB.spec, device=device), "hf", Setting(), 1), batches, cost))
    assert fake.lines == asked
    assert [[answer.line for answer in answers] for answers in found] == [[0], [1]]
    assert (cost.load > 0) == (device == "cuda")

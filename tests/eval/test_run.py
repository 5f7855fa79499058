"""A run: what is asked, what stands on the disk, what is refused, and the result."""

import dataclasses
import json

import pytest

from vtc.eval.answerer import prepare
from vtc.eval.engine import Job, answer_all, batches_of
from vtc.eval.files import DataError
from vtc.eval.local import LocalEngine
from vtc.eval.question import Answer, EncodedImage, ImageFile, Question
from vtc.eval.run import Options, Run, sample
from vtc.eval.setting import Setting
from vtc.eval.tasks.scenes import Scenes

TASK = Scenes(count=6)
OURS = Setting("vtc-cls", {"keep": 64})


class Played(LocalEngine):
    """It prepares as the real one, and then answers without a model."""

    def answerer(self, spec, cost=None):
        return self

    def answer(self, answerer, batch, job):
        size = len(batch.lines)
        return [Answer(line, f"word {line}", 64, 600, 2, size, 0.25, batch.seconds / size) for line in batch.lines]


@pytest.fixture
def played():
    return Played()


@pytest.fixture
def run(played, spec, tmp_path):
    """Runs the task in a folder of this test, without a model."""

    def make(setting=OURS, task=TASK, **options):
        return Run(task, setting, spec, Options(tmp_path, quiet=True, **options), played)

    return make


class Counting:
    """An engine that notes the lines that it is asked, and may stop."""

    models = 1

    def __init__(self, engine, stop_after=None):
        self.engine, self.stop_after, self.lines = engine, stop_after, []

    def answers(self, job, batches, cost):
        for number, answers in enumerate(self.engine.answers(job, batches, cost)):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.lines += [answer.line for answer in answers]
            yield answers


def lines_of(folder):
    return [json.loads(line) for file in folder.glob("answers-*.jsonl") for line in file.read_text().splitlines()]


def test_a_result_says_what_was_asked_and_what_it_cost(engine, spec, tmp_path):
    result = Run(TASK, OURS, spec, Options(tmp_path, batch_size=4, quiet=True), engine).run()
    direct = answer_all(engine, spec, TASK, OURS, 4)
    stored = lines_of(tmp_path / "scenes" / "vtc-cls-64-batch4")
    assert [(entry["line"], entry["text"]) for entry in stored] == [(a.line, a.text) for a in direct]
    assert [entry["batch"] for entry in stored] == [4, 4, 4, 4, 2, 2]
    right = sum(a.text == TASK.asked[a.line][1].answer for a in direct)
    assert result.main == (100 * right / 6, 6)
    assert result.main_name == "accuracy"
    assert (result.complete, result.questions, result.answered, result.skipped) == (True, 6, 6, 0)
    assert result.visual_tokens == 64
    assert result.timing.answers == 6
    spent = sum(entry["generate_seconds"] for entry in stored)
    assert result.timing.generate_seconds == pytest.approx(spent / 6)
    assert result.timing.whole_seconds >= spent
    assert result.timing.bound is not None  # which one depends on the machine
    assert result.fingerprint["batch_size"] == 4
    assert json.loads((tmp_path / "scenes" / "vtc-cls-64-batch4" / "run.json").read_text()) == result.fingerprint
    assert type(result).from_json(result.to_json()) == result


def test_the_three_ways_differ_in_the_visual_tokens(engine, spec):
    kept = [
        answer_all(engine, spec, Scenes(count=2), s, 2)[0].visual_tokens for s in (Setting(), OURS, Setting("floor"))
    ]
    assert kept == [576, 64, None]


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(played, spec, tmp_path):
    first = Counting(played, stop_after=2)
    options = Options(tmp_path / "a", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        Run(TASK, OURS, spec, options, first).run()
    second = Counting(played)
    result = Run(TASK, OURS, spec, options, second).run()
    assert (first.lines, second.lines) == ([0, 1], [2, 3, 4, 5])
    whole = Run(TASK, OURS, spec, Options(tmp_path / "b", quiet=True), played).run()
    assert result.figures == whole.figures
    texts = [[entry["text"] for entry in lines_of(tmp_path / name / "scenes" / "vtc-cls-64")] for name in "ab"]
    assert texts[0] == texts[1]
    assert result.timing.whole_seconds is not None  # of both sessions
    third = Counting(played)
    again = Run(TASK, OURS, spec, options, third).run()
    assert third.lines == []
    assert again.figures == result.figures


def test_a_batch_with_a_missing_answer_is_asked_whole_so_that_it_is_the_same_batch(played, spec, tmp_path):
    options = Options(tmp_path, batch_size=3, quiet=True)
    Run(TASK, OURS, spec, options, played).run()
    file = tmp_path / "scenes" / "vtc-cls-64-batch3" / "answers-0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    counting = Counting(played)
    result = Run(TASK, OURS, spec, options, counting).run()
    assert counting.lines == [3, 4, 5]
    assert len(file.read_text().splitlines()) == 6
    assert {entry["batch"] for entry in lines_of(file.parent)} == {3}
    assert result.timing.whole_seconds is None  # the time of the lost answers is unknown


def test_what_changes_the_arithmetic_is_in_the_fingerprint(run, played, spec, tmp_path, monkeypatch):
    run(limit=2).run()
    other = dataclasses.replace(spec, attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation was None, is 'eager'"):
        Run(TASK, OURS, other, Options(tmp_path, limit=2, quiet=True), played).run()
    monkeypatch.setenv("VTC_BACKEND", "torch")
    with pytest.raises(ValueError, match="VTC_BACKEND was None, is 'torch'"):
        run(limit=2).run()


def test_times_with_other_processes_or_workers_are_not_added(played, spec, tmp_path):
    class Pair(Counting):
        models = 2

    for name, change in (("models", {"engine": Pair(played)}), ("workers", {"workers": 1})):
        options = Options(tmp_path / name, quiet=True)
        with pytest.raises(KeyboardInterrupt):
            Run(TASK, OURS, spec, options, Counting(played, stop_after=2)).run()
        again = dataclasses.replace(options, workers=change.get("workers"))
        result = Run(TASK, OURS, spec, again, change.get("engine", played)).run()
        assert result.complete
        assert (result.timing.whole_seconds, result.timing.wait_seconds) == (None, None)


def test_the_result_names_the_machine_that_answered_and_not_the_one_that_scores(played, spec, tmp_path, monkeypatch):
    def on(gpu, date):
        monkeypatch.setattr("vtc.eval.run.environment", lambda device: {"device": device, "gpu": gpu, "date": date})

    options = Options(tmp_path, quiet=True)
    on("GPU A", "2026-01-01")
    with pytest.raises(KeyboardInterrupt):
        Run(TASK, OURS, spec, options, Counting(played, stop_after=2)).run()
    on("GPU B", "2026-01-02")
    assert Run(TASK, OURS, spec, options, played).run().complete
    on("GPU C", "2026-01-03")
    again = Run(TASK, OURS, spec, dataclasses.replace(options, workers=3), played).run()
    assert again.environment == {"device": "cpu", "gpu": "GPU A and GPU B", "date": "2026-01-02"}
    assert again.timing.workers == 0  # as it was when the questions were asked


def test_another_setting_in_the_same_folder_is_refused_by_name(run, played, spec, tmp_path):
    run(limit=2).run()
    with pytest.raises(ValueError, match=r"files was .*6 of test.*, is .*7 of test.*Choose another --out"):
        run(task=Scenes(count=7), limit=2).run()
    other = dataclasses.replace(spec, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"dtype was 'float32', is 'bfloat16'"):
        Run(TASK, OURS, other, Options(tmp_path, limit=2, quiet=True), played).run()


def test_partial_scores_what_is_there_and_asks_nothing(run, played, spec, tmp_path):
    with pytest.raises(ValueError, match="holds no answers yet"):
        run(partial=True).run()
    with pytest.raises(KeyboardInterrupt):
        Run(TASK, OURS, spec, Options(tmp_path, quiet=True), Counting(played, stop_after=4)).run()
    counting = Counting(played)
    result = Run(TASK, OURS, spec, Options(tmp_path, partial=True), counting).run()
    assert counting.lines == []
    assert (result.complete, result.answered, result.questions) == (False, 4, 6)
    assert result.main.questions == 4
    assert not (tmp_path / "scenes" / "vtc-cls-64" / "submission").exists()


def test_a_missing_answer_is_refused(run, played, tmp_path):
    class Losing(Counting):
        def answers(self, job, batches, cost):
            yield from self.engine.answers(job, batches[:4], cost)

    lost = run()
    lost.engine = Losing(played)
    with pytest.raises(ValueError, match="2 of 6 questions have no answer, the first at line 4"):
        lost.run()


class Pictures(Scenes):
    """The same questions with images in files, or in a table."""

    def __init__(self, images):
        super().__init__(count=len(images))
        pairs = zip(self.questions, images, strict=True)
        self.questions = [dataclasses.replace(question, image=image) for question, image in pairs]


@pytest.fixture
def pictures(tmp_path):
    """Four questions: a good image, one in a table that is damaged, a question without image, a good image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (0, 3):
        TASK.asked[number][0].image.save(folder / f"{number}.png")
    good = [ImageFile(folder / f"{number}.png") for number in (0, 3)]
    return Pictures([good[0], EncodedImage("bm8gaW1hZ2U=", "row 2 of the table"), None, good[1]])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_broken_image_is_reported_and_skipped_only_on_request(run, pictures, tmp_path, batch_size):
    with pytest.raises(
        DataError, match=r"1 image.s. cannot be read, the first: the image row 2 of the table cannot be"
    ):
        run(task=pictures, batch_size=batch_size).run()
    result = run(task=pictures, batch_size=batch_size, skip_bad=True).run()
    assert (result.complete, result.answered, result.skipped) == (False, 3, 1)
    assert result.timing.whole_seconds is not None
    assert result.main.questions == 3
    assert result.notes == ()  # a smaller batch is no sign of a full memory here
    images = [question.image for question in pictures.questions]
    repaired = Pictures([images[0], images[3], *images[2:]])
    counting = run(task=repaired, batch_size=batch_size)
    counting.engine = Counting(counting.engine)
    assert counting.run().complete
    assert 1 in counting.engine.lines
    assert len(counting.engine.lines) == (1 if batch_size == 1 else 3)


def test_missing_image_files_stop_a_run_before_it_begins(run, played, tmp_path):
    images = [ImageFile(tmp_path / f"{number}.png") for number in range(3)]
    TASK.asked[1][0].image.save(images[1].path)
    counting = run(task=Pictures(images))
    counting.engine = Counting(played)
    with pytest.raises(DataError, match=r"2 of 3 image files are missing, the first .*0\.png; unpack them"):
        counting.run()
    assert counting.engine.lines == []
    assert run(task=Pictures(images), skip_bad=True).run().skipped == 2


def test_the_batches_depend_on_the_questions_alone():
    questions = [Question(n, n, "?", None if n % 3 == 0 else ImageFile("x")) for n in range(8)]
    batches = [[question.line for question in batch] for batch in batches_of(questions, 2)]
    assert batches == [[1, 2], [4, 5], [7], [0, 3], [6]]


def test_a_sample_is_spread_evenly_and_takes_units_whole():
    alone = [Question(n, n, "?", None) for n in range(10)]
    assert [q.line for q in sample(alone, 4)] == [0, 2, 5, 7]
    assert sample(alone, None) == sample(alone, 10) == sample(alone, 99) == alone
    passes = [Question(n, n, "?", None, unit=n % 5) for n in range(10)]
    assert [q.line for q in sample(passes, 2)] == [0, 2, 5, 7]


def test_check_batch_counts_the_answers_that_differ(run, played, tmp_path):
    class Changing(Counting):
        """Answers line 2 otherwise in a batch."""

        def answers(self, job, batches, cost):
            for answers in self.engine.answers(job, batches, cost):
                yield [dataclasses.replace(a, text="?") if a.line == 2 and a.batch > 1 else a for a in answers]

    checked = run(batch_size=3, check_batch=True)
    checked.engine = Changing(played)
    assert checked.run().notes == ("1 of 6 answers differ from those with batch size 1, at lines 2",)
    assert run(batch_size=2, check_batch=True).run().notes == ("0 of 6 answers differ from those with batch size 1",)


def test_answers_from_smaller_batches_are_counted(run, played):
    class Halving(Counting):
        def answers(self, job, batches, cost):
            for answers in self.engine.answers(job, batches, cost):
                yield [dataclasses.replace(answer, batch=2) for answer in answers]

    split = run(batch_size=4)
    split.engine = Halving(played)
    assert split.run().notes == ("4 answers come from smaller batches, because the memory was full",)


def test_options_are_checked(tmp_path):
    for name in ("batch_size", "limit"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Options(tmp_path, **{name: 0})
    with pytest.raises(ValueError, match="unknown protocol 'best'; there are llava, hf"):
        Options(tmp_path, protocol="best")
    with pytest.raises(ValueError, match="give a batch_size"):
        Options(tmp_path, check_batch=True)


def test_new_tokens_are_counted_up_to_the_end_of_sequence(engine, spec):
    job = Job(spec, "hf", Setting(), 3)
    batch = prepare(job.prompting(), TASK.questions[:2])
    answers = engine.answerer(spec).answer(batch, Setting(), 1)
    assert [answer.new_tokens for answer in answers] == [1, 1]
    answers = engine.answerer(spec).answer(batch, Setting(), 3)
    assert [answer.new_tokens for answer in answers] == [2, 2]  # the word and the end
    assert all(isinstance(answer, Answer) and answer.prompt_tokens > 576 for answer in answers)

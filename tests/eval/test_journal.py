"""The journal of a run, as seen by somebody who wants to break it."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from vtc.eval import journal as journals
from vtc.eval.journal import Journal
from vtc.eval.question import Answer

FINGERPRINT = {"model": "m", "keep": 8, "versions": {"torch": "2"}}
IDS = {line: f"q{line}" for line in range(8)}


def journal(folder, writer=0, writers=1, **changes):
    return Journal(folder, "scenes", {**FINGERPRINT, **changes}, writer, writers)


def answers(*lines):
    return [Answer(line, f"text {line}", 8.0, 20, 2, token_layers=8.0) for line in lines]


def write(folder, *lines, writer=0, writers=1):
    with journal(folder, writer, writers) as opened:
        opened.append(answers(*lines), IDS)
    return folder / f"answers-{writer}.jsonl"


def stored(folder):
    """What a reader sees, by line."""
    reader = journal(folder)
    reader.read()
    return {answer.line: answer.text for answer in reader}


def expected(*lines):
    return {line: f"text {line}" for line in lines}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(journals, "LOCK_SECONDS", 0.1)


def test_a_line_has_the_task_the_id_the_answer_and_the_fingerprint(tmp_path):
    file = write(tmp_path, 3)
    assert json.loads(file.read_text()) == {
        "task": "scenes",
        "id": "q3",
        "line": 3,
        "text": "text 3",
        "visual_tokens": 8.0,
        "prompt_tokens": 20,
        "new_tokens": 2,
        "batch": 1,
        "generate_seconds": 0.0,
        "prepare_seconds": 0.0,
        "skipped": None,
        "token_layers": 8.0,
        "fingerprint": journal(tmp_path).digest,
    }
    assert json.loads((tmp_path / "run.json").read_text()) == FINGERPRINT


def test_an_answer_comes_back_as_it_was_whatever_it_holds(tmp_path):
    odd = Answer(0, 'a\nb\r\u2028\x85"\\ 中文 \U0001f600', None, 1, 2, 3, 0.25, 1e-06)
    with journal(tmp_path) as opened:
        opened.append([odd], IDS)
    with journal(tmp_path) as opened:
        assert opened.answers == {0: odd}


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_cut_last_line_is_dropped_and_its_question_asked_again(tmp_path, caplog, cut):
    file = write(tmp_path, 0, 1, 2)
    os.truncate(file, file.stat().st_size - cut)
    assert stored(tmp_path) == expected(0, 1)  # a reader changes nothing
    with journal(tmp_path) as opened:
        assert [opened.is_done(line) for line in range(3)] == [True, True, False]
        assert opened.append(answers(2), IDS) == 1
    assert stored(tmp_path) == expected(0, 1, 2)
    assert len(file.read_bytes().splitlines()) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"dropped the last line of {file}, which was cut; its question is asked again"
    ]


def test_the_cut_line_of_a_writer_that_no_longer_exists_is_left_out(tmp_path):
    file = write(tmp_path, 1, 3, writer=1, writers=2)
    os.truncate(file, file.stat().st_size - 5)
    write(tmp_path, 0)
    assert stored(tmp_path) == expected(0, 1)


def test_answers_of_more_writers_count_for_fewer_and_the_other_way_round(tmp_path):
    write(tmp_path, 0, writer=0, writers=3)
    write(tmp_path, 1, writer=1, writers=3)
    write(tmp_path, 2, writer=2, writers=3)
    with journal(tmp_path) as opened:
        assert opened.append(answers(0, 1, 2, 3), IDS) == 1
    with journal(tmp_path, 1, 2) as opened:
        assert opened.append(answers(1, 3, 4), IDS) == 1
    files = sorted(tmp_path.glob("answers-*.jsonl"))
    assert [[json.loads(line)["line"] for line in file.read_bytes().splitlines()] for file in files] == [
        [0, 3],
        [1, 4],
        [2],
    ]


def test_a_line_that_stands_twice_counts_once(tmp_path):
    file = write(tmp_path, 0, 1)
    content = file.read_bytes()
    file.write_bytes(content + content)
    (tmp_path / "answers-7.jsonl").write_bytes(content)
    assert stored(tmp_path) == expected(0, 1)


def test_lines_that_answer_one_question_differently_are_an_error_that_names_both(tmp_path):
    file = write(tmp_path, 0, 1)
    other = tmp_path / "answers-1.jsonl"
    other.write_bytes(file.read_bytes().splitlines()[1].replace(b"text 1", b"other") + b"\n")
    with pytest.raises(ValueError, match=r"line 1 of .*answers-1.jsonl answers question 1 with 'other', another line"):
        stored(tmp_path)
    with pytest.raises(ValueError, match="remove one of them"), journal(tmp_path):
        pass
    assert file.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"task": "scenes"}',
        b'{"task": "scenes", "fingerprint": "x", "id": 1, "line": 1, "text": "", "more": 1}',
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    file = write(tmp_path, 0)
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=r"line 2 of .*answers-0.jsonl is damaged .* remove this line"):
        stored(tmp_path)


def test_lines_of_another_run_are_refused(tmp_path):
    write(tmp_path / "a", 0)
    write(tmp_path / "b", 1)
    with journal(tmp_path / "c", keep=16) as opened:
        opened.append(answers(0), IDS)
    moved = tmp_path / "a" / "answers-1.jsonl"
    moved.write_bytes((tmp_path / "c" / "answers-0.jsonl").read_bytes())
    with pytest.raises(ValueError, match=rf"line 1 of {moved} is of another run"):
        stored(tmp_path / "a")


def test_a_folder_of_another_run_is_refused_by_writers_and_readers_with_what_changed(tmp_path):
    write(tmp_path, 0)
    changed = journal(tmp_path, keep=16)
    message = r"holds answers that were made otherwise: keep was 8, is 16\. Choose another --out"
    with pytest.raises(ValueError, match=message), changed:
        pass
    with pytest.raises(ValueError, match=message):
        changed.read()
    write(tmp_path, 1)  # the lock is free again
    assert stored(tmp_path) == expected(0, 1)


def test_a_damaged_run_json_is_named_and_written_again_once_it_is_deleted(tmp_path):
    write(tmp_path, 0)
    file = tmp_path / "run.json"
    for content in (file.read_bytes()[:20], b"", b"3"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"run.json is damaged .*delete it"), journal(tmp_path):
            pass
    file.unlink()
    with pytest.raises(ValueError, match=r"line 1 of .* is of another run"), journal(tmp_path, keep=16):
        pass
    file.unlink()
    write(tmp_path, 1)
    assert stored(tmp_path) == expected(0, 1)
    assert json.loads(file.read_text()) == FINGERPRINT


def test_a_second_writer_is_refused_and_does_no_harm(tmp_path, impatient):
    with journal(tmp_path) as opened:
        opened.append(answers(0), IDS)
        with pytest.raises(ValueError, match=r"another process writes to .*answers-0.jsonl; wait"), journal(tmp_path):
            pass
        opened.append(answers(1), IDS)
    assert stored(tmp_path) == expected(0, 1)


def test_a_run_with_fewer_processes_is_refused_while_one_of_more_is_alive(tmp_path, impatient):
    with journal(tmp_path, 2, 3) as orphan:
        with pytest.raises(ValueError, match=r"another process writes to .*answers-2.jsonl"), journal(tmp_path, 0, 2):
            pass
        with journal(tmp_path, 0, 3):  # its peer
            pass
        orphan.append(answers(2), IDS)
    write(tmp_path, 0, writers=2)
    assert stored(tmp_path) == expected(0, 2)


def test_of_two_runs_that_begin_at_once_one_is_refused(tmp_path):
    """Each waits between its look at run.json and its write of it, unless a lock keeps the other away."""
    children = [_fork(lambda keep=keep: _begin_slowly(tmp_path, keep)) for keep in (8, 16)]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 3]


def _begin_slowly(folder, keep):
    import time

    replace = Path.replace
    Path.replace = lambda self, target: (time.sleep(0.3), replace(self, target))[1]
    writer = {8: 0, 16: 1}[keep]
    try:
        with journal(folder, writer, 2, keep=keep):
            return 0
    except ValueError as error:
        return 3 if "were made otherwise" in str(error) else 4


def _fork(function):
    """The id of a child that does it and exits with what it returns."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = function() or 0
        finally:
            os._exit(code)
    return child


def test_a_process_that_is_killed_anywhere_loses_and_doubles_nothing(tmp_path):
    """SIGKILL before each line of the journal that a run executes, one after the other."""
    survived, number = False, 0
    while not survived:
        folder = tmp_path / str(number)
        write(folder, 0)
        os.truncate(folder / "answers-0.jsonl", (folder / "answers-0.jsonl").stat().st_size - 3)
        code = os.waitstatus_to_exitcode(os.waitpid(_fork(lambda: _work(folder, number)), 0)[1])  # noqa: B023
        assert code in (0, -signal.SIGKILL)
        survived = code == 0
        before = stored(folder)
        assert before.items() <= expected(0, 1, 2, 3).items()
        with journal(folder) as opened:
            todo = [line for line in range(4) if not opened.is_done(line)]
            assert set(todo) == set(range(4)) - set(before)
            assert opened.append(answers(*todo), IDS) == len(todo)
        lines = (folder / "answers-0.jsonl").read_bytes().splitlines()
        assert sorted(json.loads(line)["line"] for line in lines) == [0, 1, 2, 3]
        assert stored(folder) == expected(0, 1, 2, 3)
        number += 1
    assert number > 80


def _work(folder, number):
    """Append four answers, and be killed at line event `number` of the journal."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != journals.__file__:
            return None
        if event == "line":
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        return trace

    sys.settrace(trace)
    with journal(folder) as opened:
        opened.append(answers(0, 1), IDS)
        opened.append(answers(2), IDS)
        opened.merge(opened.entries(IDS), IDS)
        opened.append(answers(3), IDS)
    return 0


@pytest.mark.parametrize("room", [0, 1, 200, 300])
def test_a_full_disk_ends_the_run_with_a_whole_file_and_the_next_one_goes_on(tmp_path, room):
    with journal(tmp_path) as opened:
        opened.append(answers(0), IDS)
        size = opened.path.stat().st_size
        with _space(size + room), pytest.raises(OSError, match=r"cannot write to .*answers-0.jsonl .*; make room"):
            opened.append(answers(1, 2), IDS)
        assert opened.path.stat().st_size == size
        assert not opened.is_done(1)
    assert stored(tmp_path) == expected(0)
    write(tmp_path, 1, 2)
    assert stored(tmp_path) == expected(0, 1, 2)


def test_a_disk_that_is_full_from_the_start_leaves_no_run_json(tmp_path):
    with _space(10), pytest.raises(OSError, match=r"cannot write to .*run.json .*; make room"), journal(tmp_path):
        pass
    assert not (tmp_path / "run.json").exists()
    write(tmp_path, 0)
    assert stored(tmp_path) == expected(0)


class _space:
    """No file of this process can become larger than `size` bytes; a write is cut there, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*/file/run .*; choose another --out"):
        write(tmp_path / "file" / "run", 0)


def test_a_folder_without_permission_can_be_read_and_not_written_to(tmp_path, monkeypatch):
    write(tmp_path, 0)

    def refuse(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", self.lock_file)

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(ValueError, match=r"cannot write to .*Permission denied.*; choose another --out"):
        write(tmp_path, 1)
    assert stored(tmp_path) == expected(0)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(self, *arguments, **keywords):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(ValueError, match=r"does not appear to support flock\); choose another --out"):
        write(tmp_path, 1)


def test_a_reader_sees_whole_lines_only_while_another_process_writes(tmp_path):
    """The writer flushes its lines in pieces of seven bytes, as slowly as a reader needs to see each of them."""
    write(tmp_path, 0)
    file = tmp_path / "answers-0.jsonl"
    new = b"".join(journal(tmp_path)._line(answer, "q") for answer in answers(1, 2))
    with file.open("ab", buffering=0) as out:
        for start in range(0, len(new), 7):
            out.write(new[start : start + 7])
            whole = file.read_bytes().count(b"\n")
            assert stored(tmp_path) == expected(*range(whole))
    assert stored(tmp_path) == expected(0, 1, 2)


def test_a_folder_without_a_run_has_no_answers(tmp_path):
    assert stored(tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_a_skipped_question_is_not_done_and_its_answer_replaces_the_reason(tmp_path):
    with journal(tmp_path) as opened:
        assert opened.append([Answer(0, "", skipped="no file"), *answers(1)], IDS) == 2
        assert not opened.is_done(0)
        assert opened.append([Answer(0, "", skipped="no file")], IDS) == 0
    with journal(tmp_path) as opened:
        assert opened.append([Answer(0, "", skipped="damaged")], IDS) == 1
    reader = journal(tmp_path)
    reader.read()
    assert reader.answers[0].skipped == "damaged"
    with journal(tmp_path) as opened:
        assert opened.append([*answers(0), Answer(1, "", skipped="gone")], IDS) == 1
    assert stored(tmp_path) == expected(0, 1)


def test_an_answer_that_is_there_stays_when_its_batch_is_asked_again(tmp_path):
    write(tmp_path, 0)
    with journal(tmp_path) as opened:
        assert opened.append([Answer(0, "in a fuller batch, in 16 bits"), *answers(1)], IDS) == 1
    assert stored(tmp_path) == expected(0, 1)


def test_answers_of_another_machine_are_taken_in_once(tmp_path):
    write(tmp_path / "a", 0, 2)
    write(tmp_path / "b", 1, 2, writer=1, writers=2)
    with journal(tmp_path / "b", 1, 2) as other:
        entries = other.entries(IDS)
    with journal(tmp_path / "a", 0, 2) as opened:
        opened.merge([*opened.entries(IDS), *entries], IDS)
        opened.merge(entries, IDS)
        assert opened.path.read_bytes().count(b"\n") == 3
    assert stored(tmp_path / "a") == expected(0, 1, 2)


def test_answers_of_another_machine_that_differ_are_an_error(tmp_path):
    write(tmp_path / "a", 0, 1)
    with journal(tmp_path / "b") as other:
        other.append([Answer(1, "other"), *answers(2)], IDS)
        entries = other.entries(IDS)
    with journal(tmp_path / "a") as opened:
        with pytest.raises(ValueError, match="a line of another process answers question 1 with 'other'"):
            opened.merge(entries, IDS)
        with journal(tmp_path / "c", keep=16) as third, pytest.raises(ValueError, match="is of another run"):
            third.merge(entries, IDS)
    assert stored(tmp_path / "a") == expected(0, 1)


def test_processes_that_would_answer_otherwise_are_named(tmp_path):
    here = journal(tmp_path, 1, 3)
    here.require_same([FINGERPRINT, FINGERPRINT])
    with pytest.raises(ValueError, match=r"process 2 would answer otherwise than process 1: keep was 4, is 8"):
        here.require_same([FINGERPRINT, FINGERPRINT, {**FINGERPRINT, "keep": 4}])


def test_a_closed_journal_takes_no_answers(tmp_path):
    with journal(tmp_path) as opened:
        pass
    with pytest.raises(ValueError, match="use it in a with block"):
        opened.append(answers(0), IDS)

"""Two processes: `torchrun`'s launcher, which forks its ranks here, and ranks without a folder in common."""

import json
import os
import re
import socket
import sys

import pytest

from tests.support.attempts import SERVER, Case, campaign, texts
from vtc.eval import processes
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec
from vtc.eval.processes import Processes
from vtc.eval.run import Options, Run
from vtc.eval.setting import Setting
from vtc.eval.tasks.scenes import Scenes

COUNT = 6


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def ranks(function, *arguments, world=2, seconds=120):
    """Run it in `world` processes that know each other as torchrun's do; return their exit codes."""
    port = free_port()
    started = [SERVER.Process(target=rank, args=(number, world, port, function, *arguments)) for number in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def rank(number, world, port, function, folder, *arguments):
    """Become a rank, with its stdout and stderr in files."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    function(folder, *arguments)


def made(out, **changes):
    """The run of this process."""
    return Run(
        changes.pop("task", None) or Scenes(count=COUNT),
        Setting("vtc-cls", {"keep": 8}),
        ModelSpec(),
        Options(out, **changes),
        LocalEngine(),
        processes.current(),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The answers of one process."""
    folder = tmp_path_factory.mktemp("whole")
    Run(Scenes(count=COUNT), Setting("vtc-cls", {"keep": 8}), ModelSpec(), Options(folder, quiet=True)).run()
    return texts(folder)


def numbers(out):
    """The questions that each file holds, by its name."""
    files = sorted(out.rglob("answers-*.jsonl"))
    return {file.name: [json.loads(line)["line"] for line in file.read_bytes().splitlines()] for file in files}


def facts(folder):
    group = processes.current()
    gathered = group.gather([group.rank, {"of": b"bytes"}])
    group.wait()
    devices = [group.device(None), group.device("cpu"), group.device("cuda:3")]
    (folder / f"facts-{group.rank}").write_text(repr((group.rank, group.world, group.is_main, gathered, devices)))


def test_each_process_knows_its_rank_and_gathers_by_rank(tmp_path):
    assert ranks(facts, tmp_path) == [0, 0]
    gathered = [0, {"of": b"bytes"}, 1, {"of": b"bytes"}]
    for number in range(2):
        seen = (tmp_path / f"facts-{number}").read_text()
        assert seen == repr((number, 2, number == 0, gathered, [None, "cpu", "cuda:3"]))


def shared(folder):
    """A run in one folder."""
    result = made(folder / "out").run()
    print("score", result and result.figures["accuracy"])


def test_two_processes_share_the_batches_and_the_first_alone_scores_and_prints(tmp_path, whole):
    assert ranks(shared, tmp_path) == [0, 0]
    assert numbers(tmp_path) == {"answers-0.jsonl": [0, 2, 4], "answers-1.jsonl": [1, 3, 5]}
    assert texts(tmp_path) == whole
    assert re.match(r"score Figure\(value=[\d.]+, questions=6\)\n$", (tmp_path / "out-0").read_text())
    assert "scenes vtc-cls-8: 3 of 3 questions to go" in (tmp_path / "err-0").read_text()
    assert (tmp_path / "out-1").read_text() == "score None\n"
    assert (tmp_path / "err-1").read_text() == ""

    # One process goes on where two were cut off, and asks what is missing alone.
    file = next(tmp_path.rglob("answers-1.jsonl"))
    os.truncate(file, file.stat().st_size - 4)
    assert made(tmp_path / "out", quiet=True).run().complete
    assert texts(tmp_path) == whole
    assert json.loads(next(tmp_path.rglob("answers-0.jsonl")).read_bytes().splitlines()[-1])["line"] == 5


def apart(folder):
    """A run of machines without a folder in common. The second machine has an answer from before."""
    mine = folder / f"machine{os.environ['RANK']}"
    result = made(mine, quiet=True).run()
    (mine / "done").write_text(str(result and result.answered))


def test_machines_without_a_common_folder_merge_their_answers_once(tmp_path, whole):
    """What one of them has answered before is not asked again by the other."""
    alone = tmp_path / "machine1"
    Run(Scenes(count=COUNT), Setting("vtc-cls", {"keep": 8}), ModelSpec(), Options(alone, quiet=True)).run()
    before = next(alone.rglob("answers-0.jsonl"))
    kept = before.read_bytes().splitlines(keepends=True)[:2]
    before.unlink()
    before.with_name("answers-1.jsonl").write_bytes(b"".join(kept))
    assert ranks(apart, tmp_path) == [0, 0]
    assert (tmp_path / "machine0" / "done").read_text() == "6"
    assert (tmp_path / "machine1" / "done").read_text() == "None"
    for number in range(2):
        assert texts(tmp_path / f"machine{number}") == whole
        assert sorted(line for lines in numbers(tmp_path / f"machine{number}").values() for line in lines) == [
            *range(6)
        ]
    assert numbers(tmp_path / "machine0")["answers-0.jsonl"][:4] == [0, 1, 2, 4]  # two of the other's, two of its own


class Unscorable(Scenes):
    def score(self, answers):
        raise ValueError("no score")


def unscored(folder):
    run = made(folder / "out", quiet=True, task=Unscorable(count=2))
    run.run()
    run.processes.wait()  # the next run of a sweep
    (folder / "went on").touch()


def test_a_main_process_that_cannot_score_ends_the_others(tmp_path):
    assert ranks(unscored, tmp_path) == [1, 1]
    assert "ValueError: no score" in (tmp_path / "err-0").read_text()
    assert "ConnectionError: another process of this run has ended; see its error" in (tmp_path / "err-1").read_text()
    assert not (tmp_path / "went on").exists()


def differing(folder):
    from vtc.eval import fingerprint

    fingerprint.versions = lambda: {"torch": os.environ["RANK"]}
    made(folder / f"machine{os.environ['RANK']}", quiet=True).run()


def test_machines_with_other_versions_are_refused(tmp_path):
    assert ranks(differing, tmp_path) == [1, 1]
    message = "process 1 would answer otherwise than process 0: versions was {'torch': '1'}, is {'torch': '0'}"
    assert message in (tmp_path / "err-0").read_text()


def test_a_killed_rank_ends_the_launch_and_the_next_one_goes_on(tmp_path):
    """Kills by SIGKILL of one of two ranks of torchrun's launcher; `support/kill.py` does it a hundred times."""
    tally = campaign(Case(questions=8, processes=2), kills=2, folder=tmp_path, seconds=4.0)
    assert tally.kills >= 2
    assert tally.clean


def test_one_process_is_the_default(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = processes.current()
    assert type(alone) is Processes
    assert (alone.rank, alone.world, alone.is_main, alone.gather([1]), alone.device("cuda")) == (
        0,
        1,
        True,
        [1],
        "cuda",
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert type(processes.current()) is Processes


def test_several_processes_without_accelerate_name_the_extra(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, .* pip install 'vtc-cls\[eval\]'"):
        processes.current()


@pytest.mark.parametrize(("local", "gpus", "device"), [(0, 4, "cuda:0"), (3, 4, "cuda:3"), (3, 1, "cuda:0")])
def test_a_process_takes_the_gpu_of_its_place(monkeypatch, local, gpus, device):
    group = object.__new__(processes.LaunchedProcesses)
    group._state = type("State", (), {"local_process_index": local})
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: gpus)
    assert group.device(None) == group.device("cuda") == device
    assert group.device("cuda:2") == "cuda:2"
    assert group.device("cpu") == "cpu"

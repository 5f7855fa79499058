"""The pytest plugin: every result is on disk, and a test that hangs or kills its worker costs itself only."""

import re
import sys
import time

from bench import checkout, faults, processes, record, summary


def run_pytest(tmp_path, *options):
    arguments = ["-m", "pytest", "-q", "-p", "bench.pytest_log", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    arguments += ["--log-json", str(tmp_path / "log.jsonl"), *options, str(tmp_path)]
    return checkout.run(arguments)[1]


def test_each_fault_costs_the_test_it_befalls_and_no_other(tmp_path):
    (tmp_path / "test_planted.py").write_text(faults.TESTS)
    output = run_pytest(tmp_path, "-n", "2", "--test-limit", "4")
    found = summary.tests(tmp_path / "log.jsonl")
    names = {test.rpartition("::")[2]: why for test, why in found.failed.items()}
    assert set(names) == {f"test_planted_gpu_{fault}" for fault in ("wrong", "memory", "hangs", "killed", "broken")}, (
        output
    )
    assert (found.collected, found.passed) == (13, 8)
    assert names["test_planted_gpu_wrong"] == "AssertionError: planted"
    assert names["test_planted_gpu_memory"] == "torch.OutOfMemoryError: planted"
    assert names["test_planted_gpu_broken"] == "RuntimeError: planted"
    broken = [one for one in record.lines(tmp_path / "log.jsonl") if "gpu_broken" in one.get("test", "")]
    assert len(broken) == 2  # it failed, and then its worker ended
    for killed in ("test_planted_gpu_hangs", "test_planted_gpu_killed"):
        assert re.match(rf"worker 'gw\d+' crashed while running 'test_planted.py::{killed}'", names[killed])


def test_results_are_there_when_pytest_is_interrupted(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_wrong(): assert False\ndef test_hangs(): time.sleep(600)\n"
    )
    path = tmp_path / "log.jsonl"
    arguments = ["-m", "pytest", "-q", "-p", "bench.pytest_log", "--log-json", str(path), str(tmp_path)]
    with checkout.packages() as options, (tmp_path / "log").open("w") as log:
        group = processes.Group([sys.executable, *arguments], log, **options)
        while "test_wrong" not in (path.read_text() if path.exists() else ""):
            time.sleep(0.05)
        group.end()
    found = summary.tests(path)
    assert found.collected == 2
    assert [test.rpartition("::")[2] for test in found.failed] == ["test_wrong"]


def test_a_file_that_cannot_be_collected_is_a_failure(tmp_path):
    (tmp_path / "test_bad.py").write_text("import no_such_module\n")
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    run_pytest(tmp_path, "--continue-on-collection-errors")
    found = summary.tests(tmp_path / "log.jsonl")
    assert found.passed == 1
    assert list(found.failed.values()) == ["ModuleNotFoundError: No module named 'no_such_module'"]


def test_tests_for_a_gpu_are_chosen_by_file_and_by_name(tmp_path):
    files = {
        "ops/test_topk": ["test_ties"],
        "hf/test_generate": ["test_beams", "test_triton_backend_gives_the_same", "test_half[cuda]"],
        "cli/test_cli": ["test_help"],
    }
    for file, names in files.items():
        code = "".join(f"def {name.split('[')[0]}(): pass\n" for name in names)
        if "[" in names[-1]:
            code = "import pytest\n" + code.replace(
                "def test_half()", "@pytest.mark.parametrize('d', ['cpu', 'cuda'])\ndef test_half(d)"
            )
        path = tmp_path / f"tests/{file}.py"
        path.parent.mkdir(parents=True)
        path.write_text(code)
    run_pytest(tmp_path, "--gpu-tests")
    tests = [line["test"] for line in record.lines(tmp_path / "log.jsonl") if "test" in line]
    assert sorted(tests) == [
        "tests/hf/test_generate.py::test_half[cuda]",
        "tests/hf/test_generate.py::test_triton_backend_gives_the_same",
        "tests/ops/test_topk.py::test_ties",
    ]

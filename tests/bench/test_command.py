"""The command line of the benchmarks, and the commands that run or draw others' records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.bench import make_record

from bench import __main__ as command
from bench import checkout, compare, plots


def test_compare_takes_the_median_of_both_rounds():
    old = [make_record((1, ms, 9)) for ms in (4.0, 8.0)]
    new = [make_record((1, ms, 9)) for ms in (1.0, 2.0)]
    (row,) = compare.compare(old, [*new, make_record(backend="another")])
    assert row[-3:] == ["6000.0", "1500.0", "4.00"]


@pytest.mark.skipif(not (checkout.ROOT / ".git").exists(), reason="no .git here")
def test_a_revision_is_checked_out_and_cleaned_up():
    with checkout.revision("HEAD") as root:
        assert (root / "kernels" / "topk.py").exists()
        code = "import os, bench, vtc; from vtc_kernels import topk\n"
        code += "print(*(os.path.realpath(module.__file__) for module in (vtc, topk, bench)))"
        status, output = checkout.run(["-c", code], root)
        assert status == 0, output
        expected = [root / "vtc/__init__.py", root / "kernels/topk.py", checkout.ROOT / "bench/__init__.py"]
        assert [Path(path) for path in output.split()] == [path.resolve() for path in expected]
    assert not root.exists()
    with pytest.raises(ValueError, match="cannot check out 'no-such-revision'"), checkout.revision("no-such-revision"):
        pass


def test_plots_are_drawn_for_light_and_dark_pages(tmp_path):
    records = [
        make_record((1.0, ms * batch, 99.0), op=op, backend=backend, shape={"B": batch, "K": 64})
        for op in ("topk", "compact")
        for backend, ms in (("triton", 1.0), ("reference", 3.0))
        for batch in (1, 4)
    ]
    light, dark = plots.draw(records, tmp_path / "micro")
    assert (light.name, dark.name) == ("micro-light.svg", "micro-dark.svg")
    assert light.read_text() != dark.read_text()
    for word in ("topk", "compact", "triton", "reference", "small, CPU"):
        assert f"<!-- {word} -->" in light.read_text()
    assert light.read_bytes() == plots.draw(records, tmp_path / "again")[0].read_bytes()
    with pytest.raises(ValueError, match="no records to plot"):
        plots.draw([], tmp_path / "none")


def test_the_command_writes_records_and_plots(tmp_path, capsys):
    arguments = ["--op", "topk", "compact", "--batch", "1", "2", "--keep", "8", "--rep-ms", "1", "--device", "cpu"]
    arguments += ["--provider", "reference", "torch.topk", "gather", "--model", "small"]
    assert command.main(["micro", *arguments, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"micro.jsonl", "micro-light.svg", "micro-dark.svg"}
    lines = (tmp_path / "micro.jsonl").read_text().splitlines()
    assert {json.loads(line)["shape"]["B"] for line in lines} == {1, 2}
    assert "x torch.topk" in capsys.readouterr().out
    assert command.main(["plot", str(tmp_path / "micro.jsonl"), "--out", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["micro", "--op", "sort"],
            "unknown op sort; there are scored_layers, cls_probs, select, cls_attention, row_scores",
        ),
        (["micro", "--model", "GPT"], "unknown model GPT; there are"),
        (["micro", "--dtype", "int8"], "unknown dtype int8; there are fp16, bf16, fp32"),
        (["compare", "no-such-revision"], "cannot check out 'no-such-revision'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_explains_what_cannot_be(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--help"], cwd=checkout.ROOT, capture_output=True, text=True, check=True
    )
    for name in command.COMMANDS:
        assert name in done.stdout


def test_a_relative_python_path_reaches_the_workers(tmp_path, monkeypatch):
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried/carried_module.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "carried")
    assert checkout.run(["-c", "import carried_module; print('found')"]) == (0, "found\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "arguments are required: command"),
        (("micro", "--keep", "0"), "argument --keep: must be a whole number from 1, got '0'"),
        (("micro", "--device", "toaster"), "argument --device: device 'toaster' cannot be used here; use cpu"),
        (("micro", "--op", "nope", "--device", "cpu"), "unknown op nope"),
        (("micro", "--out", "/proc/x", "--device", "cpu"), "/proc/x: No such file or directory"),
        (("plot", str(Path(__file__).parent)), "Is a directory"),
        (("plot", str(Path(__file__).parent.parent / "constraints.txt")), "no records to plot"),
        (("plot", "{numbers}"), "holds other things than records of the kind Record"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, capsys):
    (tmp_path / "numbers").write_text("1\n2\n")
    try:
        status = command.main([argument.format(numbers=tmp_path / "numbers") for argument in arguments])
    except SystemExit as end:
        status = end.code
    message = capsys.readouterr().err
    assert (status, message.count("\n")) == (2, 1)
    assert message.startswith("python -m bench")
    assert says in message


def test_shapes_that_are_too_small_are_left_out(capsys):
    arguments = ["--op", "topk", "--keep", "64", "--batch", "1", "--rep-ms", "1", "--provider", "torch.topk"]
    assert command.main(["micro", *arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "left out: small, 2 tiles has 36 patches, too few for K = 64\n" in out
    assert "N=145 K=64" in out

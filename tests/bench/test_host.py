"""`bench host`: what the first token costs the host, and what the documents say of it."""

import re

import pytest
import torch

from bench import __main__ as command
from bench import host, record
from bench.checkout import ROOT

COUNTS = ("kernels", "launches", "replays", "reads")


@pytest.fixture(scope="module")
def known():
    return record.read(ROOT / "bench/results/host" / host.FILE, host.Host)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the command measures now, and prints."""
    out = tmp_path_factory.mktemp("host")
    for _ in range(2):
        assert command.main(["host", "--rounds", "2", "--out", str(out)]) == 0
    return record.read(out / host.FILE, host.Host)


def counts(made):
    return {each.variant: {name: getattr(each, name) for name in COUNTS} for each in made}


def test_no_count_grows(known, found):
    """Kernels and reads of the stock model are transformers', which other versions change."""
    now, then = counts(found), counts(known)
    assert list(now) == list(then) == list(host.VARIANTS)
    for name, each in now.items():
        stock = "stock, graphs" if name.endswith("graphs") else "stock"
        for count in COUNTS:
            grown = (each[count] - now[stock][count]) - (then[name][count] - then[stock][count])
            assert grown <= 0, (name, count)


def test_graphs_leave_few_kernels(found):
    now = counts(found)
    for name in ("stock, graphs", "vtc, graphs"):
        assert now[name]["replays"] == 2
        assert now[name]["kernels"] < 60 < 1500 < now[name.removesuffix(", graphs")]["kernels"]


def test_times_are_those_of_parts(found):
    for each in found:
        assert all(getattr(each, name) > 0 for name in (*host.TIMES, "step_us"))


def test_what_torch_compile_gains_on_a_cpu(tmp_path, capsys):
    assert command.main(["host", "--compiled", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (found,) = record.read(tmp_path / host.COMPILED, host.Compiled)
    assert min(found.ms, found.compiled_ms, found.compile_s) > 0
    assert found.speedup == pytest.approx(found.ms / found.compiled_ms, abs=0.01)
    assert host.about_compiled(found) in capsys.readouterr().out
    torch._dynamo.reset()


def test_nothing_is_left_behind():
    model = host.build()
    with host.variant("vtc, graphs"), host.stamped(model):
        assert "forward" in vars(model.model.language_model)
        assert type(model.model.vision_tower).forward.__wrapped__ is not None
    assert "forward" not in vars(model.model.language_model)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_readme_says_what_is_expected(known):
    """The sums of README are those of the generated table."""
    page = (ROOT / "vtc/hf/graphs/README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\d+) \| 64 \| ([\d.]+) \| ([\d.]+) \+ ([\d.]+) = ([\d.]+) \| ([\d.]+) \+ ([\d.]+) = ([\d.]+) \|",
        page,
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["1", "4", "16"]
    (first, *later), whole = rows, [[row[place] for place in (7, 1, 4)] for row in rows]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    ours, stock, graphs = whole[0]
    assert f"{ours} ms ({first[5]} on the GPU + {first[6]} on the host) instead of {stock} (stock) or {graphs} " in text
    for row, (ours, stock, graphs) in zip(later, whole[1:], strict=True):
        assert f"{ours} instead of {stock} or {graphs} at {row[0]}" in text
    kernels = counts(known)
    assert f"Python launches {kernels['stock']['kernels']} kernels for a first token" in text
    assert f"each new token leave {kernels['vtc, graphs']['kernels']}." in text

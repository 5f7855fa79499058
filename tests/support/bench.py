"""What the tests of the benchmarks share: made-up records, a worker, and a stand-in for ncu."""

import os
import sys

import torch

from bench import record, timing
from bench.gate import Checked

CPU = torch.device("cpu")
CHECKED = Checked("topk", "small", "fp32", {"B": 1}, "triton", {}, None, None)


def make_record(host=(1.0, 2.0, 4.0), device_ms=None, **changes):
    times = timing.Times(host, device_ms, None if device_ms else "no GPU")
    values = dict(
        suite="micro", op="topk", model="small", shape={"B": 1}, dtype="fp32", backend="reference",
        times=times, moved=10**6, copy=10.0, peak_bytes=None, sdpa=None, device=CPU,
    )  # fmt: skip
    return record.make(**values | changes)


# A worker of nine jobs that write their numbers; %s is an expression for the jobs to run.
WORKER = """
import argparse, os, pathlib, time
from bench import faults, jobs
parser = argparse.ArgumentParser()
for name in ("--out", "--journal"): parser.add_argument(name, type=pathlib.Path)
parser.add_argument("--skip", type=int)
a, _ = parser.parse_known_args()
made = [jobs.Job(f"job {n}", lambda n=n: [{"value": n, "process": os.getpid()}]) for n in range(9)]
jobs.work(%s, a.out, a.journal, a.skip)
"""

# Two numbers, and one that takes too long.
SLOW = WORKER % "made[:2] + [jobs.Job('slow', lambda: time.sleep(600), 900)]"


# Replaces ncu: reads its options, runs the command, writes a table as ncu does.
NCU = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
out = arguments[arguments.index("--log-file") + 1]
status = subprocess.run(arguments[arguments.index("--log-file") + 2 :]).returncode
metrics = arguments[arguments.index("--metrics") + 1].split(",")
with open(out, "w") as file:
    print("==PROF== Connected to process 1", file=file)
    print(*(f'"{{name}}"' for name in ("ID", "Kernel Name", *metrics)), sep=",", file=file)
    print(*(f'"{{unit}}"' for unit in ("", "", "us", "Mbyte", *[""] * (len(metrics) - 2))), sep=",", file=file)
    values = 0, "_topk_kernel", "4.25", "1,2", *range(len(metrics) - 2)
    print(*(f'"{{value}}"' for value in values), sep=",", file=file)
sys.exit(status)
"""


def play_ncu(folder, monkeypatch):
    (folder / "bin").mkdir()
    (folder / "bin" / "ncu").write_text(NCU.format(python=sys.executable))
    (folder / "bin" / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

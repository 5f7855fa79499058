"""One profile of each kernel by Nsight Compute, where it is installed: its hardware counters."""

from __future__ import annotations

import csv
import glob
import os
import shutil
import sys
from pathlib import Path

import torch

from bench import micro
from bench.workloads import WORKLOADS, base

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared",
    "launch__waves_per_multiprocessor": "waves",
    "smsp__inst_executed.sum": "instructions",
}


def path() -> str | None:
    """Where the command is, on the PATH or where NVIDIA's installers put it; None if nowhere."""
    found = shutil.which("ncu")
    places = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu")) + glob.glob("/usr/local/cuda/bin/ncu")
    return found or next((place for place in reversed(places) if os.access(place, os.X_OK)), None)


def command(ncu: str, out: Path, arguments: list[str]) -> list[str]:
    """Profile `python ARGUMENTS`: only the kernels of this project, with the clocks as they are."""
    options = [
        "--clock-control",
        "none",
        "--target-processes",
        "application-only",
        "--kernel-name",
        "regex:^_.*_kernel",
    ]
    options += ["--metrics", ",".join(METRICS), "--csv", "--page", "raw", "--log-file", str(out)]
    return [ncu, *options, sys.executable, *arguments]


@torch.no_grad()
def launch_once(device: torch.device, played: bool = False) -> None:
    """The program that is profiled: every operation once, LLaVA-1.5 in bf16 with 16 images."""
    model = base.MODELS[0] if device.type == "cuda" else base.SMALL_MODELS[1]
    batch, keep, dtype = (16, 64, torch.bfloat16) if device.type == "cuda" else (1, 8, torch.float32)
    for op, work in WORKLOADS.items():
        if op != "scored_layers" and micro.available("triton", device, played):  # it is made of others
            inputs = work.make(model.shape(batch, keep), dtype if work.floats else torch.float32, device)
            work.providers()["triton"](*inputs)


def error(out: Path) -> str | None:
    """The error that ncu wrote into its file, if any."""
    printed = out.read_text(encoding="utf-8", errors="replace").splitlines() if out.exists() else []
    return next((line for line in printed if line.startswith("==ERROR==")), None)


def profiles(out: Path) -> list[str]:
    """A line for each kernel of the file that `command` has written: the counters, with ncu's units.

    Raises
    ------
    ValueError
        If the file does not exist, or has no table with these counters.
    """
    if not out.exists():
        raise ValueError(f"ncu wrote no {out.name}")
    text = [line for line in out.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith('"')]
    head, units, *rows = csv.reader(text) if len(text) > 2 else ([], [])
    if "Kernel Name" not in head or not set(METRICS) & set(head):
        raise ValueError(f"{out.name} has no table of kernels: {error(out) or 'and no error'}")
    found = []
    for row in rows:
        value = dict(zip(head, row, strict=False))
        unit = dict(zip(head, units, strict=False))
        counters = [f"{name} {value[m]} {unit[m]}".strip() for m, name in METRICS.items() if value.get(m)]
        found.append(f"{value['Kernel Name']}: {', '.join(counters)}")
    return found


if __name__ == "__main__":  # not a command of `bench`, whose imports take longer than the kernels
    launch_once(torch.device("cpu" if "--rehearse" in sys.argv else "cuda"), "--rehearse" in sys.argv)

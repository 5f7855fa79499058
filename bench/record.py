"""The record: one JSON line per number, with its provenance."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vtc
from bench.timing import Times

PACKAGES = Path(vtc.__file__).resolve().parent.parent  # of the checkout that is being run


@dataclasses.dataclass(kw_only=True)
class Provenance:
    """The facts needed to judge or repeat a number: the device, the versions, the revision that ran, and the time."""

    device: str
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None
    transformers: str | None
    revision: str | None
    dirty: bool | None
    date: str


@dataclasses.dataclass(kw_only=True)
class Record(Provenance):
    """One timed row. Times in milliseconds; GB are 1e9 bytes; `peak_bytes` beyond the inputs, None on a CPU."""

    suite: str  # "micro", "e2e" or "attention"
    op: str  # the operation, or the stage
    model: str
    shape: dict[str, int]
    dtype: str
    backend: str  # the provider, or the variant
    ms_20: float  # from the call to the end of its work, host time included
    ms_50: float
    ms_80: float
    device_ms_20: float | None  # device time only: replays of a captured graph
    device_ms_50: float | None
    device_ms_80: float | None
    no_device_ms: str | None  # why there is none
    bytes: int
    gb_per_s: float  # by the device's time where there is one
    copy_gb_per_s: float
    copy_share: float
    peak_bytes: int | None
    sdpa: str | None  # which of SDPA's implementations ran
    # The stock model's time divided by this one, host time included, of samples taken in turn.
    speedup_20: float | None = None
    speedup_50: float | None = None
    speedup_80: float | None = None
    # Whole models: the least time by `bench.roofline`, what it is due to, and the measured rate of a matrix product.
    floor_ms: float | None = None
    bound: str | None = None
    matmul_tflop_per_s: float | None = None

    @property
    def ms(self) -> float:
        """The median that comparisons use: the device's if there is one."""
        return self.ms_50 if self.device_ms_50 is None else self.device_ms_50


FIELDS = tuple(field.name for field in dataclasses.fields(Record))


def make(*, times: Times, moved: int, copy: float, device: torch.device, **rest: Any) -> Record:
    """A record of measured times."""
    low, middle, high = times.device or (None, None, None)
    slow, typical, fast = times.speedup or (None, None, None)
    rate = moved / (middle or times.host[1]) / 1e6
    return Record(
        ms_20=times.host[0],
        ms_50=times.host[1],
        ms_80=times.host[2],
        device_ms_20=low,
        device_ms_50=middle,
        device_ms_80=high,
        no_device_ms=times.why,
        speedup_20=slow,
        speedup_50=typical,
        speedup_80=fast,
        bytes=moved,
        gb_per_s=rate,
        copy_gb_per_s=copy,
        copy_share=rate / copy,
        **provenance(device),
        **rest,
    )


def provenance(device: torch.device) -> dict[str, Any]:
    """The fields of a `Provenance`, now."""
    return _environment(device) | {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


@functools.cache
def _environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, and the revision of the `vtc` that is being run."""
    on_gpu = device.type == "cuda"
    revision, dirty = git_state(PACKAGES)
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,  # with the CUDA it was built for
        "triton": version("triton"),
        "transformers": version("transformers"),
        "revision": revision,
        "dirty": dirty,
    }


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """The revision of a checkout and whether it differs from it (new files included).

    The environment variable VTC_REVISION takes precedence, for an unpacked archive or a copy of the files; whether
    the files differ is then unknown.
    """
    given = os.environ.get("VTC_REVISION")
    if given or not (root / ".git").exists():  # a repository further up is not ours
        return given, None
    revision = _output("git", "-C", str(root), "rev-parse", "HEAD")
    status = _output("git", "-C", str(root), "status", "--porcelain")
    return revision, None if status is None else bool(status)


def append(path: Path, records: Sequence[Any]) -> None:
    """Append records, of this or another dataclass, or dicts, to a file of JSON lines."""
    made = [r if isinstance(r, dict) else dataclasses.asdict(r) for r in records]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in made)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a writer was killed within its line
                text = "\n" + text
        file.write(text.encode())


def read(path: Path, kind: type = Record) -> list[Any]:
    """The records, of the dataclass `kind`, that `append` has written; `failures` has the jobs without one.

    ValueError if the file holds something else.
    """
    try:
        return [kind(**_renamed(line)) for line in lines(path) if "failed" not in line]
    except TypeError as error:
        raise ValueError(f"{path} holds other things than records of the kind {kind.__name__} ({error})") from error


def _renamed(line: dict[str, Any]) -> dict[str, Any]:
    """A line with today's name of the stage that older records of whole models call "select"."""
    return line | {"op": "selection"} if (line.get("suite"), line.get("op")) == ("e2e", "select") else line


def failures(path: Path) -> dict[str, str]:
    """The jobs that gave no record, and why."""
    return {line["job"]: line["failed"] for line in lines(path) if "failed" in line}


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may not exist, and whose last line may be incomplete."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return "\n".join(dict.fromkeys(result.stdout.strip().splitlines()))

"""The record: one JSON line per number, with everything that is needed to judge or repeat it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vtc


@dataclasses.dataclass
class Record:
    """One timed row. Times in milliseconds; GB are 1e9 bytes; `peak_bytes` beyond the inputs, None on a CPU."""

    suite: str  # "micro" or "e2e"
    op: str  # the operation, or the stage
    model: str
    shape: dict[str, int]
    dtype: str
    backend: str  # the provider, or the variant
    ms_20: float
    ms_50: float
    ms_80: float
    bytes: int
    gb_per_s: float
    copy_gb_per_s: float
    copy_share: float
    peak_bytes: int | None
    speedup: dict[str, float]  # against each other provider: its median / this median; a loss is below 1
    device: str
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None
    transformers: str | None
    revision: str | None
    dirty: bool | None
    date: str


FIELDS = tuple(field.name for field in dataclasses.fields(Record))


def make(*, times: tuple[float, float, float], moved: int, copy: float, device: torch.device, **rest: Any) -> Record:
    """A record of what was measured; `speedup` is filled in by `compare_within`."""
    rate = moved / times[1] / 1e6
    return Record(
        ms_20=times[0],
        ms_50=times[1],
        ms_80=times[2],
        bytes=moved,
        gb_per_s=rate,
        copy_gb_per_s=copy,
        copy_share=rate / copy,
        speedup={},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **provenance(device),
        **rest,
    )


def compare_within(records: list[Record]) -> None:
    """Fill in `speedup` for records of one op and shape."""
    for record in records:
        others = (other for other in records if other is not record)
        record.speedup = {other.backend: other.ms_50 / record.ms_50 for other in others}


@functools.cache
def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions, and the revision of the `vtc` that is being run."""
    on_gpu = device.type == "cuda"
    revision, dirty = git_state(Path(vtc.__file__).resolve().parent.parent)
    versions = {name: _version(name) for name in ("torch", "triton", "transformers")}
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        **versions,
        "revision": revision,
        "dirty": dirty,
    }


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """The revision of a checkout and whether it differs from it (new files included); None, None without git."""
    if not (root / ".git").exists():  # an unpacked archive: a repository further up is not ours
        return None, None
    revision = _output("git", "-C", str(root), "rev-parse", "HEAD")
    status = _output("git", "-C", str(root), "status", "--porcelain")
    return revision, None if status is None else bool(status)


def append(path: Path, records: Sequence[Any]) -> None:
    """Add records, of this or another dataclass, to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n")


def read(path: Path, kind: type = Record) -> list[Any]:
    """The records, of the dataclass `kind`, that `append` has written."""
    with path.open(encoding="utf-8") as file:
        return [kind(**json.loads(line)) for line in file if line.strip()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return "\n".join(dict.fromkeys(result.stdout.strip().splitlines()))

"""The result of one run: the figures of a task for one setting, with what they cost and where they come from."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vtc.eval.task import Figure


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one run took. Seconds; those per question are means over the answers.

    Attributes
    ----------
    answers : int
    generate_seconds : float
        Per question: from prepared inputs to the last token on the host.
    prepare_seconds : float
        Per question: reading and preparing the image and the prompt. Workers do it while the model generates.
    whole_seconds : float, optional
        Of the whole run without loading the model, all processes side by side. None if a process was killed, since what
        it had spent on unfinished answers is unknown, or if the number of processes or workers changed on the way.
    wait_seconds : float, optional
        How much of it the model waited for prepared inputs.
    load_seconds : float, optional
        Loading the model, and on a GPU a first batch that starts its libraries.
    new_tokens : float
        Per question.
    processes : int
        That answered side by side.
    workers : int
        Processes that prepared inputs for each.
    """

    answers: int
    generate_seconds: float
    prepare_seconds: float
    new_tokens: float
    whole_seconds: float | None = None
    wait_seconds: float | None = None
    load_seconds: float | None = None
    processes: int = 1
    workers: int = 0

    @property
    def bound(self) -> str | None:
        """Which bounds the run: "generation", or "preparation" if the model waited for a fifth of the time."""
        if self.whole_seconds is None or self.wait_seconds is None:
            return None
        return "preparation" if self.wait_seconds > 0.2 * self.whole_seconds * self.processes else "generation"


@dataclasses.dataclass(frozen=True)
class Result:
    """One task with one setting.

    Attributes
    ----------
    task, title : str
        Its name on the command line, and in tables.
    model : str
        Folder or hub id.
    method, label : str
        The method, and the setting's whole name.
    options : dict
        Of the setting: `keep`, and what else was given.
    figures : dict of str to Figure
        The first is the one that tables show. Empty if a server or a judge scores the task.
    complete : bool
        Whether every question of the run has an answer. The figures of an incomplete run are over those that have.
    questions, answered, skipped : int
        Asked in this run; answered; left out because their images cannot be read.
    limit : int, optional
        `--limit`: the run asks only a sample.
    visual_tokens : float, optional
        Kept of an image on average.
    notes : tuple of str
    timing : Timing
    fingerprint : dict
        Everything that can change an answer, `protocol`, `dtype` and `batch_size` among it.
    environment : dict
        Versions, device and date of the last answers, and the GPUs of all.
    files : tuple of str
        The answers, and the files for servers and judges.
    token_layers : float, optional
        Visual tokens of an image, averaged over the layers of the language model; see `vtc.config.token_layers`. None
        in results from before it was noted.
    """

    task: str
    title: str
    model: str
    method: str
    label: str
    options: dict[str, Any]
    figures: dict[str, Figure]
    complete: bool
    questions: int
    answered: int
    skipped: int
    limit: int | None
    visual_tokens: float | None
    notes: tuple[str, ...]
    timing: Timing
    fingerprint: dict[str, Any]
    environment: dict[str, Any]
    files: tuple[str, ...] = ()
    token_layers: float | None = None

    @property
    def main(self) -> Figure | None:
        """The figure that tables show."""
        return next(iter(self.figures.values()), None)

    @property
    def main_name(self) -> str | None:
        """What it is."""
        return next(iter(self.figures), None)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Result:
        """The result that `to_json` wrote."""
        fields: Mapping[str, Any] = json.loads(line)
        return cls(
            **{
                **fields,
                "figures": {name: Figure(*figure) for name, figure in fields["figures"].items()},
                "notes": tuple(fields["notes"]),
                "files": tuple(fields["files"]),
                "timing": Timing(**fields["timing"]),
            }
        )


def read(file: Path) -> list[Result]:
    """The results of a file of JSON lines."""
    lines = file.read_text(encoding="utf-8").split("\n")  # splitlines() also splits at U+2028, which JSON may hold
    return [Result.from_json(line) for line in lines if line]


def environment(device: str) -> dict[str, Any]:
    """Versions, device and date."""
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()  # it may be on another machine
    gpu = torch.cuda.get_device_name(device) if on_gpu else None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**versions(), "device": device, "gpu": gpu, "date": now}


def versions() -> dict[str, str | None]:
    """The versions of what computes answers."""
    return {name: _version(name) for name in ("torch", "triton", "transformers", "pillow", "vtc-cls")}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

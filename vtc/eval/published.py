"""Published figures for LLaVA-1.5, with their sources. None of them was measured with this project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

COLUMNS = ("sqa", "gqa", "textvqa", "pope", "mmbench", "mmbench_cn", "mmvet", "seed")  # the order of published tables
LLAVA, FASTERVLM, VTC_CLS, TOPS, MMTOK = "LLaVA", "FasterVLM", "VTC-CLS", "TOPS", "MMTok"
SOURCES = {
    VTC_CLS: "VTC-CLS: the table in its authors' repository, LLaVA-1.5-7B, scored layers not stated",
    LLAVA: "LLaVA: its authors' figures for LLaVA-1.5",
    FASTERVLM: "FasterVLM: its authors' own runs of LLaVA-1.5",
    # What these two have without compression are the figures of LLaVA and FasterVLM, rounded: 61.9 of GQA, for one.
    # Where both have VisionZip's figures, they are the same. So some rows may be those of the methods' own papers.
    TOPS: "TOPS: table 11 of the paper, LLaVA-1.5-7B; some rows may be of the methods' own papers",
    MMTOK: "MMTok: table 16 of the paper, LLaVA-1.5-7B, lmms-eval; some rows may be of the methods' own papers",
}
WHAT = {
    "sqa": "accuracy over all 4,241 questions, those without an image included",
    "gqa": "accuracy, testdev balanced, 12,578 questions",
    "textvqa": "accuracy, validation, OCR tokens in the prompt, 5,000 questions",
    "pope": "mean F1 of the three splits, 8,910 questions",
    "mmbench": "CircularEval, dev; 1,176 questions in the file of July 2023, 1,164 on the server today",
    "mmbench_cn": "CircularEval, dev, 1,164 questions",
    "mmvet": "score by a GPT-4 judge, which changed over time, 218 questions",
    "seed": "accuracy over the 14,233 questions about images",
}
_IMAGE_ONLY = "accuracy over the 2,017 questions with an image"


class Published(NamedTuple):
    """A published figure.

    Attributes
    ----------
    task, method : str
        As on the command line.
    keep : int, optional
        Visual tokens. None without compression.
    size : str
        Of LLaVA-1.5: "7b" or "13b".
    value : float
        In percent, with the decimals of its source.
    source : str
        A key of `SOURCES`.
    what : str
        What it is.
    same : bool
        Whether it is the figure that the task shows in tables. Only then may the two stand in one column.
    """

    task: str
    method: str
    keep: int | None
    size: str
    value: float
    source: str
    what: str
    same: bool = True


class PublishedTime(NamedTuple):
    """The published duration of a whole evaluation on unstated hardware, and the questions that it answers."""

    seconds: float
    questions: int

    @property
    def per_question(self) -> float:
        """Seconds."""
        return self.seconds / self.questions


def _figures(source: str, method: str, keep: int | None, size: str, values: Mapping[str, float]) -> list[Published]:
    return [Published(task, method, keep, size, value, source, WHAT[task]) for task, value in values.items()]


def _rows() -> list[Published]:
    rows: list[Published] = []
    for method, keep, *values in (
        # in the order of COLUMNS
        ("none", None, 70.2, 62.0, 58.3, 85.9, 64.7, 58.1, 31.1, 66.2),
        ("fastv", 256, 69.3, 59.1, 58.0, 80.2, 64.1, 57.8, 30.9, 64.5),
        ("prumerge+", 256, 70.0, 59.5, 55.1, 84.1, 63.2, 57.2, 31.8, 64.0),
        ("vtc-cls", 256, 69.6, 60.3, 57.7, 86.2, 63.6, 57.1, 34.4, 64.8),
        ("fastv", 128, 69.3, 54.1, 56.4, 67.6, 63.1, 55.9, 26.7, 59.6),
        ("prumerge+", 128, 70.1, 57.8, 54.3, 81.5, 61.3, 54.7, 28.7, 60.8),
        ("vtc-cls", 128, 69.7, 58.2, 56.8, 84.0, 62.5, 56.8, 33.4, 62.2),
        ("fastv", 64, 68.6, 46.0, 51.4, 35.6, 50.4, 42.3, 21.2, 47.1),
        ("prumerge+", 64, 70.1, 55.9, 53.0, 77.4, 59.3, 51.0, 25.9, 58.3),
        ("vtc-cls", 64, 70.0, 55.7, 55.5, 78.8, 61.2, 55.8, 31.7, 58.3),
    ):
        rows += _figures(VTC_CLS, method, keep, "7b", dict(zip(COLUMNS, values, strict=True)))
    six = ("gqa", "textvqa", "pope", "mmbench", "mmbench_cn", "mmvet")
    for source, method, keep, size, image_only, *values in (
        (LLAVA, "none", None, "7b", 66.8, 62.0, 58.2, 85.9, 64.3, 58.3, 31.1),
        (LLAVA, "none", None, "13b", 71.6, 63.3, 61.3, 85.9, 67.7, 63.6, 36.1),
        (FASTERVLM, "none", None, "7b", 69.51, 61.94, 58.21, 85.87, 64.69, 58.08, 31.30),
        (FASTERVLM, "none", None, "13b", 72.78, 63.25, 61.19, 85.99, 68.47, 63.49, 36.30),
        (FASTERVLM, "floor", 0, "7b", 63.06, 37.38, 41.43, 47.21, 20.02, 17.70, 11.30),
    ):
        rows += _figures(source, method, keep, size, dict(zip(six, values, strict=True)))
        rows.append(Published("sqa", method, keep, size, image_only, source, _IMAGE_ONLY, same=False))
    for method, keep, image_only, *values in (
        ("visionzip", 128, 68.7, 57.6, 56.9, 83.3, 62.1, 57.0, 31.6),
        ("divprune", 128, 68.6, 59.4, 55.9, 87.0, 61.5, 54.8, 30.6),
        ("scope", 128, 68.5, 59.4, 57.1, 85.9, 62.7, 57.0, 31.3),
        ("visionzip", 64, 69.0, 55.1, 55.5, 77.0, 60.1, 55.4, 29.4),
        ("divprune", 64, 68.0, 57.5, 54.5, 85.5, 60.1, 52.3, 28.1),
        ("scope", 64, 68.7, 58.3, 56.5, 84.1, 61.0, 56.0, 30.5),
        ("visionzip", 32, 69.1, 51.8, 53.1, 69.4, 57.0, 50.3, 25.3),
        ("divprune", 32, 68.6, 54.9, 52.9, 81.5, 57.6, 49.1, 26.3),
        ("scope", 32, 69.4, 56.2, 54.8, 80.2, 60.7, 52.5, 29.8),
    ):
        rows += _figures(TOPS, method, keep, "7b", dict(zip(six, values, strict=True)))
        rows.append(Published("sqa", method, keep, "7b", image_only, TOPS, _IMAGE_ONLY, same=False))
    what = "accuracy over all 19,242 questions, those about videos included"
    for method, keep, image_only, seed, *values in (
        ("visionzip", 192, 68.9, 56.4, 59.3, 57.3, 85.3, 63.0),
        ("divprune", 192, 68.66, 58.71, 59.97, 56.97, 87.00, 62.54),
        ("mmtok", 192, 68.76, 59.21, 60.07, 57.68, 86.42, 63.40),
        ("visionzip", 128, 68.9, 54.9, 57.6, 56.8, 83.2, 62.0),
        ("divprune", 128, 68.66, 56.98, 59.25, 56.06, 86.72, 62.03),
        ("mmtok", 128, 68.82, 58.59, 59.29, 57.03, 86.25, 62.29),
        ("visionzip", 64, 69.0, 52.2, 55.1, 55.5, 77.0, 60.1),
        ("divprune", 64, 68.07, 55.13, 57.78, 54.69, 85.56, 59.28),
        ("mmtok", 64, 69.16, 57.15, 58.29, 56.01, 85.77, 61.17),
    ):
        rows += _figures(MMTOK, method, keep, "7b", dict(zip(six[:4], values, strict=True)))
        rows.append(Published("sqa", method, keep, "7b", image_only, MMTOK, _IMAGE_ONLY, same=False))
        rows.append(Published("seed", method, keep, "7b", seed, MMTOK, what, same=False))
    for size, value in (("7b", 58.6), ("13b", 61.6)):
        rows.append(Published("seed", "none", None, size, value, LLAVA, what, same=False))
    return rows


PUBLISHED = tuple(_rows())

# The average over the eight tasks as the VTC-CLS authors print it.
AVERAGES = {
    ("none", None): 62.1,
    ("fastv", 256): 60.5,
    ("prumerge+", 256): 60.6,
    ("vtc-cls", 256): 61.7,
    ("fastv", 128): 56.6,
    ("prumerge+", 128): 58.6,
    ("vtc-cls", 128): 60.5,
    ("fastv", 64): 45.3,
    ("prumerge+", 64): 56.3,
    ("vtc-cls", 64): 58.4,
}

# The VTC-CLS authors' times with LLaVA-1.5-7B.
TIMES = {
    ("gqa", "none", None): PublishedTime(3018, 12578),
    ("gqa", "vtc-cls", 128): PublishedTime(2049, 12578),
    ("gqa", "vtc-cls", 64): PublishedTime(1750, 12578),
    ("pope", "none", None): PublishedTime(1921, 8910),
    ("pope", "vtc-cls", 128): PublishedTime(1349, 8910),
    ("pope", "vtc-cls", 64): PublishedTime(1216, 8910),
}
WHAT_TIME = (
    "the whole evaluation on unstated hardware, divided by its questions. One question at a time, images prepared in "
    "the same process while the model waits; whether loading the model counts is not stated"
)


def size_of(model: str) -> str | None:
    """ "7b" or "13b" if the name of a folder or a hub id says that the model is LLaVA-1.5 of that size."""
    found = re.search(r"llava-v?1\.5-(7b|13b)(?![0-9a-z])", model.lower())
    return found and found[1]


def published(task: str, method: str, keep: object, size: str | None) -> list[Published]:
    """The published figures of a task for a method at a number of tokens, in the order of `PUBLISHED`.

    Parameters
    ----------
    keep
        The number of tokens of a method that compresses; not read for "none" and "floor".
    size : str, optional
        As `size_of` tells it.
    """
    keep = _keep(method, keep)
    return [p for p in PUBLISHED if (p.task, p.method, p.keep, p.size) == (task, method, keep, size)]


def average(method: str, keep: object, size: str | None) -> float | None:
    """The published average over the eight tasks."""
    return AVERAGES.get((method, _keep(method, keep))) if size == "7b" else None


def time(task: str, method: str, keep: object, size: str | None) -> PublishedTime | None:
    """The published duration of a task."""
    return TIMES.get((task, method, _keep(method, keep))) if size == "7b" else None


def _keep(method: str, keep: object) -> int | None:
    if method in ("none", "floor"):
        return None if method == "none" else 0
    return keep if isinstance(keep, int) else -1  # a share of the tokens was not published

"""`python -m bench quality`: what the bundled model still answers with fewer visual tokens, method by method."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import record, table
from vtc import tiny
from vtc.config import DEFAULT_PRUNE_LAYER
from vtc.hf import patch as llava
from vtc.methods import METHODS
from vtc.tiny.evaluate import Answers, answer, batches
from vtc.tiny.scenes import FAMILIES, Question, Scene, balanced_questions

KEEPS = (288, 192, 128, 64, 32, 16)
BASELINE = "vtc-cls"  # what every other method is compared with, on the same questions
INSIDE = {
    "prune_layer": DEFAULT_PRUNE_LAYER
}  # the baseline runs a second time inside the language model, where fastv does
ITS_OWN = ("prumerge",)  # keeps as many as it finds, whatever is asked, and so runs once
SWEEP_KEEP = 64
Share = tuple[float, float, float]  # a share and its 95 % interval


@dataclasses.dataclass
class Quality:
    """One method at one number of visual tokens, on the same questions as all others of its run.

    Shares come with the low and the high end of a 95 % interval: Wilson's for proportions; for `difference`, which is
    paired, the normal one. None where there is nothing to compare with.
    """

    method: str  # "all tokens" for the model without compression
    options: dict[str, Any]  # of `VTCConfig`, besides the method and keep
    keep: int  # asked for
    tokens: float  # left of an image, on average
    questions: int
    split: str
    accuracy: Share
    families: dict[str, Share]
    agreement: Share | None  # with the answers of all tokens
    difference: Share | None  # accuracy less that of `BASELINE` at as many tokens
    checkpoint: str  # the bundled model's: its weights' SHA-256, first 12 digits
    device: str
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None
    transformers: str | None
    revision: str | None
    dirty: bool | None
    date: str

    @property
    def name(self) -> str:
        """The method with its options."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def swept(self) -> bool:
        """Whether it belongs to the sweep of the baseline's settings, and not to the comparison of methods."""
        return bool(self.options) and self.options != INSIDE


def wilson(count: int, total: int) -> Share:
    """`count / total` and its 95 % interval (Wilson, 1927)."""
    z, share = 1.96, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> Share:
    """Accuracy of `ours` less that of `theirs` on the same questions, and its 95 % interval."""
    total = len(ours)
    gains = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    difference = (gains - losses) / total
    half = 1.96 * math.sqrt(max(0.0, gains + losses - (gains - losses) ** 2 / total)) / total
    return difference, difference - half, difference + half


def run(
    count: int,
    keeps: Sequence[int],
    methods: Sequence[str],
    out: Path | None,
    *,
    sweep: bool = False,
    split: str = "test",
    say: Callable[[str], None] = print,
) -> list[Quality]:
    """Ask `count` held-out questions with every method at every number of tokens.

    Parameters
    ----------
    count : int
        Questions, one a scene; families and answers are balanced.
    keeps : sequence of int
        Visual tokens per image.
    methods : sequence of str
        Of `vtc.methods.METHODS`. `BASELINE` is always run, for the paired differences; if it is named, inside the
        language model, too.
    out : Path, optional
        The records go there, JSON lines; a file of that name is overwritten.
    sweep : bool
        Also the baseline's `ensemble_layers` and `ensemble`, at `SWEEP_KEEP` tokens.

    Raises
    ------
    ValueError
        For an unknown method.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    model, processor = tiny.load(attn_implementation="sdpa")
    asked = balanced_questions(split, count)
    prepared = batches(model, processor, asked)
    told = provenance(count, split)
    records: list[Quality] = []

    def keep_record(made: Quality) -> None:
        records.append(made)
        say(f"{made.name} {made.keep}: {percent(made.accuracy)}")
        if out:  # one by one: what has been measured stays if the rest is cut short
            record.append(out, [made])

    if out:
        out.unlink(missing_ok=True)
    full = answer(model, processor, prepared)
    keep_record(
        _record(asked, full, None, None, told, method="all tokens", options={}, keep=model.config.image_seq_length)
    )
    baseline: dict[int, Answers] = {}
    for name, options, budgets in _settings(keeps, methods, sweep, model.config.vision_config.num_hidden_layers):
        said = _answers(model, processor, prepared, budgets, method=name, **options)
        for keep, answers in said.items():
            against = baseline.get(keep)
            keep_record(_record(asked, answers, full, against, told, method=name, options=options, keep=keep))
        if name == BASELINE and not options:
            baseline |= said
    return records


def _answers(
    model: Any, processor: Any, prepared: Sequence[Any], keeps: Sequence[int], **setting: Any
) -> dict[int, Answers]:
    """The answers at each of `keeps`, batch after batch."""
    parts: dict[int, list[Answers]] = {keep: [] for keep in keeps}
    with mock.patch.object(llava, "run_tower", _once(llava.run_tower)):
        for batch in prepared:
            for keep in keeps:
                parts[keep].append(answer(model, processor, [batch], keep=keep, **setting))
    said = {}
    for keep, of in parts.items():
        texts = [text for part in of for text in part.texts]
        left = sum((part.tokens or 0.0) * len(part.texts) for part in of)
        said[keep] = Answers(texts, left / max(1, len(texts)), sum(part.seconds for part in of))
    return said


def _once(run_tower: Callable[..., Any]) -> Callable[..., Any]:
    """`run_tower`, which does not run again for the same pixels and settings: it does not depend on `keep`."""
    last: list[Any] = []

    def remembered(base: Any, pixel_values: torch.Tensor, plan: Any) -> Any:
        setting = plan.config.updated(keep=1)
        if not (last and last[0] == setting and torch.equal(last[1], pixel_values)):
            last[:] = (setting, pixel_values, run_tower(base, pixel_values, plan))
        return last[2]

    return remembered


def _settings(
    keeps: Sequence[int], methods: Sequence[str], sweep: bool, depth: int
) -> list[tuple[str, dict[str, Any], Sequence[int]]]:
    """Method, options and budgets of every run after the one with all tokens; the baseline's come first."""
    budgets = {BASELINE: [*keeps, *((SWEEP_KEEP,) if sweep and SWEEP_KEEP not in keeps else ())]}
    budgets |= dict.fromkeys(ITS_OWN, [SWEEP_KEEP] if SWEEP_KEEP in keeps else keeps[:1])
    names = [BASELINE, *(name for name in methods if name not in (BASELINE, "none"))]
    settings: list[tuple[str, dict[str, Any], Sequence[int]]] = [(name, {}, budgets.get(name, keeps)) for name in names]
    if BASELINE in methods:
        settings.append((BASELINE, INSIDE, keeps))
    if sweep:
        layers: list[dict[str, Any]] = [{"ensemble_layers": n} for n in range(1, depth) if n != 3]
        ensembles: list[dict[str, Any]] = [{"ensemble": name} for name in ("mean", "max", "min")]
        settings += [(BASELINE, options, [SWEEP_KEEP]) for options in layers + ensembles]
    return settings


def _record(
    asked: list[tuple[Scene, Question]],
    said: Answers,
    full: Answers | None,
    against: Answers | None,
    told: dict[str, Any],
    **rest: Any,
) -> Quality:
    def right(answers: Answers) -> list[bool]:
        return [question.answer == text for (_, question), text in zip(asked, answers.texts, strict=True)]

    mine = right(said)
    by_family = {f: [ok for ok, (_, q) in zip(mine, asked, strict=True) if q.family == f] for f in FAMILIES}
    agreed = None if full is None else sum(a == b for a, b in zip(said.texts, full.texts, strict=True))
    return Quality(
        tokens=round(said.tokens or rest["keep"], 1),
        accuracy=wilson(sum(mine), len(mine)),
        families={family: wilson(sum(oks), len(oks)) for family, oks in by_family.items() if oks},
        agreement=None if agreed is None else wilson(agreed, len(asked)),
        difference=None if against is None else paired(mine, right(against)),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **told,
        **rest,
    )


def provenance(count: int, split: str) -> dict[str, Any]:
    """What all records of a run have in common."""
    import hashlib

    weights = hashlib.sha256((tiny.CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]
    return dict(questions=count, split=split, checkpoint=weights, **record.provenance(torch.device("cpu")))


def read(path: Path) -> list[Quality]:
    """The records that `run` has written."""
    return record.read(path, Quality)


def percent(share: Share) -> str:
    """A share in percent, with half the width of its interval."""
    return f"{100 * share[0]:.1f} ± {50 * (share[2] - share[1]):.1f}"


def tables(records: list[Quality]) -> str:
    """Accuracy by method and tokens; families and paired differences at `SWEEP_KEEP` tokens; the sweep. Markdown."""
    full, rest = records[0], records[1:]
    compared = [r for r in rest if not r.swept]
    keeps = list(dict.fromkeys(r.keep for r in compared))
    names = list(dict.fromkeys(r.name for r in compared))
    cells = {(r.name, r.keep): percent(r.accuracy) + _tokens(r) for r in compared}
    rows = [[full.name, *[percent(full.accuracy)] * len(keeps)]]
    rows += [[name, *(cells.get((name, keep), "") for keep in keeps)] for name in names]
    parts = [table.markdown(["method", *(f"{keep} tokens" for keep in keeps)], rows)]
    close = [full, *(r for r in compared if r.keep == SWEEP_KEEP)]
    if len(close) > 1:
        parts += [f"At {SWEEP_KEEP} tokens:", _families(close), verdict(close)]
    if swept := [r for r in rest if r.swept]:
        ours = [r for r in compared if r.name == BASELINE and r.keep == SWEEP_KEEP]
        parts += [f"Settings of {BASELINE}, at {SWEEP_KEEP} tokens:", _families(ours + swept), verdict(swept)]
    return "\n\n".join(parts)


def _tokens(r: Quality) -> str:
    """How many tokens were left, if not as many as asked for."""
    return "" if abs(r.tokens - r.keep) < 0.5 else f" ({r.tokens:.0f} tokens)"


def _families(records: list[Quality]) -> str:
    columns = ["method", "all", *FAMILIES, "agreement with all tokens", f"less {BASELINE}, paired"]
    shares = [(r.accuracy, *map(r.families.get, FAMILIES), r.agreement, r.difference) for r in records]
    rows = [
        [r.name + _tokens(r), *(percent(share) if share else "" for share in row)]
        for r, row in zip(records, shares, strict=True)
    ]
    return table.markdown(columns, rows)


def verdict(records: list[Quality]) -> str:
    """Which of the records these questions can tell from the baseline, in a sentence."""
    groups: dict[str, list[str]] = {"worse": [], "better": [], "not told apart": []}
    for r in records:
        if r.difference is None:
            continue
        _, low, high = r.difference
        groups["worse" if high < 0 else "better" if low > 0 else "not told apart"].append(r.name)
    said = [f"{group}: {', '.join(names)}" for group, names in groups.items() if names]
    return (
        f"Against {BASELINE} on the same questions (95 %, paired, each comparison on its own): " + "; ".join(said) + "."
    )

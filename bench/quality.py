"""`python -m bench quality`: accuracy of the bundled model with fewer visual tokens, method by method."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.quality_answers import answer_all
from bench.record import Provenance
from vtc import tiny
from vtc.config import DEFAULT_PRUNE_LAYER
from vtc.eval.intervals import Share, paired, wilson
from vtc.eval.model import ModelSpec
from vtc.eval.progress import Progress
from vtc.eval.question import Answer
from vtc.eval.setting import NONE, Setting, ignores_keep
from vtc.eval.tasks.scenes import Scenes
from vtc.methods import METHODS
from vtc.methods.question import ignored_ids

KEEPS = (288, 192, 128, 64, 32, 16)
BASELINE = "vtc-cls"  # every other method is compared with it, on the same questions
TEMPLATE = "USER: ASSISTANT:"  # what no method counts as the question's words
IN_LANGUAGE_MODEL = {"prune_layer": DEFAULT_PRUNE_LAYER}  # the baseline also runs inside the language model
SWEEP_KEEP = 64
SWEPT = ("ensemble", "ensemble_layers")
BATCH = 16
# Methods by what they select by: a panel each in the plot.
GROUPS = {
    "attention of [CLS]": ("vtc-cls", "fastervlm", "visionzip", "prumerge", "prumerge+", "vispruner"),
    "coverage and distance": ("coverage", "scope", "mmtok", "divprune", "cdpruner"),
    "attention of all queries": ("received", "hiprune"),
    "inside the language model": ("fastv", "dart"),
    "nothing: controls": ("random", "pool", "downsample"),
}
INSIDE, OTHERS = "inside the language model", "something else"


def grouped() -> dict[str, tuple[str, ...]]:
    """`GROUPS`, and the methods that are in none of them."""
    known = {name for names in GROUPS.values() for name in names}
    others = tuple(name for name in METHODS if name not in known and name != NONE)
    return GROUPS | ({OTHERS: others} if others else {})


def variants(keeps: Sequence[int]) -> list[tuple[str, dict[str, Any], Sequence[int]]]:
    """Methods with options that belong to the comparison, and their numbers of tokens."""
    # After layer 1 of 4, the mean over the layers is (576 + 3 K) / 4: 192 and 288 tokens.
    early: dict[str, Any] = {"prune_layer": 1}
    # Three times as many tokens in the first half of the layers as in the second: `keep` on average.
    scheduled = [
        (method, {"schedule": ((0, 3 * keep // 2), (2, keep // 2))}, [keep])
        for method in (BASELINE, "coverage")
        for keep in keeps
        if keep <= 192 and keep % 2 == 0
    ]
    return [
        *scheduled,
        *((method, {"positions": "original"}, keeps) for method in (BASELINE, "coverage", "scope")),
        ("scope", {"ensemble_layers": 3}, keeps),
        ("scope", {"saliency": "received"}, keeps),
        (BASELINE, IN_LANGUAGE_MODEL, keeps),
        *((method, early, [keep for keep in (192, 64) if keep in keeps]) for method in (BASELINE, "fastv", "dart")),
    ]


@dataclasses.dataclass(kw_only=True)
class Quality(Provenance):
    """One method at one number of visual tokens, on the same questions as all others of its run.

    Shares have the low and the high end of a 95 % interval: Wilson's for proportions, the normal one for `difference`,
    which is paired. They are None if there is nothing to compare with.
    """

    method: str  # "all tokens" for the model without compression
    options: dict[str, Any]  # of `vtc.compress`, besides the method and keep
    keep: int  # the setting
    tokens: float  # actually kept per image, on average
    token_layers: float  # the same, averaged over the layers of the language model; see `vtc.config.token_layers`
    questions: int
    split: str
    accuracy: Share
    families: dict[str, Share]
    agreement: Share | None  # with the answers of all tokens
    difference: Share | None  # accuracy minus that of `BASELINE` at the same budget, see `run`
    checkpoint: str  # SHA-256 of the bundled model's weights, first 12 digits

    @property
    def name(self) -> str:
        """The method with its options."""
        options = {name: value for name, value in self.options.items() if name not in ("schedule", "ignore")}
        stages = ["scheduled"] if "schedule" in self.options else []
        return " ".join([self.method, *stages, *(f"{name}={value}" for name, value in options.items())])

    @property
    def swept(self) -> bool:
        """Whether it belongs to the sweep of the baseline's settings, and not to the comparison of methods."""
        return self.method == BASELINE and not self.options.keys().isdisjoint(SWEPT)

    @property
    def group(self) -> str:
        """The key of `GROUPS` that it is shown with."""
        return group_of(self.method, self.options)


def group_of(method: str, options: Mapping[str, Any]) -> str:
    """The key of `GROUPS` that a setting is shown with."""
    if "prune_layer" in options or "schedule" in options:
        return INSIDE
    return next((group for group, methods in grouped().items() if method in methods), OTHERS)


def run(
    count: int,
    keeps: Sequence[int],
    methods: Sequence[str],
    out: Path | None,
    *,
    sweep: bool = False,
    split: str = "test",
    processes: int = 1,
) -> list[Quality]:
    """Ask `count` held-out questions with every method at every number of tokens.

    Methods that select by the question get its words alone, as their papers do. Differences are to `BASELINE` with the
    same `keep`; inside the language model, where another number of tokens passes the first layers, to `BASELINE` with
    as many token·layers, or to none.

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
        The records go there, JSON lines. What the file has of other settings with the same questions stays.
    sweep : bool
        Also the baseline's `ensemble_layers` and `ensemble`, at `SWEEP_KEEP` tokens.
    processes : int
        That answer side by side.

    Raises
    ------
    ValueError
        For an unknown method.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    task, config = Scenes(count=count, split=split), ModelSpec().config()
    common = dict(questions=count, split=split, checkpoint=checkpoint())
    chosen = [Setting(), *settings(keeps, methods, sweep, config.vision_config.num_hidden_layers)]
    with Progress(f"{len(chosen)} settings", count) as progress:
        full, *rest = answer_all(task, chosen, BATCH, processes, advance=progress.advance)
    where = record.provenance(torch.device("cpu"))
    everything: dict[str, Any] = {"method": "all tokens", "options": {}, "keep": config.image_seq_length}
    records = [Quality(**figures(task, full, None, None), **everything, **common, **where)]
    baseline: dict[float, list[Answer]] = {}
    for setting, answers in zip(chosen[1:], rest, strict=True):
        options = dict(setting.options)
        keep = nominal(options)
        budget: float = mean_of("token_layers", answers) if group_of(setting.name, options) == INSIDE else keep
        against = baseline.get(budget)
        if setting.name == BASELINE and not options:
            baseline[keep] = answers
        measured = figures(task, answers, full, against)
        records.append(Quality(**measured, method=setting.name, options=options, keep=keep, **common, **where))
    if out:
        records = merged(read(out) if out.exists() else [], records)
        out.unlink(missing_ok=True)
        record.append(out, records)
    return records


def merged(before: list[Quality], now: list[Quality]) -> list[Quality]:
    """The records `now`, and those of `before` that have the same questions and model, and other settings."""

    def setting(r: Quality) -> str:
        return json.dumps([r.method, r.options, r.keep], sort_keys=True)

    def asked(r: Quality) -> tuple[object, ...]:
        return r.questions, r.split, r.checkpoint

    new = {setting(r): r for r in now}
    stay = [r for r in before if asked(r) == asked(now[0])]
    return [*(new.pop(setting(r), r) for r in stay), *new.values()]


def nominal(options: dict[str, Any]) -> int:
    """The number of tokens that a setting is compared at; `keep` is removed from its `options`."""
    if "schedule" in options:  # the mean of two stages of as many layers
        return sum(keep for _, keep in options["schedule"]) // 2
    keep: int = options.pop("keep")
    return keep


def settings(keeps: Sequence[int], methods: Sequence[str], sweep: bool, depth: int) -> list[Setting]:
    """Every setting after the one with all tokens, the baseline's first; `depth` is the number of vision layers."""
    ignore = ignored_ids(ModelSpec().processor().tokenizer, TEMPLATE)
    budgets = {BASELINE: [*keeps, *((SWEEP_KEEP,) if sweep and SWEEP_KEEP not in keeps else ())]}
    fixed = [name for name in METHODS if ignores_keep(name, {})]
    budgets |= dict.fromkeys(fixed, [SWEEP_KEEP] if SWEEP_KEEP in keeps else keeps[:1])
    names = [BASELINE, *(name for name in methods if name not in (BASELINE, NONE))]
    chosen: list[tuple[str, dict[str, Any], Sequence[int]]] = [
        (name, {"ignore": ignore} if "ignore" in METHODS[name].options() else {}, budgets.get(name, keeps))
        for name in names
    ]
    chosen += [variant for variant in variants(keeps) if variant[0] in methods]
    if sweep:
        layers: list[dict[str, Any]] = [{"ensemble_layers": n} for n in range(1, depth) if n != 3]
        ensembles: list[dict[str, Any]] = [{"ensemble": name} for name in ("mean", "max", "min")]
        chosen += [(BASELINE, options, [SWEEP_KEEP]) for options in layers + ensembles]
    return [
        Setting(name, options if "schedule" in options else {"keep": keep, **options})
        for name, options, budget in chosen
        for keep in budget
    ]


def figures(
    task: Scenes, answers: list[Answer], full: list[Answer] | None, against: list[Answer] | None
) -> dict[str, Any]:
    """The measured fields of a record; `full` are the answers with all tokens, `against` those of the baseline."""

    def right(given: list[Answer]) -> list[bool]:
        return list(task.right({answer.line: answer.text for answer in given}).values())

    mine = right(answers)
    families = task.families({answer.line: answer.text for answer in answers})
    agreed = None if full is None else sum(a.text == b.text for a, b in zip(answers, full, strict=True))
    return {
        "tokens": mean_of("visual_tokens", answers),
        "token_layers": mean_of("token_layers", answers),
        "accuracy": wilson(sum(mine), len(mine)),
        "families": {family: wilson(sum(oks), len(oks)) for family, oks in families.items() if oks},
        "agreement": None if agreed is None else wilson(agreed, len(mine)),
        "difference": None if against is None else paired(mine, right(against)),
    }


def mean_of(what: str, answers: list[Answer]) -> float:
    """A field of the answers, on average, to one decimal."""
    return round(statistics.fmean(getattr(answer, what) or 0 for answer in answers), 1)


def checkpoint() -> str:
    """SHA-256 of the bundled model's weights, first 12 digits."""
    return hashlib.sha256((tiny.CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]


def read(path: Path) -> list[Quality]:
    """The records that `run` has written."""
    return record.read(path, Quality)

"""`python -m bench quality`: accuracy of the bundled model with fewer visual tokens, method by method."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.intervals import Share, paired, percent, wilson
from bench.record import Provenance
from vtc import tiny
from vtc.config import DEFAULT_PRUNE_LAYER, VTCConfig
from vtc.hf.encode import run_tower
from vtc.hf.settings import Settings, open_block
from vtc.hf.views import plan_of
from vtc.methods import METHODS
from vtc.tiny.questions import Answers, answer, batches, greedy
from vtc.tiny.scenes import FAMILIES, Question, Scene, balanced_questions

KEEPS = (288, 192, 128, 64, 32, 16)
BASELINE = "vtc-cls"  # every other method is compared with it, on the same questions
IN_LANGUAGE_MODEL = {"prune_layer": DEFAULT_PRUNE_LAYER}  # the baseline also runs inside the language model
FIXED_BUDGET = ("prumerge",)  # ignores `keep`, and so runs once
SWEEP_KEEP = 64
Setting = tuple[str, dict[str, Any], Sequence[int]]  # a method, its options, and the numbers of tokens


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
    questions: int
    split: str
    accuracy: Share
    families: dict[str, Share]
    agreement: Share | None  # with the answers of all tokens
    difference: Share | None  # accuracy minus that of `BASELINE` with the same `keep`
    checkpoint: str  # SHA-256 of the bundled model's weights, first 12 digits

    @property
    def name(self) -> str:
        """The method with its options."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def swept(self) -> bool:
        """Whether it belongs to the sweep of the baseline's settings, and not to the comparison of methods."""
        return bool(self.options) and self.options != IN_LANGUAGE_MODEL


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
    questions = balanced_questions(split, count)
    prepared = batches(model, processor, questions)
    common = dict(questions=count, split=split, checkpoint=checkpoint())
    records: list[Quality] = []

    def keep_record(answers: Answers, full: Answers | None, against: Answers | None, **setting: Any) -> None:
        records.append(_record(questions, answers, full, against, **common, **setting))
        say(f"{records[-1].name} {records[-1].keep}: {percent(records[-1].accuracy)}")
        if out:  # one by one, so that an interrupted run keeps its records
            record.append(out, records[-1:])

    if out:
        out.unlink(missing_ok=True)
    full = answer(model, processor, prepared)
    keep_record(full, None, None, method="all tokens", options={}, keep=model.config.image_seq_length)
    baseline: dict[int, Answers] = {}
    for name, options, budgets in settings(keeps, methods, sweep, model.config.vision_config.num_hidden_layers):
        by_keep = answers_by_keep(model, processor, prepared, budgets, method=name, **options)
        for keep, answers in by_keep.items():
            keep_record(answers, full, baseline.get(keep), method=name, options=options, keep=keep)
        if name == BASELINE and not options:
            baseline |= by_keep
    return records


def settings(keeps: Sequence[int], methods: Sequence[str], sweep: bool, depth: int) -> list[Setting]:
    """Every setting after the one with all tokens, the baseline's first; `depth` is the number of vision layers."""
    budgets = {BASELINE: [*keeps, *((SWEEP_KEEP,) if sweep and SWEEP_KEEP not in keeps else ())]}
    budgets |= dict.fromkeys(FIXED_BUDGET, [SWEEP_KEEP] if SWEEP_KEEP in keeps else keeps[:1])
    names = [BASELINE, *(name for name in methods if name not in (BASELINE, "none"))]
    chosen: list[Setting] = [(name, {}, budgets.get(name, keeps)) for name in names]
    if BASELINE in methods:
        chosen.append((BASELINE, IN_LANGUAGE_MODEL, keeps))
    if sweep:
        layers: list[dict[str, Any]] = [{"ensemble_layers": n} for n in range(1, depth) if n != 3]
        ensembles: list[dict[str, Any]] = [{"ensemble": name} for name in ("mean", "max", "min")]
        chosen += [(BASELINE, options, [SWEEP_KEEP]) for options in layers + ensembles]
    return chosen


def answers_by_keep(
    model: Any, processor: Any, prepared: Sequence[Any], keeps: Sequence[int], **setting: Any
) -> dict[int, Answers]:
    """The answers at each of `keeps`; the vision tower runs once per batch."""
    parts: dict[int, list[Answers]] = {keep: [] for keep in keeps}
    for batch in prepared:
        vision = _tower_outputs(model, batch["pixel_values"], VTCConfig.of(keep=max(keeps), **setting))
        for keep in keeps:
            begun = time.perf_counter()
            with open_block(model.base_model, VTCConfig.of(keep=keep, **setting), vision) as run:
                texts = greedy(model, processor, batch, max_new_tokens=3)
            parts[keep].append(Answers(texts, run.tokens_after, time.perf_counter() - begun))
    joined = {}
    for keep, of in parts.items():
        texts = [text for part in of for text in part.texts]
        left = sum((part.tokens or 0.0) * len(part.texts) for part in of)
        joined[keep] = Answers(texts, left / max(1, len(texts)), sum(part.seconds for part in of))
    return joined


@torch.no_grad()
def _tower_outputs(model: Any, pixel_values: torch.Tensor, config: VTCConfig) -> Any:
    """The vision tower's outputs for the images [B, 3, height, width]; they do not depend on `config.keep`."""
    with open_block(model.base_model, config):
        settings = Settings.of(model)
        return run_tower(settings, pixel_values, plan_of(settings, views=pixel_values))


def _record(
    held_out: list[tuple[Scene, Question]],
    answers: Answers,
    full: Answers | None,
    against: Answers | None,
    *,
    keep: int,
    **rest: Any,
) -> Quality:
    def right(given: Answers) -> list[bool]:
        return [question.answer == text for (_, question), text in zip(held_out, given.texts, strict=True)]

    mine = right(answers)
    by_family = {f: [ok for ok, (_, q) in zip(mine, held_out, strict=True) if q.family == f] for f in FAMILIES}
    agreed = None if full is None else sum(a == b for a, b in zip(answers.texts, full.texts, strict=True))
    return Quality(
        keep=keep,
        tokens=round(answers.tokens or keep, 1),
        accuracy=wilson(sum(mine), len(mine)),
        families={family: wilson(sum(oks), len(oks)) for family, oks in by_family.items() if oks},
        agreement=None if agreed is None else wilson(agreed, len(held_out)),
        difference=None if against is None else paired(mine, right(against)),
        **rest | record.provenance(torch.device("cpu")),
    )


def checkpoint() -> str:
    """SHA-256 of the bundled model's weights, first 12 digits."""
    return hashlib.sha256((tiny.CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]


def read(path: Path) -> list[Quality]:
    """The records that `run` has written."""
    return record.read(path, Quality)

"""The figures of the bundled model's card: accuracies from the records of `bench quality`, its recipe."""

from __future__ import annotations

from typing import Any

from bench.checkout import ROOT
from bench.quality import Quality
from vtc.tiny.scenes import FAMILIES

RECORDS = ROOT / "bench/results/quality/quality.jsonl"
ROWS = (
    ("all tokens", 576),
    ("vtc-cls", 192),
    ("vtc-cls", 128),
    ("vtc-cls", 64),
    ("vtc-cls", 32),
    ("random", 64),
)


def accuracy(records: list[Quality]) -> str:
    """How the accuracy was measured, the table, and its precision."""
    count, split = records[0].questions, records[0].split
    return (
        f'{count} held-out questions (split "{split}", one a scene, families and answers balanced), fp32, greedy, in '
        f"percent:\n\n{accuracy_table(records)}\n\n"
        f'The 95 % confidence half-width is at most {98 / count**0.5:.1f} points for an "all" figure and '
        f"{98 * (len(FAMILIES) / count) ** 0.5:.1f} for a family's."
    )


def accuracy_table(records: list[Quality]) -> str:
    """Accuracy for each of `ROWS`, all questions and family by family, in percent.

    Raises
    ------
    ValueError
        If a record is missing.
    """
    columns = ("all", *FAMILIES)
    lines = [f"| visual tokens | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method, keep in ROWS:
        found = [r for r in records if (r.method, r.keep) == (method, keep) and not r.options]
        if not found:
            raise ValueError(f"no record of {method} with {keep} tokens; run python -m bench quality")
        name = f"all {keep} tokens" if method == "all tokens" else f"{method} {keep}"
        shares = (found[0].accuracy, *(found[0].families[family] for family in FAMILIES))
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.1f}' for share, *_ in shares)} |")
    return "\n".join(lines)


def recipe(training: dict[str, Any]) -> str:
    """The phases of `training.json` as a table."""
    lines = ["| stage | pixels | steps | batch | peak learning rate |", "|---" * 5 + "|"]
    return "\n".join([*lines, *map(_phase, training["recipe"])])


def _phase(phase: dict[str, Any]) -> str:
    smallest = 112 if phase["mixed"] in ("sizes", "zooms") else 70
    pixels = f"{phase['mixed']}, {smallest} to {phase['size']}" if phase["mixed"] else str(phase["size"])
    if phase["images"] > 1:
        pixels += f", up to {phase['images']} a prompt with up to {phase['objects']} objects"
    if phase["zoom"] > 1:
        pixels += f", zoomed by up to {phase['zoom']:g}"
    steps = f"{phase['steps']}, of a cycle of {phase['cycle']}" if phase["cycle"] else phase["steps"]
    return f"| {phase['stage']} | {pixels} | {steps} | {phase['batch']} | {phase['lr']} |"

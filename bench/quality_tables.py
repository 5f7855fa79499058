"""The records of `bench quality` as Markdown: every method at every number of tokens, families, verdicts."""

from __future__ import annotations

from bench import table
from bench.quality import BASELINE, SWEEP_KEEP, Quality
from vtc.eval.intervals import percent
from vtc.tiny.scenes import FAMILIES


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
    """The number of tokens that were kept, if it differs from `keep`, and the mean over the layers if that does."""
    parts = [] if abs(r.tokens - r.keep) < 0.5 else [f"{r.tokens:.0f} tokens"]
    parts += [] if abs(r.token_layers - r.tokens) < 0.5 else [f"{r.token_layers:.0f} a layer"]
    return f" ({', '.join(parts)})" if parts else ""


def _families(records: list[Quality]) -> str:
    columns = ["method", "all", *FAMILIES, "agreement with all tokens", f"minus {BASELINE}, paired"]
    shares = [(r.accuracy, *map(r.families.get, FAMILIES), r.agreement, r.difference) for r in records]
    rows = [
        [r.name + _tokens(r), *(percent(share) if share else "" for share in row)]
        for r, row in zip(records, shares, strict=True)
    ]
    return table.markdown(columns, rows)


def verdict(records: list[Quality]) -> str:
    """One sentence: which records differ from the baseline by more than chance."""
    groups: dict[str, list[str]] = {"worse": [], "better": [], "no clear difference": []}
    for r in records:
        if r.difference is None:
            continue
        _, low, high = r.difference
        groups["worse" if high < 0 else "better" if low > 0 else "no clear difference"].append(r.name)
    parts = [f"{group}: {', '.join(names)}" for group, names in groups.items() if names]
    against = f"Against {BASELINE} on the same questions (95 %, paired, each comparison on its own)"
    return f"{against}: {'; '.join(parts)}."

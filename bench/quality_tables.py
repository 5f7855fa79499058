"""The records of `bench quality` as Markdown: every method at every number of tokens, families, verdicts."""

from __future__ import annotations

from collections.abc import Callable

from bench import table
from bench.quality import BASELINE, INSIDE, SWEEP_KEEP, Quality
from vtc.eval.intervals import percent
from vtc.tiny.scenes import FAMILIES

BESIDE = (BASELINE, "coverage", "scope", "random")  # in the table of equal token·layers


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
    if budgets := equal_budgets(compared):
        parts += ["At equal token·layers, the mean of visual tokens over the language model's layers:"]
        inside = [r for r in compared if r.group == INSIDE]
        parts += [_equal(compared, budgets), verdict(inside, lambda r: f"{r.name} at {r.token_layers:.0f}")]
    close = [full, *(r for r in compared if r.keep == SWEEP_KEEP and _is_of_its_budget(r))]
    if len(close) > 1:
        parts += [f"At {SWEEP_KEEP} tokens:", _families(close), verdict(close)]
    if swept := [r for r in rest if r.swept]:
        ours = [r for r in compared if r.name == BASELINE and r.keep == SWEEP_KEEP]
        parts += [f"Settings of {BASELINE}, at {SWEEP_KEEP} tokens:", _families(ours + swept), verdict(swept)]
    return "\n\n".join(parts)


def _is_of_its_budget(r: Quality) -> bool:
    """Whether it has at most `keep` tokens in every layer, or on average over the layers."""
    return r.group != INSIDE or r.token_layers == r.keep


def equal_budgets(records: list[Quality]) -> list[float]:
    """The token·layers that records inside the language model and others have in common, the largest first."""
    inside, before = ({r.token_layers for r in records if (r.group == INSIDE) == own} for own in (True, False))
    return sorted(inside & before, reverse=True)


def _equal(records: list[Quality], budgets: list[float]) -> str:
    """Accuracy inside the language model beside that of a few methods before it."""
    shown = [r for r in records if r.group == INSIDE or (r.method in BESIDE and not r.options)]
    cells = {(r.name, r.token_layers): f"{percent(r.accuracy)}{_nominal(r)}" for r in shown}
    names = [name for name in dict.fromkeys(r.name for r in shown) if any((name, b) in cells for b in budgets)]
    rows = [[name, *(cells.get((name, budget), "") for budget in budgets)] for name in names]
    return table.markdown(["method", *(f"{budget:.0f} token·layers" for budget in budgets)], rows)


def _nominal(r: Quality) -> str:
    """What a setting inside the language model keeps."""
    return f" (keep={r.keep})" if "prune_layer" in r.options else ""


def _tokens(r: Quality) -> str:
    """The number of tokens that were kept, if it differs from `keep`, and the mean over the layers if that does."""
    parts = [] if abs(r.tokens - r.keep) < 0.5 else [f"{r.tokens:.0f} tokens"]
    parts += [] if abs(r.token_layers - r.tokens) < 0.5 else [f"{r.token_layers:.0f} a layer"]
    return f" ({', '.join(parts)})" if parts else ""


def _families(records: list[Quality]) -> str:
    columns = ["method", "all", "all but counting", *FAMILIES, "agreement with all tokens", f"minus {BASELINE}, paired"]
    shares = [(r.accuracy, *map(r.families.get, FAMILIES), r.agreement, r.difference) for r in records]
    rows = [
        [
            r.name + _tokens(r),
            percent(row[0]),
            _but_counting(r),
            *(percent(share) if share else "" for share in row[1:]),
        ]
        for r, row in zip(records, shares, strict=True)
    ]
    return table.markdown(columns, rows)


def _but_counting(r: Quality) -> str:
    """The mean over the other families, which have as many questions each."""
    rest = [share[0] for family, share in r.families.items() if family != "counting"]
    return f"{100 * sum(rest) / len(rest):.1f}" if rest else ""


def verdict(records: list[Quality], name: Callable[[Quality], str] = lambda r: r.name) -> str:
    """One sentence: which records differ from the baseline by more than chance."""
    groups: dict[str, list[str]] = {"worse": [], "better": [], "no clear difference": []}
    for r in records:
        if r.difference is None:
            continue
        _, low, high = r.difference
        groups["worse" if high < 0 else "better" if low > 0 else "no clear difference"].append(name(r))
    parts = [f"{group}: {', '.join(names)}" for group, names in groups.items() if names]
    against = f"Against {BASELINE} on the same questions (95 %, paired, each comparison on its own)"
    return f"{against}: {'; '.join(parts)}."

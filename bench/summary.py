"""What `bench gpu` says last: one page that is read in a minute. What is right, wrong, fast, slow, and not reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import ncu, record, table
from bench.jobs import Outcome
from bench.record import Record
from bench.workloads.base import NEED_GPU

MOST_LINES = 30  # of one section


@dataclasses.dataclass
class Ran:
    """What became of one part."""

    idle: str = "idle"  # whether the GPU was, before it began
    outcome: Outcome | None = None  # of parts that are made of jobs
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # jobs or tests, and the reason
    trouble: str | None = None
    note: str | None = None  # what is no trouble
    seconds: float = 0.0
    allowed: float = 0.0

    @property
    def left(self) -> list[str]:
        return self.outcome.left if self.outcome else []

    @property
    def clean(self) -> bool:
        return not (self.failed or self.trouble or self.left)


@dataclasses.dataclass
class Tests:
    collected: int = 0
    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # test to reason


def tests(path: Path) -> Tests:
    """What `bench.pytest_log` has written. A test that failed, and whose worker then ended, is there twice."""
    found = Tests()
    outcomes: dict[str, str] = {}
    for one in record.lines(path):
        found.collected = max(found.collected, one.get("collected", 0))
        if "test" in one and outcomes.get(one["test"]) != "failed":
            outcomes[one["test"]] = one["outcome"]
            if one["outcome"] == "failed":
                found.failed[one["test"]] = _because(one.get("reason", ""))
    found.passed = sum(outcome == "passed" for outcome in outcomes.values())
    found.skipped = sum(outcome == "skipped" for outcome in outcomes.values())
    return found


def _because(reason: str) -> str:
    """The line of a test's report that says most: the error's."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:] or [""])[0][:200]


def line(part: str, ran: Ran) -> str:
    """One line on a part, when it is over."""
    told = f"{part}: {ran.seconds:.0f} of {ran.allowed:.0f} s"
    if ran.outcome:
        told += f", {ran.outcome.done} of {len(ran.outcome.names)} done"
    told += f", {len(ran.failed)} failed" if ran.failed else ""
    told += f", {len(ran.left)} not reached" if ran.left else ""
    told += "".join(f", {text}" for text in (ran.trouble, ran.note) if text)
    return told + ("" if ran.idle in ("idle", "rehearsed") else f"; before it the GPU was {ran.idle}")


def page(out: Path, ran: dict[str, Ran], chosen: Sequence[str]) -> str:
    """The page, from the files of a folder and from what became of each part."""
    probed = {one["probe"]: one["value"] for one in record.lines(out / "probe.jsonl") if "probe" in one}
    single = record.read(out / "micro.jsonl")
    whole = record.read(out / "e2e.jsonl")
    seen = tests(out / "tests.jsonl")
    fast, slow = [], []
    for text, ratio in [*_models(whole), *_operations(single), *_blocks(single)]:
        (fast if ratio >= 1 else slow).append(text)
    sections = {
        "RIGHT": _right(out, ran, seen),
        "WRONG": _wrong(ran),
        "FAST (device time unless it says host; above 1 VTC is faster)": fast,
        "SLOW": slow,
        "COUNTERS": _counters(out, ran),
        "NO DEVICE TIME": _grouped({_named(r): r.no_device_ms for r in (*whole, *single) if r.no_device_ms}),
        "NOT REACHED": _not_reached(ran, chosen, seen),
        "PARTS": [line(part, one) for part, one in ran.items()],
    }
    lines = _machine(probed)
    for title, told in sections.items():
        if told:
            lines += ["", title, *(f"  {text}" for text in told[:MOST_LINES])]
            lines += [f"  … and {len(told) - MOST_LINES} more" for _ in told[MOST_LINES : MOST_LINES + 1]]
    return "\n".join(lines)


def _machine(probed: dict[str, Any]) -> list[str]:
    gpu, versions = probed.get("gpu", {}), probed.get("versions", {})
    if gpu and "capability" not in gpu:
        gpu = {"no GPU, a rehearsal:": "its times mean nothing", **gpu}
    lines = [", ".join(f"{name} {value}" for name, value in gpu.items()) or "no probe"]
    lines += [", ".join(f"{name} {value}" for name, value in versions.items())] if versions else []
    rest = {name: value for name, value in probed.items() if name not in ("gpu", "versions")}
    return lines + [
        f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}" for name, value in rest.items()
    ]


def _right(out: Path, ran: dict[str, Ran], seen: Tests) -> list[str]:
    told = []
    if (gate := ran.get("gate")) and gate.outcome:
        told.append(f"gate: {gate.outcome.done} of {len(gate.outcome.names)} checks against float64 passed")
        shares = [
            (error / allowed, f"{what} of {one['op']} {one['model']} {one['dtype']}")
            for one in record.lines(out / "gate.jsonl")
            for what, (error, allowed) in one.get("errors", {}).items()
            if allowed
        ]
        told += [
            f"  the largest error is {share:.2f} of what is allowed: {what}" for share, what in sorted(shares)[-1:]
        ]
    if seen.collected:
        told.append(f"tests: {seen.passed} of {seen.collected} passed, {seen.skipped} skipped")
    return told


def _wrong(ran: dict[str, Ran]) -> list[str]:
    told = []
    for part, one in ran.items():
        if part == "tests":
            functions: dict[str, list[str]] = {}
            for test, why in one.failed.items():
                functions.setdefault(test.partition("[")[0], []).append(why)
            told += [f"tests: {name}: {len(whys)} failed: {whys[0]}" for name, whys in functions.items()]
        else:
            told += [f"{part}: {text}" for text in _grouped(one.failed)]
        told += [f"{part}: {one.trouble}"] if one.trouble else []
    return told


def _grouped(reasons: dict[str, str]) -> list[str]:
    """A line for each reason, with how many have it."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [f"{of[0]}{f' and {len(of) - 1} more' if of[1:] else ''}: {why}" for why, of in names.items()]


def _not_reached(ran: dict[str, Ran], chosen: Sequence[str], seen: Tests) -> list[str]:
    told = [f"{part}: all of it" for part in chosen if part not in ran]
    for part, one in ran.items():
        if one.left:
            told.append(f"{part}: {len(one.left)} numbers, from {one.left[0]} to {one.left[-1]}")
    missing = seen.collected - seen.passed - seen.skipped - len(seen.failed)
    return told + ([f"tests: {missing} of {seen.collected}"] if missing > 0 else [])


def _named(r: Record) -> str:
    return f"{r.suite} {r.op} {table.shape_text(r.shape)} {r.backend}"


def _best(records: Iterable[Record]) -> Record | None:
    return min(records, key=lambda r: r.ms, default=None)


def _operations(records: list[Record]) -> list[tuple[str, float]]:
    """One line for each operation, model and dtype: VTC's best against the best of the others, at each batch size."""
    told = []
    for (op, model, dtype), group in table.grouped([r for r in records if r.suite == "micro"]):
        cases, ratios = [], []
        for case in dict.fromkeys(table.case(r) for r in group):
            same = [r for r in group if table.case(r) == case]
            ours = _best(r for r in same if r.backend in NEED_GPU)
            other = _best(r for r in same if r.backend not in NEED_GPU)
            if ours and other and (ours.shape.get("K", 64) == 64 or ours.device != "cuda"):
                ratios.append(other.ms / ours.ms)
                cases.append(
                    f"B={ours.shape['B']} {ratios[-1]:.2f}x ({ours.backend} {1e3 * ours.ms:.1f} us, {other.backend} "
                    f"{1e3 * other.ms:.1f}; host {other.ms_50 / ours.ms_50:.2f}x)"
                )
        if cases:
            told.append((f"{op} {model} {dtype}: {', '.join(cases)}", min(ratios)))
    return told


def _blocks(records: list[Record]) -> list[tuple[str, float]]:
    """At each batch size the best blocks of `cls_attention`, the shipped ones, and SDPA with and without scores."""
    told = []
    for case in dict.fromkeys(table.case(r) for r in records if r.suite == "attention"):
        same = {r.backend: r for r in records if r.suite == "attention" and table.case(r) == case}
        best = _best(r for name, r in same.items() if name.startswith("triton "))
        if best:
            times = [
                f"{name} {1e3 * same[name].ms:.1f}" for name in ("triton", "sdpa", "sdpa+row_scores") if name in same
            ]
            base = same.get("sdpa+row_scores", best)
            text = f"cls_attention blocks B={best.shape['B']}: best {best.backend} {1e3 * best.ms:.1f} us"
            told.append((f"{text} ({', '.join(times)})", base.ms / best.ms))
    return told


def _models(records: list[Record]) -> list[tuple[str, float]]:
    """The whole model: VTC against stock, one line for each stage and variant; and what its graphs would take."""
    told = []
    found = {(r.op, r.backend, r.shape["B"]): r for r in records}
    variants = dict.fromkeys(r.backend for r in records if r.backend.startswith("vtc"))
    for variant in variants:
        stock = variant.replace(variant.partition(",")[0], "sdpa")
        for op in dict.fromkeys(r.op for r in records):
            pairs = [
                (batch, found[op, stock, batch], ours)
                for (stage, name, batch), ours in found.items()
                if (stage, name) == (op, variant) and (op, stock, batch) in found
            ]
            cases, ratios = [], []
            for batch, other, ours in pairs:
                host = ours.speedup_50 or other.ms_50 / ours.ms_50  # taken in turn, if it was
                stock_ms = host * ours.ms if ours.device_ms_50 is None else other.ms
                ratios.append(stock_ms / ours.ms)
                cases.append(
                    f"B={batch} {stock_ms:.2f} -> {ours.ms:.2f} ms = {ratios[-1]:.2f}x"
                    + ("" if ours.device_ms_50 is None else f" (host {host:.2f}x)")
                )
            if cases:
                kind = "host: " if pairs[0][2].device_ms_50 is None else ""
                told.append((f"{variant}, {op}: {kind}{', '.join(cases)}", min(ratios)))
        cases, ratios = [], []
        for batch in dict.fromkeys(batch for _, _, batch in found):
            both = [_as_graphs(found, name, batch) for name in (stock, variant)]
            if all(both):
                ratios.append(both[0] / both[1])
                cases.append(f"B={batch} {both[0]:.2f} -> {both[1]:.2f} ms = {ratios[-1]:.2f}x")
        if cases:
            told.append((f"{variant}, vision + projector + prefill as graphs: {', '.join(cases)}", min(ratios)))
    return told


def first_tokens(records: list[Record]) -> str:
    """A table of the time to the first token: how many times as long the stock model takes, by batch size."""
    found = {(r.op, r.backend, r.shape["B"]): r for r in records}
    batches = dict.fromkeys(r.shape["B"] for r in records)
    rows = []
    for name in dict.fromkeys(r.backend for r in records if r.op == "first token" and r.speedup_50):
        tokens = name.removeprefix("vtc ")
        called = [found["first token", name, batch].speedup_50 for batch in batches]
        alone = [_as_graphs(found, "sdpa", batch) / _as_graphs(found, name, batch) for batch in batches]
        for kind, ratios in (("model(...)", called), ("the GPU's work alone", alone)):
            rows.append([tokens, kind, *(f"{ratio:.2f}x" for ratio in ratios)])
    return table.markdown(["tokens", "what is timed", *(f"B = {batch}" for batch in batches)], rows)


def _as_graphs(found: dict[tuple[str, str, int], Record], variant: str, batch: int) -> float:
    """The device's milliseconds of the stages up to the first token; 0 if one of them has none."""
    stages = [found.get((stage, variant, batch)) for stage in ("vision", "projector", "prefill")]
    times = [r.device_ms_50 if r else None for r in stages]
    return 0.0 if None in times else sum(times)


def _counters(out: Path, ran: dict[str, Ran]) -> list[str]:
    """What was profiled, also by an ncu that was ended; why nothing was is among what is wrong."""
    if "ncu" not in ran or ran["ncu"].note:
        return []
    try:
        return ncu.profiles(out / "ncu.csv")
    except ValueError as error:
        return [] if ran["ncu"].trouble else [str(error)]

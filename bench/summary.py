"""The summary page of `bench gpu`: what is right, wrong, fast, slow, and not reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import attention, ncu, record, speedups, table
from bench.record import Record
from bench.watch import Outcome

MOST_LINES = 30  # of one section


@dataclasses.dataclass
class Ran:
    """The result of one part."""

    idle: str = "idle"  # whether the GPU was, before it began
    outcome: Outcome | None = None  # of parts that are made of jobs
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # jobs or tests, and the reason
    trouble: str | None = None
    note: str | None = None  # a remark that is not trouble
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
    """The results that `bench.pytest_log` has written. A test that failed and then ended its worker is there twice."""
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
    """The most telling line of a test's report: the error's."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:] or [""])[0][:200]


def line(part: str, ran: Ran) -> str:
    """One line about a part that has ended."""
    text = f"{part}: {ran.seconds:.0f} of {ran.allowed:.0f} s"
    if ran.outcome:
        text += f", {ran.outcome.done} of {len(ran.outcome.names)} done"
    text += f", {len(ran.failed)} failed" if ran.failed else ""
    text += f", {len(ran.left)} not reached" if ran.left else ""
    text += "".join(f", {more}" for more in (ran.trouble, ran.note) if more)
    return text + ("" if ran.idle in ("idle", "rehearsed") else f"; before it the GPU was {ran.idle}")


def page(out: Path, ran: dict[str, Ran], chosen: Sequence[str]) -> str:
    """The page, from the files of a folder and from the result of each part."""
    probed = {one["probe"]: one["value"] for one in record.lines(out / "probe.jsonl") if "probe" in one}
    single = record.read(out / "micro.jsonl")
    whole = record.read(out / "e2e.jsonl")
    seen = tests(out / "tests.jsonl")
    fast, slow = [], []
    for text, ratio in [*speedups.models(whole), *speedups.operations(single), *speedups.blocks(single)]:
        (fast if ratio >= 1 else slow).append(text)
    sections = {
        "RIGHT": _right(out, ran, seen),
        "WRONG": _wrong(ran),
        "FAST (device time unless it says host; above 1 VTC is faster)": fast,
        "SLOW": slow,
        "GRAPHS": speedups.with_graphs(whole).splitlines(),
        "BOUNDS": speedups.bounds(whole),
        "COUNTERS": _counters(out, ran),
        "TO PASTE (MEASURED in kernels/tuning.py, FUSED in vtc/ops/cls_attention.py)": attention.to_paste(
            single, probed.get("gpu", {}).get("capability")
        ),
        "NO DEVICE TIME": _grouped({_named(r): r.no_device_ms for r in (*whole, *single) if r.no_device_ms}),
        "NOT REACHED": _not_reached(ran, chosen, seen),
        "PARTS": [line(part, one) for part, one in ran.items()],
    }
    lines = _machine(probed)
    for title, section in sections.items():
        if section:
            lines += ["", title, *(f"  {text}" for text in section[:MOST_LINES])]
            lines += [f"  … and {len(section) - MOST_LINES} more" for _ in section[MOST_LINES : MOST_LINES + 1]]
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
    found = []
    if (gate := ran.get("gate")) and gate.outcome:
        found.append(f"gate: {gate.outcome.done} of {len(gate.outcome.names)} checks against float64 passed")
        shares = [
            (error / allowed, f"{what} of {one['op']} {one['model']} {one['dtype']}")
            for one in record.lines(out / "gate.jsonl")
            for what, (error, allowed) in one.get("errors", {}).items()
            if allowed
        ]
        found += [
            f"  the largest error is {share:.2f} of what is allowed: {what}" for share, what in sorted(shares)[-1:]
        ]
    if seen.collected:
        found.append(f"tests: {seen.passed} of {seen.collected} passed, {seen.skipped} skipped")
    return found


def _wrong(ran: dict[str, Ran]) -> list[str]:
    found = []
    for part, one in ran.items():
        if part == "tests":
            functions: dict[str, list[str]] = {}
            for test, why in one.failed.items():
                functions.setdefault(test.partition("[")[0], []).append(why)
            found += [f"tests: {name}: {len(whys)} failed: {whys[0]}" for name, whys in functions.items()]
        else:
            found += [f"{part}: {text}" for text in _grouped(one.failed)]
        found += [f"{part}: {one.trouble}"] if one.trouble else []
    return found


def _grouped(reasons: dict[str, str]) -> list[str]:
    """A line for each reason, with how many have it."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [f"{of[0]}{f' and {len(of) - 1} more' if of[1:] else ''}: {why}" for why, of in names.items()]


def _not_reached(ran: dict[str, Ran], chosen: Sequence[str], seen: Tests) -> list[str]:
    found = [f"{part}: all of it" for part in chosen if part not in ran]
    for part, one in ran.items():
        if one.left:
            found.append(f"{part}: {len(one.left)} numbers, from {one.left[0]} to {one.left[-1]}")
    missing = seen.collected - seen.passed - seen.skipped - len(seen.failed)
    return found + ([f"tests: {missing} of {seen.collected}"] if missing > 0 else [])


def _named(r: Record) -> str:
    return f"{r.suite} {r.op} {table.shape_text(r.shape)} {r.backend}"


def _counters(out: Path, ran: dict[str, Ran]) -> list[str]:
    """The profiles, also of an ncu that was ended early. `_wrong` has the reason if there are none."""
    if "ncu" not in ran or ran["ncu"].note:
        return []
    try:
        return ncu.profiles(out / "ncu.csv")
    except ValueError as error:
        return [] if ran["ncu"].trouble else [str(error)]

"""`python -m bench gpu --out DIR`: everything that is measured on a GPU, in minutes, with nothing lost.

The parts run one after the other, each in a process group of its own, each for its share of the time. Every number is
on disk before the next one is begun. An exception, a hang, a crash or too little memory costs one number. At the end of
a part, its remaining processes are ended, and the next part waits until the GPU is idle.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import faults, micro, processes, summary, timing
from bench.parts import PARTS, Mode, run_part
from bench.summary import Ran
from vtc.files import replacing

NORMAL = Mode()
IDLE_WAIT = 8.0  # seconds for the GPU to become idle


def run(
    out: Path,
    minutes: float,
    parts: Sequence[str] = (),
    mode: Mode = NORMAL,
    say: Callable[[str], None] = print,
    started: float | None = None,
) -> int:
    """Run `parts`, by default all, within `minutes`; at most 8 files in `out`, among them log.txt and summary.txt.

    The minutes count from `started` on the clock `time.monotonic`, by default from now.

    Returns the exit status: 1 if anything failed or was not reached. With planted faults: 1 if anything else was lost.

    Raises
    ------
    ValueError
        For a part that does not exist, for a folder that already has results of these parts, and without a GPU.
    """
    chosen = micro.chosen("part", tuple(parts), tuple(PARTS))
    if not mode.rehearse and not torch.cuda.is_available():
        raise ValueError(
            "bench gpu needs a GPU; without one: --rehearse plays it on a CPU, pytest runs the tests, and python -m "
            "bench micro times what a CPU can"
        )
    if old := sorted({PARTS[part].file for part in chosen if (out / PARTS[part].file).exists()}):
        raise ValueError(f"{out} has results already ({', '.join(old)}); give --out another folder")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    end = (started or time.monotonic()) + 60 * minutes - processes.GRACE  # to end the last part
    wait = IDLE_WAIT
    ran: dict[str, Ran] = {}
    with (out / "log.txt").open("a", encoding="utf-8") as log, _interruptible():
        try:
            for number, part in enumerate(chosen):
                share = PARTS[part].seconds / sum(PARTS[other].seconds for other in chosen[number:])
                try:
                    ran[part] = run_part(part, out, share * (end - time.monotonic()), mode, log, wait)
                except Exception as error:  # a fault of this file costs one part
                    ran[part] = Ran(trouble=timing.reason(error))
                wait = 0.0 if "BUSY" in ran[part].idle else wait  # a process that has stayed this long will stay
                say(summary.line(part, ran[part]))
                _summarise(out, ran, chosen)
        except KeyboardInterrupt:
            say("interrupted: the files so far are kept")
    say(f"\n{_summarise(out, ran, chosen)}")
    if set(ran) != set(chosen):
        return 1
    if mode.plant:
        found = [f"{part}: {text}" for part, one in ran.items() for text in _beyond_the_faults(part, one, out)]
        say("\n".join(found) or "each fault cost its own number, and nothing else")
        return 1 if found else 0
    return 0 if all(one.clean for one in ran.values()) else 1


def _summarise(out: Path, ran: dict[str, Ran], chosen: Sequence[str]) -> str:
    """Write the page. A fault in it costs the page but no later part; it becomes one of `ran`."""
    try:
        page = summary.page(out, ran, chosen)
    except Exception as error:
        ran["summary"] = Ran(trouble=timing.reason(error))
        page = "\n".join(summary.line(part, one) for part, one in ran.items())
    with replacing(out / "summary.txt") as made:
        made.write_text(page + "\n", encoding="utf-8")
    return page


def _beyond_the_faults(part: str, ran: Ran, out: Path) -> list[str]:
    """Numbers lost without a planted fault, and planted faults that cost nothing."""
    if part == "tests":
        seen = summary.tests(out / PARTS[part].file)
        planted = {test for test in seen.failed if "::test_planted_gpu_" in test}
        expected, left = len(faults.FAULTS), seen.collected - seen.passed - seen.skipped - len(seen.failed)
        other = [f"lost {test}" for test in seen.failed if test not in planted]
    else:
        names = ran.outcome.names[1 : 1 + len(faults.FAULTS)] if ran.outcome else []
        planted, expected, left = set(ran.failed) & set(names), len(names), len(ran.left)
        other = [f"lost {name}" for name in ran.failed if name not in planted]
    other += [f"{len(planted)} of {expected} faults failed"] if len(planted) != expected else []
    other += [f"{left} not reached"] if left else []
    return other + ([ran.trouble] if ran.trouble else [])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C: the parts are ended and the summary is written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

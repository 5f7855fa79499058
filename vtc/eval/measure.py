"""Times with their spread; time to first token and KV cache of one prompt at several settings.

The settings take turns, run by run, so that whatever else the machine does disturbs all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.eval.answerer import Answerer
from vtc.eval.setting import Setting
from vtc.hf import names

RUNS = 5
NOISY = 1.5  # the slowest run over the fastest


@dataclass(frozen=True)
class Times:
    """Times of the same work, one of each run.

    Attributes
    ----------
    seconds : tuple of float
        Not empty.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The slowest run over the fastest."""
        return max(self.seconds) / max(min(self.seconds), 1e-9)

    def record(self) -> dict[str, float]:
        """Median, fastest and slowest run in milliseconds, for a JSON document."""
        figures = {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        return {name: round(1000 * each, 2) for name, each in figures.items()}


@dataclass(frozen=True)
class FirstToken(Times):
    """What one setting takes from pixels on the device to the first new token on the host.

    Attributes
    ----------
    seconds : tuple of float
        Of each warm run.
    kv_bytes : int
        Bytes of the keys and values that the prompt leaves in the cache, all layers.
    """

    kv_bytes: int


def noise(times: Mapping[str, Times]) -> str | None:
    """A warning if runs of the same work differ much; `times` by the name of what was timed. None if they do not."""
    if (worst := max(times, key=lambda name: times[name].spread, default=None)) is None:
        return None
    if times[worst].spread < NOISY:
        return None
    return (
        f"The timings are noisy: the slowest run of {worst} took {times[worst].spread:.1f} times as long as the "
        "fastest. Other programs may be using this machine."
    )


def cell(record: Mapping[str, float]) -> str:
    """What `Times.record` returned as text: "153 (150-200) ms"."""
    median, low, high = (_three_digits(record[name]) for name in ("median", "min", "max"))
    return f"{median} ({low}-{high}) ms"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def first_tokens(
    answerer: Answerer,
    inputs: Any,
    settings: Sequence[Setting],
    runs: int = RUNS,
    advance: Callable[[int], None] = lambda count: None,
) -> list[FirstToken]:
    """Measure a prompt at each of the settings, after one warm-up of each.

    Parameters
    ----------
    inputs : mapping of Tensor
        For the model, on its device and in its dtype.
    runs : int
        Warm runs of each setting. Each round begins with another setting.
    advance : callable
        Gets 1 after each run, of which there are `(runs + 1) * len(settings)`.
    """
    seconds: list[list[float]] = [[] for _ in settings]
    kv_bytes = [0] * len(settings)
    for number in range(runs + 1):
        for place in range(len(settings)):
            each = (number + place) % len(settings)
            with answerer.block(settings[each], inputs):
                start = time.perf_counter()
                out = answerer.model.generate(
                    **inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True
                )
                out.sequences.cpu()  # waits for the device
                taken = time.perf_counter() - start
            if number:
                seconds[each].append(taken)
            advance(1)
            kv_bytes[each] = sum(layer.keys.nbytes + layer.values.nbytes for layer in names.cache_of(out).layers)
    return [FirstToken(tuple(taken), size) for taken, size in zip(seconds, kv_bytes, strict=True)]

"""Time to first token and KV cache of one prompt at several settings.

The settings take turns, run by run, so that whatever else the machine does disturbs all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtc.eval.answerer import Answerer
from vtc.eval.setting import Setting
from vtc.hf import names

RUNS = 5


@dataclass(frozen=True)
class FirstToken:
    """What one setting takes.

    Attributes
    ----------
    seconds : tuple of float
        Of each warm run: from pixels on the device to the first new token on the host.
    kv_bytes : int
        Bytes of the keys and values that the prompt leaves in the cache, all layers.
    """

    seconds: tuple[float, ...]
    kv_bytes: int

    @property
    def median(self) -> float:
        """The median of the warm runs, in seconds."""
        return statistics.median(self.seconds)


def first_tokens(answerer: Answerer, inputs: Any, settings: Sequence[Setting], runs: int = RUNS) -> list[FirstToken]:
    """Measure a prompt at each of the settings, after one warm-up of each.

    Parameters
    ----------
    inputs : mapping of Tensor
        For the model, on its device and in its dtype.
    runs : int
        Warm runs of each setting. Each round begins with another setting.
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
            kv_bytes[each] = sum(layer.keys.nbytes + layer.values.nbytes for layer in names.cache_of(out).layers)
    return [FirstToken(tuple(taken), size) for taken, size in zip(seconds, kv_bytes, strict=True)]

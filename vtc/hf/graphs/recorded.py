"""The recorded functions of one model: made when first needed, kept while the model stays as it is, counted."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch

from vtc.hf.graphs.capture import Recorder
from vtc.hf.graphs.memory import Memory
from vtc.hf.graphs.state import State, flags
from vtc.hf.settings import Run, block_of

_log = logging.getLogger("vtc")


class Refused(Exception):
    """Why a call is not replayed, as a clause."""


class Unrecordable(Refused):
    """That a function does what cannot be recorded."""


class Place(NamedTuple):
    """What all recorded functions of a model share: they run one after the other."""

    recorder: Recorder
    memory: Memory


class Recorded:
    """Recorded functions by key.

    Parameters
    ----------
    base : LlavaModel
        Whose functions they are.
    recorder_of : callable
        The recorder for a device; raises Refused if there is none.
    limit : int
        How many functions are kept. The one that was not used for the longest time leaves.

    Attributes
    ----------
    lock : threading.RLock
        To be held while a function is recorded, or replayed and its results are read.
    replays : Counter
        Of each kind of function.
    refusals : Counter
        Calls that were not replayed, by reason.
    """

    def __init__(self, base: Any, recorder_of: Callable[[torch.device], Recorder], limit: int) -> None:
        self._base, self._recorder_of, self.limit = weakref.ref(base), recorder_of, limit
        self.lock = threading.RLock()
        self.replays: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self._recording: int | None = None  # the thread that records
        self._said: set[str] = set()
        self.drop()

    def drop(self) -> None:
        """Forget all that was recorded. What is recorded later gets memory of its own."""
        with self.lock:
            self._functions: OrderedDict[Hashable, Any] = OrderedDict()
            self._failed: dict[Hashable, str] = {}
            self._states: dict[str, State] = {}
            self._place: Place | None = None

    def __len__(self) -> int:
        return len(self._functions)

    @property
    def is_recording(self) -> bool:
        """Whether this thread records a function, so that its calls are parts of it. Those of other threads wait."""
        return self._recording == threading.get_ident()

    def require(self, name: str, modules: list[Any], device: torch.device) -> Place:
        """Where calls of `modules` on `device` are recorded; raises Refused if none can be replayed now and here.

        Drops everything if the modules have changed. `name` tells them from other parts of the model.
        """
        self.place(device)  # refuses sooner than a look at all modules
        self._require_state(name, modules)
        return self.place(device)

    def _require_state(self, name: str, modules: list[Any]) -> None:
        state = self._states.get(name)
        if state is not None and (not state.is_of(modules) or state.has_changed()):
            _log.info("the %s model has changed, so its graphs are recorded again", name)
            self.drop()
            state = None
        if state is None:
            state = self._states[name] = State(modules, replaced=name == "language")
        if (why := state.reason()) is not None:
            raise Refused(why)

    def place(self, device: torch.device) -> Place:
        """As `require`, of modules that have not changed."""
        if self._place is None:
            self._place = Place(self._recorder_of(device), Memory(device))
        if self._place.memory.device != device:
            raise Refused(f"its graphs are on {self._place.memory.device}, and a part of the model is on {device}")
        if torch.is_grad_enabled():
            raise Refused("gradients are computed; use torch.no_grad()")
        if torch.is_autocast_enabled(device.type):
            raise Refused("autocast is on")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise Refused("another capture is running")
        self._place.recorder.begin()
        return self._place

    def get(self, key: Hashable, record: Callable[[], Any]) -> Any:
        """The function `key`, recorded if it is not yet there; raises Refused if it cannot be."""
        key = (key, flags())
        if why := self._failed.get(key):
            raise Unrecordable(why)
        if key not in self._functions:
            try:
                with self._quiet():
                    self._functions[key] = record()
            except torch.OutOfMemoryError as error:  # another time there may be more
                raise Unrecordable("there is too little memory to record it") from error
            except RuntimeError as error:
                self._failed[key] = f"it cannot be recorded: {str(error).splitlines()[0]}"
                raise Unrecordable(self._failed[key]) from error
            while len(self._functions) > self.limit:
                self._functions.popitem(last=False)
        self._functions.move_to_end(key)
        return self._functions[key]

    def forget(self, belongs: Callable[[Any], bool]) -> None:
        """Forget the functions whose keys `belongs` is true for."""
        for key in [key for key in self._functions if belongs(key[0])]:  # type: ignore[index]
            del self._functions[key]

    def count(self, kind: str) -> None:
        """Count a replay, also in the open block of the model."""
        self.replays[kind] += 1
        if (run := self._run) is not None:
            run.replays[kind] = run.replays.get(kind, 0) + 1

    def refuse(self, what: str, why: str) -> None:
        """Count a call of `what` that is not replayed. The log names each reason once."""
        self.say(f"a call of the {what} was not replayed from a graph: {why}", why)
        reason = f"{what}: {why}"
        self.refusals[reason] += 1
        if (run := self._run) is not None:
            run.refusals[reason] = run.refusals.get(reason, 0) + 1

    def say(self, text: str, why: str) -> None:
        """Log `text`, unless the reason `why` was logged."""
        if why not in self._said:
            self._said.add(why)
            _log.warning("%s", text)

    @property
    def _run(self) -> Run | None:
        """Of the open block."""
        block = block_of(self._base())
        return None if block is None else block.run

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """While a function is recorded, calls inside are parts of it. Its tensors outlive an inference_mode block."""
        self._recording = threading.get_ident()
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            self._recording = None

"""The processes that answer side by side: one, or those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch

TIMEOUT = datetime.timedelta(hours=24)  # a process with shorter answers waits for the others


class Processes:
    """This process alone.

    Attributes
    ----------
    rank, world : int
        The number of this process, and how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process scores and writes."""
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """The device of this process, where the user asked for `name`."""
        return name

    def wait(self) -> None:
        """Wait until all processes are here."""

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, by rank, in each of them."""
        return items


class LaunchedProcesses(Processes):
    """One of the processes of `accelerate launch` or `torchrun`.

    They exchange nothing but answers, so gloo connects them, on GPUs, too. If one of them fails, the launcher ends the
    others on its machine; those on other machines raise a ConnectionError as soon as they wait for it.

    Raises
    ------
    ValueError
        If accelerate is not installed.
    """

    def __init__(self) -> None:
        try:
            from accelerate import PartialState
            from accelerate.utils import gather_object
        except ImportError as error:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and several processes need accelerate, which cannot be "
                f"imported ({error}); install it: pip install 'vtc-cls[eval]'"
            ) from error
        self._state = PartialState(cpu=True, backend="gloo", timeout=TIMEOUT)  # without cpu=True: no group on a CPU
        self._gather = gather_object
        self.rank, self.world = self._state.process_index, self._state.num_processes

    def device(self, name: str | None) -> str | None:
        """The GPU of its place on the machine, unless the name has a number or is another device.

        A process that sees one GPU alone, as SLURM can arrange it, takes that one.
        """
        if name not in (None, "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{self._state.local_process_index % torch.cuda.device_count()}"

    def wait(self) -> None:
        with _lost():
            self._state.wait_for_everyone()

    def gather(self, items: list[Any]) -> list[Any]:
        with _lost():
            gathered: list[Any] = self._gather(items)
        return gathered


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """An error of the connection becomes a ConnectionError that says what it means."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another process of this run has ended; see its error. Then run this again, which goes on ({error})"
        ) from error


def current() -> Processes:
    """The processes that this one belongs to.

    Raises
    ------
    ValueError
        If there are several, and accelerate is not installed.
    """
    return LaunchedProcesses() if int(os.environ.get("WORLD_SIZE") or 1) > 1 else Processes()

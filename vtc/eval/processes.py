"""The processes that answer side by side: one, or those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

from typing import Any


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

    def wait(self) -> None:
        """Wait until all processes are here."""

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in each of them."""
        return items

"""Shares with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

Share = tuple[float, float, float]  # a share and its 95 % interval


def wilson(count: int, total: int) -> Share:
    """`count / total` and its 95 % interval (Wilson, 1927)."""
    z, share = 1.96, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> Share:
    """Accuracy of `ours` minus that of `theirs` on the same questions, and its 95 % interval."""
    total = len(ours)
    gains = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    difference = (gains - losses) / total
    half = 1.96 * math.sqrt(max(0.0, gains + losses - (gains - losses) ** 2 / total)) / total
    return difference, difference - half, difference + half


def percent(share: Share) -> str:
    """A share in percent, with half the width of its interval."""
    return f"{100 * share[0]:.1f} ± {50 * (share[2] - share[1]):.1f}"

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
    """Accuracy of `ours` minus that of `theirs` on the same questions, and its 95 % interval.

    It is method 10 of Newcombe (Statistics in Medicine 17, 1998, 2635-2650): the Wilson intervals of both, squared and
    added, less what their correlation takes. It also holds where few questions tell the two apart.
    """
    total = len(ours)
    both, gains, losses, neither = (
        sum((a, b) == pair for a, b in zip(ours, theirs, strict=True))
        for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    (mine, low, high), (other, other_low, other_high) = (wilson(both + one, total) for one in (gains, losses))
    product = float(both * neither - gains * losses)
    if product > 0:
        product = max(product - total / 2, 0.0)  # his correction for continuity
    sides = (both + gains) * (losses + neither) * (both + losses) * (gains + neither)
    correlation = product / math.sqrt(sides) if sides else 0.0

    def width(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    difference = (gains - losses) / total
    return (
        difference,
        difference - width(mine - low, other_high - other),
        difference + width(high - mine, other - other_low),
    )


def percent(share: Share) -> str:
    """A share in percent, and its interval."""
    value, low, high = (f"{100 * number:.1f}" for number in share)
    return f"{value} ({low} to {high})"

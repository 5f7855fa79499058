"""Checks of option values. Each raises a ValueError with the name of the option, what it accepts, and what it got.

`plain` comes before them: it turns numbers of NumPy and torch into Python's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plain(value: Any) -> Any:
    """`value`, or the Python object that is in it if it is a scalar of NumPy or a 0-d tensor."""
    if type(value) in (int, float, bool, str, type(None)) or getattr(value, "shape", None) != ():
        return value
    return value if getattr(value, "is_meta", False) else value.item()  # a meta tensor holds no number


def check_one_of(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise ValueError if `value` is not one of `accepted`."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def check_integer(name: str, value: object, least: int, most: float = float("inf")) -> None:
    """Raise ValueError if `value` is not an integer from `least` to `most`. True and False do not count as integers."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        limit = "" if most == float("inf") else f" (and at most {most})"
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}{limit}")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError if `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_positive(name: str, value: object, or_zero: bool = False) -> None:
    """Raise ValueError if `value` is not a finite number above 0, or 0 with `or_zero`."""
    if not _is_number(value) or not (0 < value < float("inf") or (or_zero and value == 0)):  # type: ignore[operator]
        raise ValueError(f"{name} must be a number {'of at least' if or_zero else 'above'} 0, got {value!r}")


def check_share(name: str, value: object) -> None:
    """Raise ValueError if `value` is not a number from 0 to 1."""
    if not _is_number(value) or not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

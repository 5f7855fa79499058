"""Checks of option values. Each raises a ValueError with the name of the option, what it accepts, and what it got."""

from __future__ import annotations

from collections.abc import Sequence


def check_one_of(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise ValueError if `value` is not one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError if `value` is not an integer, or less than `least`. True and False do not count as integers."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError if `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")

"""The options of a method as they stand on the command line, and the API's messages in its words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Those with a flag of their own; the others are --option NAME=VALUE.
FLAGS = (
    "method",
    "keep",
    "ratio",
    "prune_layer",
    "schedule",
    "kv",
    "positions",
    "start_layer",
    "ensemble_layers",
    "seed",
    "backend",
)
# In messages of the API:
BEGIN = r"(?<![\w'\"./\\-])"  # of a name that stands alone
VALUE = r"'[^']*'|\"[^\"]*\"|-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|[\w-]*\w\+?)"
QUOTED = r"(?<!\w)(?:'[^']*'|\"[^\"]*\")"


def options_of(given: Sequence[str], **flags: Any) -> dict[str, Any]:
    """The options of `--option name=value`, with the flags that are not None.

    Numbers, true, false and none become Python's.

    Raises
    ------
    ValueError
        If an option has no `=`, or no method has it, or it is given twice.
    """
    found = {name: value for name, value in flags.items() if value is not None}
    for text in given:
        name, equals, value = text.partition("=")
        known = _known()
        if not equals or name not in known - {"method", "keep"}:
            names = ", ".join(map(repr, sorted(known - {"method", "keep"})))
            raise ValueError(f"--option takes name=value with a name among {names}, got {text!r}")
        if name in found:
            raise ValueError(f"{name} is given twice, as {found[name]!r} and in --option {text}; give it once")
        found[name] = schedule_of(value) if name == "schedule" else _value(value)
    return found


def _known() -> set[str]:
    from vtc.config import SHARED
    from vtc.methods import METHODS

    return {*SHARED, *(option for method in METHODS.values() for option in method.options())}


def schedule_of(text: str | None) -> list[tuple[int, int]] | None:
    """The pairs of `--schedule 0:96,16:32`.

    Raises
    ------
    ValueError
        If it is written in another way.
    """
    if text is None:
        return None
    pairs = [pair.split(":") for pair in text.split(",")]
    if not all(len(pair) == 2 and all(number.strip().isdecimal() for number in pair) for pair in pairs):
        raise ValueError(f"--schedule takes pairs layer:tokens, such as 0:96,16:32, got {text!r}")
    return [(int(layer), int(tokens)) for layer, tokens in pairs]


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def in_words_of_the_command(text: str) -> str:
    """A message of the API as advice for the command line: keep=9 becomes --keep 9, and calls only their arguments.

    Names of files, and what stands in quotes, remain as they are.
    """
    if "vtc.config" not in sys.modules:  # then the message is of the command itself
        return text
    known = "|".join(sorted(_known(), key=len, reverse=True))
    text = _replaced(r"vtc\.\w+\(model, ([^()]*)\)", lambda call: call[1].replace(", ", " "), text)
    # What follows --option or --sweep is right already, and keep=256,128 is a list.
    pair = rf"(?<!--option )(?<!--sweep ){BEGIN}({known})=({VALUE})(?![\w/\\+-]|[.,]\w)"
    text = _replaced(pair, lambda found: f"{_flag(found[1])}{found[2].strip(chr(39) + chr(34))}", text)
    # "keep" may be a verb.
    names = "|".join(name if "_" in name else rf"(?:(?<=use )|(?<!.)){name}(?! to\b)" for name in FLAGS)
    return _replaced(rf"{BEGIN}({names})(?![\w/\\=-]|\.\w)", lambda found: _flag(found[1]).strip(), text)


def _replaced(pattern: str, new: Callable[[re.Match[str]], str], text: str) -> str:
    """`re.sub` outside of quotes. The pattern has a group."""
    return re.sub(f"{pattern}|{QUOTED}", lambda found: new(found) if found.lastindex else found[0], text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')} " if name in FLAGS else f"--option {name}="

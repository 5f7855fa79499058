"""The options of a method as they stand on the command line, and the API's messages in its words."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

# Those with a flag of their own; the others are --option NAME=VALUE.
FLAGS = ("method", "keep", "ratio", "prune_layer", "kv", "start_layer", "ensemble_layers", "seed", "backend")


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
        found[name] = _value(value)
    return found


def _known() -> set[str]:
    from vtc.config import SHARED
    from vtc.methods import METHODS

    return {*SHARED, *(option for method in METHODS.values() for option in method.options())}


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
    """A message of the API as advice for the command line: keep=9 becomes --keep 9, and calls only their arguments."""
    if "vtc.config" not in sys.modules:  # then the message is of the command itself
        return text
    known = "|".join(sorted(_known(), key=len, reverse=True))
    # A value ends before the comma of a list and inside no word; what follows --option or --sweep is right already.
    pair = re.compile(
        rf"(?<!--option )(?<!--sweep )(?<![\w'-])({known})=('[^']*'|\"[^\"]*\"|-?[\w.-]*\w\+?)(?!\w|,\w|\.\d)"
    )
    text = re.sub(r"vtc\.\w+\(model, ([^()]*)\)", lambda call: call[1].replace(", ", " "), text)
    text = pair.sub(lambda found: f"{_flag(found[1])}{found[2].strip(chr(39) + chr(34))}", text)
    # "keep" may be a verb.
    names = "|".join(name if "_" in name else rf"(?:(?<=use )|(?<!.)){name}(?! to\b)" for name in FLAGS)
    return re.sub(rf"(?<![\w'-])({names})\b(?!=)", lambda found: _flag(found[1]).strip(), text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')} " if name in FLAGS else f"--option {name}="

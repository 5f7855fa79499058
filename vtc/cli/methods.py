"""`vtc methods`: the methods of compression, and one of them with its options."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import typer

from vtc.cli.output import print_table
from vtc.methods import METHODS, table


def listing() -> list[dict[str, Any]]:
    """Every method, for `--json`."""
    return [about(name) for name in METHODS]


def about(name: str) -> dict[str, Any]:
    """One method, for `--json`."""
    method = METHODS[name]
    return {
        "name": method.name,
        "scores": method.scores,
        "needs_cls": method.needs_cls(),
        "prunes": list(method.prunes),
        "adaptive": method.adaptive,
        "paper": method.paper or None,
    }


def details(name: str) -> dict[str, Any]:
    """One method with its docstring and its options.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    options = [
        {"name": field.name, "type": field.type, "default": field.default}
        for field in dataclasses.fields(METHODS[name])
        if field.name in METHODS[name].options()
    ]
    return {**about(name), "description": inspect.getdoc(METHODS[name]), "options": options}


def show() -> None:
    """Print every method as a table."""
    print_table("methods", ("name", "scores", "needs [CLS]", "prunes", "paper"), table())


def show_details(found: dict[str, Any]) -> None:
    """Print what `details` returned."""
    typer.echo(f"{found['name']}\n\n{found['description']}\n")
    rows = [(option["name"], str(option["type"]), repr(option["default"])) for option in found["options"]]
    if rows:
        print_table("options", ("name", "type", "default"), rows)
    else:
        typer.echo("It has no options of its own.")

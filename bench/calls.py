"""Ways of calling a model, and the tests that prove them: read from the tests' marks `supported` and `refused`.

The test files are parsed, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.checkout import ROOT

AREAS = (  # the first argument of `supported`, in the table's order
    "Prompts",
    "generate()",
    "forward()",
    "Caches",
    "Training",
    "Loading",
    "Switching and blocks",
    "Arguments",
    "Compiling",
    "Graphs",
)


class Mark(NamedTuple):
    """A mark of one test: its name, "supported" or "refused", its arguments, and the test's file and name."""

    kind: str
    arguments: tuple[str, ...]
    file: str
    test: str


def marks(root: Path = ROOT) -> Iterator[Mark]:
    """Every mark of every test.

    Raises
    ------
    ValueError
        If the arguments of a mark are not strings, are not two, or its area is unknown.
    """
    for path in sorted((root / "tests").rglob("test_*.py")):
        file = path.relative_to(root).as_posix()
        for test in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(test, ast.FunctionDef):
                continue
            for decorator in test.decorator_list:
                if not isinstance(decorator, ast.Call):
                    continue
                kind = ast.unparse(decorator.func).removeprefix("pytest.mark.")
                if kind not in ("supported", "refused"):
                    continue
                given = [*decorator.args, *(keyword.value for keyword in decorator.keywords)]
                arguments = tuple(str(each.value) for each in given if isinstance(each, ast.Constant))
                if len(arguments) != 2 or len(given) != 2:
                    raise ValueError(f"{file}: {kind} of {test.name} takes two strings, got {ast.unparse(decorator)}")
                if kind == "supported" and arguments[0] not in AREAS:
                    raise ValueError(f"{file}: {test.name} names {arguments[0]!r}; areas are {', '.join(AREAS)}")
                yield Mark(kind, arguments, file, test.name)


def ways(kind: str, root: Path = ROOT) -> dict[tuple[str, ...], list[str]]:
    """The arguments of the marks of a kind, each once, and the files of their tests; `supported` in order of areas."""
    found: dict[tuple[str, ...], list[str]] = {}
    for mark in marks(root):
        if mark.kind == kind:
            files = found.setdefault(mark.arguments, [])
            if mark.file not in files:
                files.append(mark.file)
    order = (lambda way: AREAS.index(way[0])) if kind == "supported" else (lambda way: 0)
    return {way: found[way] for way in sorted(found, key=order)}

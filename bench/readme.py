"""`python -m bench kernels`: the table of the kernels, made from their docstrings and from the files that are there."""

from __future__ import annotations

import inspect
import re

from bench import table
from bench.checkout import ROOT
from bench.workloads import WORKLOADS
from vtc import ops, reference


def kernels() -> str:
    """The table, Markdown: what, shapes, kernel, reference, test, benchmark.

    Raises
    ------
    ValueError
        If an operation lacks one of them.
    """
    rows = []
    for op in ops.OPS:
        function = getattr(ops, op)
        found = [
            path for path in sorted(ROOT.glob("kernels/*.py")) if f"\ndef {op}(" in path.read_text(encoding="utf-8")
        ]
        test = f"tests/ops/test_{op}.py"
        has = {"one launcher": len(found) == 1, test: (ROOT / test).exists()}
        has |= {"a reference": hasattr(reference, op), "a workload": op in WORKLOADS}
        if missing := [what for what, there in has.items() if not there]:
            raise ValueError(f"{op} lacks {', '.join(missing)}")
        what = inspect.getdoc(function).split("\n")[0].split(":")[0].rstrip(".")
        rows.append(
            [
                f"[`{op}`](kernels/{found[0].name})",
                what,
                f"{shapes(function, 'Parameters')} → {shapes(function, 'Returns')}",
                f"`vtc.reference.{op}`",
                f"[test]({test})",
                f"`python -m bench micro --op {op}`",
            ]
        )
    return table.markdown(["kernel", "what it computes", "shapes", "reference", "tests", "benchmark"], rows)


def shapes(function: object, section: str) -> str:
    """The tensors of a section of a docstring, `name [shape]` each."""
    doc = inspect.getdoc(function) or ""
    text = re.split(r"\n(?=\w+\n-+\n)", doc)
    (lines,) = [part for part in text if part.startswith(f"{section}\n")]
    found = re.findall(r"^(?:([\w, ]+) : )?(?:.*\b)?Tensor(\[.*?\])", lines, re.MULTILINE)
    return ", ".join(f"{name} {shape}".strip() for name, shape in found)

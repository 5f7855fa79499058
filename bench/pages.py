"""Generated blocks of Markdown pages: what stands between the lines <!-- name --> and <!-- /name -->."""

from __future__ import annotations

from pathlib import Path


def put(block: str, page: Path, name: str) -> None:
    """Replace the block `name` of a page.

    Raises
    ------
    ValueError
        If the page lacks the two lines.
    """
    page.write_text(replaced(page.read_text(encoding="utf-8"), block, name, str(page)), encoding="utf-8")


def replaced(text: str, block: str, name: str, page: str = "the page") -> str:
    """`text` with another block `name`."""
    head, mark, after = text.partition(f"<!-- {name} -->\n")
    _, end, tail = after.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise ValueError(f"{page} lacks the lines <!-- {name} --> and <!-- /{name} -->")
    return f"{head}{mark}{block}\n{end}{tail}"

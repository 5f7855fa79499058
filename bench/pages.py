"""Generated blocks of Markdown pages: the text between the lines <!-- name --> and <!-- /name -->."""

from __future__ import annotations

from pathlib import Path

from vtc.files import replacing


def put(block: str, page: Path, name: str) -> None:
    """Replace the block `name` of a page.

    Raises
    ------
    ValueError
        If the page lacks the two lines.
    """
    head, mark, after = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, tail = after.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise ValueError(f"{page} lacks the lines <!-- {name} --> and <!-- /{name} -->")
    with replacing(page) as made:
        made.write_text(f"{head}{mark}{block}\n{end}{tail}", encoding="utf-8")

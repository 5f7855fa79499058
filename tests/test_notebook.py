"""The notebook runs from its first cell to its last, and the outputs that are committed are what it prints."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / ".github" / "notebook.ipynb"
MILLISECONDS = re.compile(r"\d+ ms")


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook):
    """What the cells print, without times; None for the warnings of others."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    streams = [[out.text for out in cell.outputs if out.get("name") == "stdout"] for cell in cells]
    return [MILLISECONDS.sub("# ms", "".join(texts)) for texts in streams]


def pictures(notebook):
    kinds = [set(out.get("data", {})) for cell in notebook.cells for out in cell.get("outputs", [])]
    return [bool(kind & {"image/png", "image/jpeg"}) for kind in kinds]


def test_the_notebook_prints_what_is_committed(committed, tmp_path):
    found = nbformat.read(NOTEBOOK, as_version=4)
    for cell in found.cells:
        cell.outputs = []
    NotebookClient(found, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(found) == printed(committed)
    assert sum(pictures(found)) == sum(pictures(committed)) == 4
    assert not list(tmp_path.iterdir())


def test_what_is_committed_is_complete_small_and_of_no_machine(committed):
    nbformat.validate(committed)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert NOTEBOOK.stat().st_size < 400_000
    assert not [
        out for cell in cells for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"
    ]
    assert all(set(cell.metadata) == set() for cell in committed.cells)
    texts = [cell.source for cell in committed.cells] + printed(committed) + [str(committed.metadata)]
    assert not [text for text in texts if re.search(r"/(home|root|tmp|work|usr|Users)/", text)]
    assert committed.metadata.kernelspec.name == "python3"

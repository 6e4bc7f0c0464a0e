"""The notebook runs from its first cell to its last, and what is committed of it came of the very cells it holds.

python tests/examples/test_notebook.py    executes it and writes the outputs into it
"""

import hashlib
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "rlhf.ipynb"
ROOT = NOTEBOOK.parents[1]
DIGEST = "sources_sha256"  # in the notebook's metadata: of the cells that its outputs came of


def digest(notebook):
    """SHA-256 of the source of all cells."""
    return hashlib.sha256("\0".join(cell.source for cell in notebook.cells).encode()).hexdigest()


def executed(folder):
    """The notebook, run anew in a folder by this Python; its package is this checkout's."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # tqdm misses widgets, which nothing here shows
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    environment = os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths)}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    for cell in code(notebook):
        cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs):
    """Outputs with what a stream gave in several pieces in one."""
    found = []
    for output in outputs:
        if found and output.get("name") and output.get("name") == found[-1].get("name"):
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def code(notebook):
    """Its code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: names of streams, and types of data."""
    return [output.get("name") or sorted(output.get("data", output)) for output in cell.outputs]


def texts(notebook):
    """All that its outputs say in words."""
    for cell in code(notebook):
        for output in cell.outputs:
            yield output.get("text") or output.get("data", {}).get("text/plain", "")


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_committed_outputs_came_of_the_committed_cells(committed):
    assert committed.metadata[DIGEST] == digest(committed), f"run python {Path(__file__).name}: cells have changed"
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))
    assert committed.metadata.kernelspec.name == "python3"
    told = "".join(texts(committed))
    assert not re.search(r"/(home|Users|root|tmp|work|usr|opt)/|Warning", told)
    assert NOTEBOOK.stat().st_size < 500_000


def test_notebook_runs_and_shows_what_the_committed_one_shows(committed, tmp_path):
    found = executed(tmp_path)
    assert [kinds(cell) for cell in code(found)] == [kinds(cell) for cell in code(committed)]
    told = "".join(texts(found))
    before, after = map(float, re.search(r"right: ([\d.]+) before, ([\d.]+) after", told).groups())
    assert after > before  # of 400 answers each
    assert re.search(r"preflight: \d+ checks in [\d.]+ s, 0 failed", told)


def main():
    """Execute it, and write it back."""
    notebook = executed(ROOT)
    for cell in code(notebook):
        cell.metadata.pop("execution", None)  # times
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        DIGEST: digest(notebook),
    }
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()

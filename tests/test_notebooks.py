"""The notebooks run from top to bottom, are stored without outputs, and equal their text halves."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_every_text_half_has_a_notebook_and_the_other_way_round():
    halves = [{path.stem for path in NOTEBOOKS[0].parent.glob(f"*.{kind}")} for kind in ("ipynb", "py")]
    assert halves[0] == halves[1]


@each_notebook
def test_a_notebook_equals_its_text_half(path):
    """Broken by: changing a word in either; `uv run jupytext --sync notebooks/*.py` makes them equal again."""
    cells, text = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(half).cells] for half in (path, path.with_suffix(".py"))
    )
    assert cells == text


@each_notebook
def test_a_notebook_is_stored_without_outputs(path):
    """Broken by: saving after a run."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count] == []


@each_notebook
def test_a_notebook_opens_in_colab_under_its_own_name(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert f"https://colab.research.google.com/github/ulysses-jax/ulysses_jax/blob/main/notebooks/{path.name}" in first


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path, tmp_path):
    """Broken by: an exchange that deals the heads out in another order."""
    notebook = nbformat.read(path, as_version=4)
    # nbclient's own four seconds for outputs to arrive are short for a loaded machine; late ones would be dropped in silence.
    waits = {"timeout": 300, "iopub_timeout": 60, "raise_on_iopub_timeout": True}
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}, **waits).execute()
    drawn = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(drawn) == 1

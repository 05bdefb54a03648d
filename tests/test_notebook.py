"""The notebook runs from its first cell to its last at the smallest size, and is committed
without outputs.
"""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "colab/quickstart.ipynb"


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_source(path):
  """A notebook is valid, opens itself, holds no outputs, and its code is formatted like the
  rest.
  """
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert f"/blob/main/{path.relative_to(ROOT)})" in notebook.cells[0].source
  for cell in code_cells(notebook):
    assert not cell.outputs and cell.execution_count is None
    assert max(map(len, cell.source.splitlines())) <= 120, cell.id
    compile(cell.source, cell.id, "exec")


def test_is_valid_and_holds_no_outputs(notebook):
  nbformat.validate(notebook)
  assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


def test_code_is_formatted_like_the_rest(notebook):
  for cell in code_cells(notebook):
    lines = cell.source.splitlines()
    assert max(map(len, lines)) <= 120, cell.id
    compile(cell.source, cell.id, "exec")


def test_badge_opens_this_file(notebook):
  link = re.search(
    r"\(https://colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/main/(\S+?)\)",
    notebook.cells[0].source,
  )
  assert (ROOT / link.group(1)) == NOTEBOOK


def test_runs_at_the_smallest_size(notebook, smallest_run, tmp_path, monkeypatch):
  """In the workdir of a finished run, which the notebook's own run of the main job finds and
  reads.
  """
  workdir, _ = smallest_run
  monkeypatch.setenv("R2M_NOTEBOOK_CONFIG", "configs/quickstart.py:test")
  monkeypatch.setenv("R2M_NOTEBOOK_WORKDIR", str(workdir))
  monkeypatch.setenv(
    "PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  )
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)

  nbclient.NotebookClient(
    notebook, timeout=2400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  ).execute()

  outputs = {cell.id: cell.outputs for cell in code_cells(notebook)}
  figures = [
    output
    for name in ("rewards", "frontier", "others")
    for output in outputs[name]
    if "image/png" in output.get("data", {})
  ]
  assert len(figures) == len(list((workdir / "figures").glob("*.png"))) >= 3
  shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs["table"])
  assert all(f"<td>{arm}</td>" in shown for arm in ("vanilla", "scaled", "r2m"))
  assert any("text/html" in output.get("data", {}) for output in outputs["samples"])
  streamed = [output for output in outputs["run"] if output.output_type == "stream"]
  assert "done before" in "".join(output.text for output in streamed)

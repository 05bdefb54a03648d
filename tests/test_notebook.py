"""The notebook runs from its first to its last cell at the smallest size, and is committed without
outputs.
"""

import ast
import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "colab/quickstart.ipynb"
NOTEBOOKS = sorted(ROOT.glob("colab/*.ipynb"))
INSTALL = next(
  cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.get("id") == "install"
)


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(cell):
  """The code of a cell without the magic for the second kernel."""
  return cell.source.removeprefix("%%r2m\n")


def check_source(path):
  """A notebook is valid, its link opens itself, it has no outputs, and its code is formatted like
  the repository.
  """
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert notebook.metadata.colab.name == path.name
  assert f"/blob/main/{path.relative_to(ROOT)})" in notebook.cells[0].source
  for cell in code_cells(notebook):
    assert not cell.outputs and cell.execution_count is None
    assert max(map(len, cell.source.splitlines())) <= 120, cell.id
    compile(python_of(cell), cell.id, "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_installs_in_an_environment_of_its_own(path):
  """The notebook uses its own environment and not the runtime's packages, and the kernel does not
  import the library.
  """
  check_source(path)
  cells = {cell.id: cell for cell in code_cells(nbformat.read(path, as_version=4))}
  assert cells["install"].source == INSTALL
  here = [cell for cell in cells.values() if not cell.source.startswith("%%r2m")]
  imported = {
    name.split(".")[0]
    for cell in here
    for node in ast.walk(ast.parse(cell.source))
    for name in names_imported(node)
  }
  assert not imported & {"r2m_jax", "configs", "jax", "flax"}, imported


def names_imported(node) -> list[str]:
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  return [node.module] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize(
  "devices, extras",
  [
    ((), "notebook"),
    (("nvidia0",), "notebook,cuda12"),
    (("accel0", "accel1"), "notebook,tpu"),
    (("vfio/0", "vfio/vfio"), "notebook,tpu"),
    (("vfio/vfio",), "notebook"),
  ],
)
def test_the_install_cell_fits_the_runtime(tmp_path, devices, extras):
  """In a Colab with `devices` in /dev and stubs for git, pip and uv: the extras that are installed,
  and where.
  """
  for name in devices:
    (tmp_path / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "dev" / name).touch()
  stub = """
import os, subprocess, sys
os.environ["COLAB_RELEASE_TAG"] = "a release"
def run(command, **settings):
  print(*command)
  return subprocess.CompletedProcess(command, 0, stdout="GpuDevice")
subprocess.run = run
"""
  source = INSTALL.replace('"/dev', f'"{tmp_path}/dev')
  result = subprocess.run(
    [sys.executable, "-c", stub + source], cwd=tmp_path, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  clone, pip, venv, install, check = result.stdout.splitlines()[:5]
  repo = tmp_path / "r2m_jax"
  assert clone == f"git clone -q --depth=1 https://github.com/r2m-jax/r2m_jax {repo}"
  assert pip.endswith("-m pip install -q uv") and venv.endswith(f"{sys.executable} {repo}/.venv")
  assert install.endswith(f"uv pip install -q --python {repo}/.venv/bin/python {repo}[{extras}]")
  assert check.startswith(f"{repo}/.venv/bin/python -c import jax, r2m_jax")


def test_is_valid_and_holds_no_outputs(notebook):
  nbformat.validate(notebook)
  assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


def test_code_is_formatted_like_the_rest(notebook):
  for cell in code_cells(notebook):
    lines = cell.source.splitlines()
    assert max(map(len, lines)) <= 120, cell.id
    compile(python_of(cell), cell.id, "exec")


def test_badge_opens_this_file(notebook):
  link = re.search(
    r"\(https://colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/main/(\S+?)\)",
    notebook.cells[0].source,
  )
  assert (ROOT / link.group(1)) == NOTEBOOK


def execute(notebook, folder, monkeypatch):
  """Runs every cell in `folder`, with this clone's library, outside of Colab."""
  monkeypatch.setenv(
    "PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  )
  monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
  monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
  nbclient.NotebookClient(
    notebook, timeout=2400, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
  ).execute()


def test_runs_at_the_smallest_size(notebook, smallest_run, tmp_path, monkeypatch):
  """In the workdir of a finished run, which the notebook's run of the main job then only reads."""
  workdir, _ = smallest_run
  monkeypatch.setenv("R2M_NOTEBOOK_CONFIG", "quickstart:test")
  monkeypatch.setenv("R2M_NOTEBOOK_WORKDIR", str(workdir))
  execute(notebook, tmp_path, monkeypatch)

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

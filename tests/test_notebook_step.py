"""colab/r2m_step_by_step.ipynb runs from its first to its last cell, agrees with the step, and has
no outputs.
"""

import os

import nbclient
import nbformat
from test_notebook import ROOT, check_source, code_cells

NOTEBOOK = ROOT / "colab/r2m_step_by_step.ipynb"


def test_is_valid_and_formatted():
  check_source(NOTEBOOK)


def test_installs_like_the_quickstart():
  install = [
    next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.id == "install")
    for path in (NOTEBOOK, ROOT / "colab/quickstart.ipynb")
  ]
  assert install[0] == install[1]


def run(notebook, folder, monkeypatch):
  """Executes it in place on one device, with a barely trained policy."""
  monkeypatch.setenv("R2M_NOTEBOOK_SFT_STEPS", "20")
  monkeypatch.setenv(
    "PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  )
  monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
  monkeypatch.setenv(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
  )  # one device, like a reader's machine
  monkeypatch.delenv(
    "MPLBACKEND", raising=False
  )  # the kernel's backend, which puts figures into the outputs
  monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
  nbclient.NotebookClient(
    notebook, timeout=2400, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
  ).execute()
  return {cell.id: cell.outputs for cell in code_cells(notebook)}


def test_runs_and_agrees_with_the_step(tmp_path, monkeypatch):
  outputs = run(nbformat.read(NOTEBOOK, as_version=4), tmp_path, monkeypatch)
  text = {
    name: "".join(o.text for o in shown if o.output_type == "stream")
    for name, shown in outputs.items()
  }
  assert any("image/png" in output.get("data", {}) for output in outputs["heatmap"])
  assert "equal: the tokens, every metric above" in text["check"]
  compared = {line.split()[0] for line in text["check"].splitlines() if "/" in line}
  assert {
    "reward/used",
    "policy/first_grad_norm",
    "policy/clip_fraction",
    "r2m/bt",
    "r2m/gre",
    "r2m/loss",
  } <= compared
  assert "attention      float32[32, 1, 26]" in text["attention"]

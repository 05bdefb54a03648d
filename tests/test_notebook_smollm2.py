"""colab/smollm2.ipynb runs from its first to its last cell at the smallest size, and has no
outputs.
"""

import nbformat
from test_notebook import ROOT, check_source, code_cells, execute

NOTEBOOK = ROOT / "colab/smollm2.ipynb"


def test_is_valid_and_formatted():
  check_source(NOTEBOOK)


def test_runs_at_the_smallest_size(tmp_path, monkeypatch):
  monkeypatch.setenv("R2M_NOTEBOOK_CONFIG", "smollm2_notes:test")
  monkeypatch.setenv("R2M_NOTEBOOK_WORKDIR", str(tmp_path / "work"))
  fewer = "--config.lab.seeds=(0,) --config.lab.arms=('vanilla','r2m')"
  monkeypatch.setenv("R2M_NOTEBOOK_OVERRIDES", fewer)
  monkeypatch.setenv(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
  )  # one device, like a reader's machine
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  execute(notebook, tmp_path, monkeypatch)
  shown = {
    cell.id: "".join(o.text for o in cell.outputs if o.output_type == "stream")
    for cell in code_cells(notebook)
  }
  figures = next(cell for cell in code_cells(notebook) if cell.id == "figures")
  assert shown["curves"].count("vanilla") == 2 and "nan" not in shown["curves"]
  assert shown["samples"].count("frozen ") == 2 * 2 * 4
  assert sum("image/png" in output.get("data", {}) for output in figures.outputs) == 3

"""colab/bring_your_own_model.ipynb runs from its first to its last cell on tiny models, and has no
outputs.
"""

import nbformat
import tiny_text
from test_notebook import ROOT, check_source, code_cells, execute

NOTEBOOK = ROOT / "colab/bring_your_own_model.ipynb"
# all six prompts are in each step: one padded length, one program
SMALL = (
  "--config.steps=2 --config.rollout.prompts=6 --config.rollout.group_size=2 "
  "--config.lora.rank=2 "
  "--config.rollout.max_new_tokens=4 --config.r2m.attention_dim=16 --config.remat=none"
)


def test_is_valid_and_formatted():
  check_source(NOTEBOOK)


def test_runs_on_tiny_models(tmp_path, monkeypatch):
  tiny_text.model("qwen2", "chatml", tmp_path / "policy")
  tiny_text.model("llama3.1", "llama3", tmp_path / "reward", classifier=True)
  settings = dict(
    POLICY=tmp_path / "policy",
    REWARD=tmp_path / "reward",
    WORKDIR=tmp_path / "work",
    OVERRIDES=SMALL,
  )
  for name, value in settings.items():
    monkeypatch.setenv(f"R2M_NOTEBOOK_{name}", str(value))
  monkeypatch.setenv(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
  )  # one device, like a reader's machine
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  execute(notebook, tmp_path, monkeypatch)
  shown = {
    cell.id: "".join(o.text for o in cell.outputs if o.output_type == "stream")
    for cell in code_cells(notebook)
  }
  assert "<|im_start|>user" in shown["run"] and "<|start|>assistant<|stop|>" in shown["run"]
  assert shown["run"].count("within 1e-04") == 2
  assert (
    "reward/r2m_head.safetensors" in shown["export"]
    and "policy/model.safetensors" in shown["export"]
  )
  assert "'I do not know.'" in shown["score"]

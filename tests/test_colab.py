"""The notebooks as Colab runs them: each from its first cell, in a runtime whose JAX is too old for
the library.

The runtime is made with the packages of Colab. By default these are the versions of August 2026 in
`RUNTIME`, and their dependencies. R2M_COLAB_FREEZE=FILE takes all versions from a list of Colab's
instead (github.com/googlecolab/backend-info has them). R2M_COLAB_PYTHON selects a Python other than
Colab's 3.13. The notebooks clone the last commit of this repository.
"""

import os
import pathlib
import re
import subprocess
import time

import nbformat
import pytest
import tiny_text
from test_notebook import ROOT, code_cells
from test_notebook_models import SMALL

pytestmark = pytest.mark.long

RUNTIME = """
absl-py==1.4.0
flax==0.11.2
ipykernel==6.17.1
ipython==7.34.0
jax==0.7.2
jaxlib==0.7.2
jupyter_client==7.4.9
matplotlib==3.10.0
nbclient==0.10.4
nbformat==5.11.1
numpy==2.1.3
optax==0.2.8
orbax-checkpoint==0.12.4
pyarrow==18.1.0
pyzmq==26.2.1
safetensors==0.8.0
tokenizers==0.22.2
tornado==6.5.7
transformers==5.15.0
"""
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=2400, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def uv(*arguments) -> str:
  """Runs uv on a runtime without this environment's variables; returns its output."""
  from uv import find_uv_bin

  env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  command = [find_uv_bin(), *map(str, arguments)]
  return subprocess.run(
    command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True
  ).stdout


def versions() -> str:
  """Requirements that fix the versions of the runtime."""
  freeze = os.environ.get("R2M_COLAB_FREEZE")
  if not freeze:
    return RUNTIME
  return "\n".join(re.findall(r"^[\w.-]+==[\w.]+$", pathlib.Path(freeze).read_text(), re.M))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
  """The Python of a runtime like Colab's."""
  folder = tmp_path_factory.mktemp("colab")
  (folder / "versions.txt").write_text(versions())
  wanted = os.environ.get("R2M_COLAB_PYTHON", "3.13")
  uv("venv", "-q", "--seed", "--python", wanted, folder / "env")
  python = folder / "env/bin/python"
  names = re.findall(r"^[\w-]+", RUNTIME, re.M)
  install = ["pip", "install", "-q", "--python", python]
  uv(*install, "-c", folder / "versions.txt", *names)
  uv(*install, "torch")  # Colab has its own build, which no index has
  return python


def in_colab(runtime, folder, name, **settings):
  """Executes a notebook in the runtime and prints the minutes. Returns {cell id: outputs}."""
  address = "https://github.com/r2m-jax/r2m_jax"
  env = os.environ | {
    "PATH": os.pathsep.join([str(runtime.parent), os.environ["PATH"]]),
    "COLAB_RELEASE_TAG": "release-colab",
    "MPLBACKEND": "module://ipykernel.pylab.backend_inline",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
    "GIT_CONFIG_VALUE_0": address,
  }
  for absent in ("PYTHONPATH", "JAX_PLATFORMS", "VIRTUAL_ENV"):
    env.pop(absent, None)
  env |= {f"R2M_NOTEBOOK_{key}": str(value) for key, value in settings.items()}
  start, done = time.monotonic(), folder / "done.ipynb"
  notebook = ROOT / "colab" / f"{name}.ipynb"
  command = [str(runtime), "-c", EXECUTE, str(notebook), str(done)]
  result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-4000:]
  print(f"\n{name}: {(time.monotonic() - start) / 60:.1f} minutes from its first cell")
  return {cell.id: cell.outputs for cell in code_cells(nbformat.read(done, as_version=4))}


def text(outputs) -> str:
  return "".join(output.get("text", "") for output in outputs)


def figures(outputs) -> int:
  return sum("image/png" in output.get("data", {}) for output in outputs)


def check_install(runtime, outputs):
  """The notebook's environment has a newer JAX than the runtime, whose JAX is unchanged."""
  found = re.search(r"r2m_jax (\S+), jax (\S+), \[CpuDevice", text(outputs["install"]))
  code = "import importlib.metadata as m; print(m.version('jax'), m.version('jaxlib'))"
  kept = subprocess.run([str(runtime), "-c", code], capture_output=True, text=True).stdout.split()
  assert kept == ["0.7.2", "0.7.2"] and found and found[2] != "0.7.2"


@pytest.mark.parametrize("extra", ["cuda12", "cuda13"])
def test_a_gpu_gets_the_plugin_of_its_jax(runtime, extra):
  """Checked by versions, without a GPU: jax, jaxlib and the parts for GPUs have the same
  release.
  """
  settings = ["-q", "--no-annotate", "--no-header", "--python", runtime, "--extra", extra]
  resolved = dict(re.findall(r"^(\S+)==(\S+)$", uv("pip", "compile", *settings, "setup.py"), re.M))
  parts = ("jax", "jaxlib", f"jax-{extra}-plugin", f"jax-{extra}-pjrt")
  assert len({resolved[name] for name in parts}) == 1, resolved


def test_quickstart(runtime, tmp_path):
  outputs = in_colab(
    runtime, tmp_path, "quickstart", CONFIG="quickstart:test", WORKDIR=tmp_path / "run"
  )
  check_install(runtime, outputs)
  assert figures(outputs["rewards"]) and figures(outputs["frontier"]) and figures(outputs["others"])
  table = "".join(output.get("data", {}).get("text/html", "") for output in outputs["table"])
  assert all(f"<td>{arm}</td>" in table for arm in ("vanilla", "scaled", "r2m"))
  assert any("text/html" in output.get("data", {}) for output in outputs["samples"])


def test_step_by_step(runtime, tmp_path):
  outputs = in_colab(runtime, tmp_path, "r2m_step_by_step", SFT_STEPS=20)
  check_install(runtime, outputs)
  assert figures(outputs["heatmap"]) == 1
  assert "equal: the tokens, every metric above" in text(outputs["check"])


def test_bring_your_own_model(runtime, tmp_path):
  tiny_text.model("qwen2", "chatml", tmp_path / "policy")
  tiny_text.model("llama3.1", "llama3", tmp_path / "reward", classifier=True)
  outputs = in_colab(
    runtime,
    tmp_path,
    "bring_your_own_model",
    POLICY=tmp_path / "policy",
    REWARD=tmp_path / "reward",
    WORKDIR=tmp_path / "work",
    OVERRIDES=SMALL,
  )
  check_install(runtime, outputs)
  assert "policy/model.safetensors" in text(outputs["export"])
  assert "'I do not know.'" in text(outputs["score"])


def test_smollm2(runtime, tmp_path):
  settings = dict(CONFIG="smollm2_notes:test", WORKDIR=tmp_path / "run")
  outputs = in_colab(runtime, tmp_path, "smollm2", **settings)
  check_install(runtime, outputs)
  assert figures(outputs["figures"]) and "frozen" in text(outputs["samples"])

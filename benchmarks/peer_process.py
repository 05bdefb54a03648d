"""A peer's environment, made at the first run, and a process in it that gives one JSON line."""

import json
import os
import pathlib
import platform
import subprocess
import sys

from benchmarks import machine, peer_figures

FOLDER = "~/.cache/r2m_jax/peers"  # of all environments
# both cores, no look at a hub or an accelerator, no warning from a tokenizer whose threads are not
# needed
VARIABLES = {
  "HF_HUB_OFFLINE": "1",
  "JAX_PLATFORMS": "cpu",
  "CUDA_VISIBLE_DEVICES": "",
  "TOKENIZERS_PARALLELISM": "false",
}


def environment(name: str, folder: pathlib.Path) -> pathlib.Path:
  """The Python of a peer's virtual environment, which is made if it is not there, or was left
  half made.
  """
  stamp, asked = folder / name / "installed.json", list(peer_figures.PEERS[name].requirements)
  python = folder / name / "bin" / "python"
  if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8"))["asked"] == asked:
    return python
  print(f"{name}: making an environment in {folder / name} ...", flush=True)
  low = ["nice", "-n", "19"]
  subprocess.run([*low, sys.executable, "-m", "venv", folder / name], check=True)
  subprocess.run([*low, python, "-m", "pip", "install", "-q", *asked], check=True)
  found = subprocess.run(
    [python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True
  ).stdout.split()
  stamp.write_text(
    json.dumps({"asked": asked, "python": platform.python_version(), "found": found}),
    encoding="utf-8",
  )
  return python


def run(name: str, python: pathlib.Path, *arguments, **variables: str) -> dict:
  """The result of a peer's process, which has ended; ends this one if it failed."""
  return result_of(python, peer_figures.PEERS[name].child, *arguments, **variables)


def result_of(python: pathlib.Path, module: str, *arguments, **variables: str) -> dict:
  """The JSON line that `module` prints last, run by a peer's Python."""
  command = [str(python), "-m", module, *map(str, arguments)]
  env = os.environ | VARIABLES | variables
  done = subprocess.run(
    command, cwd=machine.ROOT, env=env, capture_output=True, text=True, check=False
  )
  if done.returncode:
    sys.exit(
      f"{' '.join(command)} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
  return json.loads(done.stdout.splitlines()[-1])

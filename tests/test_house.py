"""The rules of the house that a program can check: imports point down, files stay short, README commands exist."""

import ast
import functools
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "r2m_jax"
MAX_LINES = 500
MAX_WIDTH = 120

# A file imports from lower floors only. An entry that is a package covers every file in it.
FLOORS = {
  "r2m_jax.types": 0,
  "r2m_jax.ops": 0,
  "r2m_jax.models.arch": 0,
  "r2m_jax.models.attention": 0,
  "r2m_jax.logprobs": 0,
  "r2m_jax.losses": 1,
  "r2m_jax.advantages": 1,
  "r2m_jax.schedules": 1,
  "r2m_jax.sharding": 0,
  "r2m_jax.minibatch": 1,
  "r2m_jax.hosts": 1,
  "r2m_jax.summary": 1,
  "r2m_jax.variants": 1,
  "r2m_jax.models.cache": 1,
  "r2m_jax.models.transformer": 1,
  "r2m_jax.config": 2,
  "r2m_jax.objective": 2,
  "r2m_jax.models.critic": 2,
  "r2m_jax.models.reward": 2,
  "r2m_jax.models.lora": 2,
  "r2m_jax.generate": 2,
  "r2m_jax.optim": 2,
  "r2m_jax.text": 2,
  "r2m_jax.data": 2,
  "r2m_jax.checkpoint": 2,
  "r2m_jax.metrics": 2,
  "r2m_jax.report": 2,
  "r2m_jax.models.pretrained": 3,
  "r2m_jax.models.peft": 4,
  "r2m_jax.loop": 3,
  "r2m_jax.step": 3,
  "r2m_jax.checks": 4,
  "r2m_jax.build": 4,
  "r2m_jax.pretrain": 4,
  "r2m_jax.lab": 4,
  "r2m_jax.checks": 4,
  "r2m_jax.train": 5,
  "r2m_jax.lab.grid": 6,
  "r2m_jax.folders": 5,
  "r2m_jax.card": 5,
  "r2m_jax.r2m_head": 0,
  "r2m_jax.parity": 6,
  "r2m_jax.export": 7,
  "r2m_jax.serve": 6,
  "r2m_jax.prepare": 6,
  "r2m_jax.tokenizer": 8,
  "r2m_jax.evals": 7,
  "r2m_jax.finetune": 8,
  "r2m_jax.scratch": 9,
  "r2m_jax.plan": 9,
  "r2m_jax.lab.realtext": 10,
  "r2m_jax.replay": 10,
  "r2m_jax.lab.analyse": 11,
  "r2m_jax.main": 12,
}
# (importer, imported) on one floor that are allowed; files of one package may import each other besides.
SAME_FLOOR = {
  ("r2m_jax.logprobs", "r2m_jax.ops"),
  ("r2m_jax.logprobs", "r2m_jax.sharding"),
  ("r2m_jax.models.attention", "r2m_jax.logprobs"),
  ("r2m_jax.models.attention", "r2m_jax.models.arch"),
  ("r2m_jax.models.attention", "r2m_jax.sharding"),
  ("r2m_jax.models.transformer", "r2m_jax.models.cache"),
  ("r2m_jax.report", "r2m_jax.metrics"),
  ("r2m_jax.checkpoint", "r2m_jax.metrics"),
  ("r2m_jax.objective", "r2m_jax.config"),
  ("r2m_jax.lab", "r2m_jax.build"),
  ("r2m_jax.lab", "r2m_jax.pretrain"),
}
# Packages that only hold a folder together: their __init__.py imports nothing of the house.
BARE_PACKAGES = {"r2m_jax", "r2m_jax.models"}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def library():
  """Module name -> path, for every file of the library."""
  return {module_name(path): path for path in sorted(LIBRARY.rglob("*.py"))}


@functools.cache
def tree_of(path):
  return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def entry_of(module):
  """The entry of FLOORS that covers a module: itself or a package it lies in; None where there is none."""
  parts = module.split(".")
  return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in FLOORS), None)


def imports_of(path):
  """(line, dotted name) of everything a file imports, at any depth; `from a import b` gives a.b."""
  package = path.relative_to(ROOT).parent.parts
  for node in ast.walk(tree_of(path)):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[:len(package) - node.level + 1] if node.level else ()
      base = ".".join([*base, *([node.module] if node.module else [])])
      yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def house_module(name):
  """The longest leading part of a dotted name that is a file of the library: r2m_jax.ops.check -> r2m_jax.ops."""
  parts = name.split(".")
  return next((module for n in range(len(parts), 0, -1) if (module := ".".join(parts[:n])) in library()), None)


def points_down(importer, imported):
  if imported in BARE_PACKAGES:
    return True
  if importer in BARE_PACKAGES:
    return False
  above, below = entry_of(importer), entry_of(imported)
  return FLOORS[below] < FLOORS[above] or above == below or (above, below) in SAME_FLOOR


def python_files():
  """Every Python file of the repository that is ours, tests included."""
  folders = ["r2m_jax", "configs", "benchmarks", "tests"]
  return [ROOT / "setup.py"] + [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_file_has_a_floor():
  unknown = [name for name in library() if name not in BARE_PACKAGES and entry_of(name) is None]
  assert not unknown, f"add {unknown} to FLOORS in tests/test_house.py, on the lowest floor above all they import"


def test_imports_point_down():
  broken = []
  for name, path in library().items():
    for line, imported in imports_of(path):
      target = house_module(imported)
      if imported.split(".")[0] in ("configs", "tests", "benchmarks"):
        broken.append(f"{path.relative_to(ROOT)}:{line} imports {imported}, which lies outside the library")
      elif target and target != name and not points_down(name, target):
        broken.append(f"{path.relative_to(ROOT)}:{line} imports {target}, which is not on a lower floor")
  assert not broken, "\n".join(broken)


def test_the_floor_check_sees_a_broken_rule():
  assert points_down("r2m_jax.step", "r2m_jax.losses")
  assert not points_down("r2m_jax.losses", "r2m_jax.step")
  assert not points_down("r2m_jax.losses", "r2m_jax.advantages")
  assert points_down("r2m_jax.report", "r2m_jax.metrics")
  assert not points_down("r2m_jax.metrics", "r2m_jax.report")
  assert points_down("r2m_jax.data.prompts", "r2m_jax.data.chat")
  assert not points_down("r2m_jax", "r2m_jax.ops")
  assert entry_of("r2m_jax.brand_new") is None


def test_files_are_short():
  long = {module: count for module, path in library().items()
          if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
  assert not long, f"over {MAX_LINES} lines: {long}"


def test_lines_are_short():
  wide = [f"{path.relative_to(ROOT)}:{number}" for path in python_files()
          for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > MAX_WIDTH]
  assert not wide, f"over {MAX_WIDTH} columns: {wide}"


def test_transformers_is_imported_in_at_most_two_files():
  users = [name for name, path in library().items()
           if any(imported.split(".")[0] == "transformers" for _, imported in imports_of(path))]
  assert len(users) <= 2, users


def test_no_torch_in_the_library():
  users = [name for name, path in library().items()
           if any(imported.split(".")[0] in ("torch", "tensorflow") for _, imported in imports_of(path))]
  # one is the module that an exported reward model carries, the other measures an export where torch is installed
  users = [name for name in users if name not in ("r2m_jax.r2m_head", "r2m_jax.parity")]
  assert not users, f"torch and tensorflow are for tests and benchmarks: {users}"


def test_torch_is_never_needed():
  """No file imports torch, or a file that does, before a function is called."""
  torch_files = ("r2m_jax.r2m_head",)
  broken = []
  for name, path in library().items():
    for node in tree_of(path).body if name not in torch_files else ():
      imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      imported += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
      broken += [f"{name} imports {i}" for i in imported if i.split(".")[0] == "torch" or i in torch_files]
  assert not broken, broken


def test_nothing_is_unpickled_or_run_from_a_download():
  broken = []
  for path in python_files():
    name = path.relative_to(ROOT)
    broken += [f"{name}:{line} imports {imported}" for line, imported in imports_of(path)
               if imported.split(".")[0] in ("pickle", "cloudpickle", "dill")]
    for node in ast.walk(tree_of(path)):
      if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
        if not (isinstance(node.value, ast.Constant) and node.value.value is False):
          broken.append(f"{name}:{node.value.lineno} {node.arg} is not a plain False")
  assert not broken, "\n".join(broken)


def test_no_named_todo():
  mark = "TODO" + "("
  owing = [str(path.relative_to(ROOT)) for path in python_files() if mark in path.read_text(encoding="utf-8")]
  assert not owing, f"finish it, or write down what is missing and why: {owing}"


def test_readme_commands_exist():
  named = set(re.findall(r"\./(launch/[\w.-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
  assert {"launch/quickstart.sh", "launch/test.sh"} <= named, f"README has two commands to start with; found {named}"
  missing = [name for name in sorted(named) if not os.access(ROOT / name, os.X_OK)]
  assert not missing, f"README names what is not there or not executable: {missing}"


def test_ci_runs_the_command_of_the_readme():
  assert os.access(ROOT / ".ci/run", os.X_OK)
  assert re.search(r"^(exec )?\./launch/test\.sh\b", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)


SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci/run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
  result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "env.sh"], ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(script):
  assert "set -euo pipefail" in script.read_text(encoding="utf-8")
  assert os.access(script, os.X_OK)


@pytest.mark.parametrize("arguments, given", [
  ([], False), (["--config.workdir=x"], False), (["--workdir"], True), (["--workdir=x"], True), (["-workdir=x"], True),
  (["--workdirs=x"], False), (["--config=c", "--workdir=has space"], True),
])
def test_has_flag(arguments, given):
  check = 'source "$0"; has_flag workdir "$@"'
  result = subprocess.run(["bash", "-euc", check, str(ROOT / "launch/env.sh"), *arguments], capture_output=True)
  assert (result.returncode == 0) == given

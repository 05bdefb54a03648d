"""The result of pip install: one package with the configs inside, and a command that finds them by
name.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import r2m_jax

ROOT = pathlib.Path(__file__).parents[1]
BUILT_FROM = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The unpacked wheel, as in site-packages."""
  folder = tmp_path_factory.mktemp("wheel")
  tree = folder / "tree"
  without = shutil.ignore_patterns("__pycache__")
  for name in ("r2m_jax", "configs"):
    shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=without)
  for name in BUILT_FROM:
    shutil.copy(ROOT / name, tree / name)
  build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
  subprocess.run([*build, "--wheel-dir", str(folder), str(tree)], check=True, capture_output=True)
  (wheel,) = folder.glob("*.whl")
  assert wheel.name == f"r2m_jax-{r2m_jax.__version__}-py3-none-any.whl"
  with zipfile.ZipFile(wheel) as packed:
    packed.extractall(folder / "site")
  return folder / "site"


def test_one_package_lands_in_site_packages(site):
  (info,) = site.glob("*.dist-info")
  assert {path.name for path in site.iterdir()} == {"r2m_jax", info.name}
  assert (info / "entry_points.txt").read_text().split("\n")[1] == "r2m = r2m_jax.main:start"
  packed = {path.name for path in (site / "r2m_jax/configs").iterdir()}
  assert packed == {path.name for path in ROOT.glob("configs/*.py")}
  sources = {path.relative_to(ROOT) for path in (ROOT / "r2m_jax").rglob("*.py")}
  assert all((site / name).is_file() for name in sources)
  for name in ("template.html", "page.css", "page.js"):
    assert (site / "r2m_jax/report" / name).is_file()


def test_the_installed_command_finds_its_configs(site, tmp_path):
  """From another folder: help, a config by name, and the refusal of a value before any device is
  used.
  """
  code = "from r2m_jax import main; main.start()"
  env = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "no_such_platform"}
  command = [sys.executable, "-c", code, "--config=quickstart:test", f"--workdir={tmp_path}/x"]
  refused = subprocess.run(
    [*command, "--config.rollout.group_size=1"],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
  )
  assert refused.returncode == 2 and not refused.stdout
  assert refused.stderr.startswith("error: config.rollout.group_size is 1: ")


def test_the_version_is_written_once_and_cited():
  cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
  assert r2m_jax.__version__ == cited
  # of the newest release; above it may stand what is not released yet
  newest = re.search(r"^## \[(.+?)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
  assert newest == cited


def test_tensorflow_datasets_is_imported_for_its_names_only(tmp_path):
  """No module of the library imports it, nor do rows from a file; a `tfds:` name needs it."""
  code = """
import importlib, pathlib, sys, types
import r2m_jax
root = pathlib.Path(r2m_jax.__file__).parent
for path in root.rglob("*.py"):
  name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
  if path.name != "__init__.py" and name not in ("r2m_jax.data.tfds", "r2m_jax.hf.r2m_head"):
    importlib.import_module(name)
from r2m_jax.data import rows
pathlib.Path("a.jsonl").write_text('{"prompt": "x"}\\n')
data = types.SimpleNamespace(name="a.jsonl", root="", split="", tfds_dir="", max_bad_share=0.0)
assert len(rows.load(data, "prompt")) == 1
print("tensorflow_datasets" in sys.modules)
try:
  next(rows.records("tfds:no_such_data_set", data))
except rows.DataError:
  print("tensorflow_datasets" in sys.modules)
"""
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  shown = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert shown.returncode == 0, shown.stderr
  assert shown.stdout.splitlines()[-2:] == ["False", "True"]

"""Configs by name, files by path as before, and the help that lists configs and tasks."""

import ast
import contextlib
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
from absl import flags
from ml_collections import config_flags

from configs import default
from r2m_jax import knobs, main
from r2m_jax.run import command_line

ROOT = pathlib.Path(__file__).parents[2]
INSIDE = str(ROOT / "r2m_jax/configs/quickstart.py")


@pytest.mark.parametrize(
  "argv, want",
  [
    (["--config=quickstart"], [f"--config={INSIDE}"]),
    (["-config=quickstart:test"], [f"-config={INSIDE}:test"]),
    (["--config", "quickstart:test", "--workdir", "quickstart"], None),
    (["--config=configs/quickstart.py:test"], ["--config=configs/quickstart.py:test"]),
    (["--config=mine"], ["--config=mine"]),
    (["--config=paper"], ["--config=paper"]),  # shared by configs, but not a config
    (["--config.task=lab", "--workdir=lab"], ["--config.task=lab", "--workdir=lab"]),
  ],
)
def test_a_name_becomes_a_path_and_a_path_stays(argv, want, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  want = want or ["--config", f"{INSIDE}:test", "--workdir", "quickstart"]
  assert command_line.with_config_paths(["r2m", *argv]) == ["r2m", *want]


def test_a_workdir_may_begin_with_the_home_folder_and_is_not_empty(monkeypatch, tmp_path, capsys):
  seen, monkey = [], monkeypatch.setattr
  monkeypatch.setenv("HOME", str(tmp_path))
  monkey(main, "CONFIG", types.SimpleNamespace(value=default.get_config()))
  monkey(main, "WORKDIR", types.SimpleNamespace(value="~/runs/a"))
  for name in ("set_up", "set_up_jax", "require_platform"):
    monkey(main.process, name, lambda *args: None)
  monkey(main.hosts, "together", lambda settings: contextlib.nullcontext())
  monkey(main, "run", lambda config, workdir: seen.append(workdir))
  main.main([])
  assert seen == [tmp_path / "runs/a"]
  monkey(main, "WORKDIR", types.SimpleNamespace(value=""))  # of an unset variable of the shell
  with pytest.raises(SystemExit):
    main.main([])
  assert "error: --workdir is empty; give one" in capsys.readouterr().err and len(seen) == 1


def test_a_file_of_that_name_is_preferred(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "quickstart").write_text("")
  assert command_line.config_path("quickstart:test") == "quickstart:test"


@pytest.mark.parametrize(
  "value, end",
  [
    ("quikstart:test", "did you mean quickstart?"),
    ("gpt", "choose one of default, evaluate, fair, from_hf, holds, lab, quickstart, "),
    ("configs/quickstart.py", "; --config=quickstart needs no file"),
    ("configs/none.py", "there is no such file from {cwd}"),
  ],
)
def test_what_is_neither_is_refused_with_what_there_is(value, end, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  argv = ["r2m", f"--config={value}", "--workdir=x"]
  refused = command_line.command_line_mistake(argv, ValueError())
  assert refused.startswith(f"--config is {value}: there is no such ")
  assert end.format(cwd=tmp_path) in refused and str(tmp_path) in refused


def test_a_file_without_its_ending_is_named(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text("")
  refused = command_line.command_line_mistake(["r2m", "--config=mine", "--workdir=x"], ValueError())
  assert refused == "--config is mine: there is no such config; did you mean mine.py?"


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads a file in this way
def test_a_file_without_get_config_is_refused(tmp_path, monkeypatch):
  # all configs are loaded under the same module name, so an earlier one would be reused
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  (tmp_path / "mine.py").write_text("x = 1\n")
  argv = ["r2m", f"--config={tmp_path}/mine.py", "--workdir=x"]
  refused = command_line.command_line_mistake(argv, AttributeError())
  assert refused == f"--config is {tmp_path}/mine.py: the file has no function get_config"


@pytest.mark.parametrize(
  "argv, refused",
  [
    (
      ["--config.seed=3", f"--config={INSIDE}", "--workdir=x"],
      "config.seed is set before --config: give --config first, then the settings that change it",
    ),
    (
      [f"--config={INSIDE}", "--workdir=x", "--steps=3"],
      "there is no flag --steps; did you mean --config.steps?",
    ),
    (
      [f"--config={INSIDE}", "--workdir=x", "--epochs=3"],
      "there is no flag --epochs: give settings as --config.FIELD=VALUE; see r2m --help",
    ),
  ],
)
@pytest.mark.filterwarnings("ignore:the load_module")
def test_flags_that_absl_refuses_are_refused_with_the_fix(argv, refused, monkeypatch):
  """absl raises the errors; it finds the config's overrides in sys.argv."""
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  monkeypatch.setattr(sys, "argv", ["r2m", *argv])
  names = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=names)
  flags.DEFINE_string("workdir", None, "", flag_values=names)
  with pytest.raises(flags.Error) as raised:
    names(sys.argv)
  assert command_line.command_line_mistake(sys.argv, raised.value) == refused


def test_help_has_a_line_for_every_config_and_task(tmp_path):
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "no_such_platform"}
  shown = subprocess.run(
    [sys.executable, "-m", "r2m_jax.main", "--help"],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
  )
  assert shown.returncode == 0 and not shown.stderr
  lines = shown.stdout.splitlines()
  assert max(map(len, lines)) <= 100
  entries = dict(re.findall(r"^  (\w+)  +(\S.*)$", shown.stdout, re.M))
  runs = [
    path.stem
    for path in ROOT.glob("configs/*.py")
    if "get_config" in [getattr(node, "name", "") for node in ast.parse(path.read_text()).body]
  ]
  assert len(runs) >= 9 and entries.keys() == {*runs, *knobs.TASKS}
  assert all(len(about) > 10 for about in entries.values())

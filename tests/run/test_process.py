"""The entry point's table of tasks, and the errors that end the program with one line."""

import importlib
import inspect
import pathlib

import pytest

from configs import quickstart
from r2m_jax import knobs, main
from r2m_jax.parallel.errors import UserError
from r2m_jax.run import process


def test_every_task_of_the_config_has_a_function():
  assert set(main.TASKS) == set(knobs.TASKS)


def test_every_task_takes_the_config_and_the_workdir():
  config = quickstart.get_config()
  for find in main.TASKS.values():
    inspect.signature(find(config)).bind(config, pathlib.Path("runs"))  # called as in main


@pytest.mark.parametrize(
  "name, status",
  [
    ("config.ConfigError", 2),
    ("parallel.hosts.HostsError", 2),
    ("data.files.DataError", 2),
    ("data.text.TextError", 2),
    ("hf.folders.FolderError", 2),
    ("hf.weights.PretrainedError", 2),
    ("run.checkpoint.CheckpointError", 1),
    ("run.files.DamagedFile", 1),
    ("run.identities.IdentityError", 1),
    ("run.loop.Diverged", 1),
  ],
)
def test_an_error_that_a_user_can_mend_has_its_exit_status(name, status, tmp_path, capsys):
  module, _, error = name.rpartition(".")
  kind = getattr(importlib.import_module(f"r2m_jax.{module}"), error)
  assert issubclass(kind, UserError)
  with pytest.raises(SystemExit) as stopped, process.trouble_ends_it(tmp_path):
    raise kind("what is wrong")
  assert stopped.value.code == status
  assert capsys.readouterr().err == "error: what is wrong\n"

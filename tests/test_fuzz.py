"""Two hundred malformed command lines: each gets one line of ours, or is a valid config. There is
no traceback.
"""

import pathlib
import sys

import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from configs import quickstart
from r2m_jax.config import ConfigError, _fields, check_config
from r2m_jax.run import command_line

CONFIG = pathlib.Path(__file__).parents[1] / "configs/quickstart.py"
FIELDS = _fields(quickstart.get_config())
NUMBERS = [
  "-1",
  "0",
  "1",
  "3",
  "0.5",
  "-0.0",
  "nan",
  "inf",
  "-inf",
  "1e400",
  "1e-400",
  str(10**30),
  "0x10",
  "1_0",
]
WORDS = [
  "",
  "None",
  "True",
  "[]",
  "()",
  "(1,)",
  "(0, 0, 0)",
  "(-1, 1, 1)",
  "('r2m',)",
  "(nan, 1, 1)",
  "{}",
  "((",
  "'",
  "../../etc/passwd",
  "a/../b",
  "\u202e\x00",
  "hf_" + "a" * 34,
  "<script>",
  "r2m",
  "grpo",
  "@file",
  "=",
  "--x",
]
values = st.one_of(
  st.sampled_from(NUMBERS),
  st.sampled_from(WORDS),
  st.integers().map(str),
  st.floats().map(str),
  st.text(max_size=12),
)
names = st.one_of(
  st.sampled_from(FIELDS), st.sampled_from(FIELDS).map(lambda name: name[:-1]), st.text(max_size=8)
)


def answer(arguments: list[str]) -> str | None:
  """The error message for these arguments, or None if the command would run. Exceptions other than
  ours are not caught.
  """
  argv = ["main", f"--config={CONFIG}", "--workdir=runs/fuzz", *arguments]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", argv)  # where config_flags looks for the overrides
    return parsed(argv)


def parsed(argv: list[str]) -> str | None:
  own = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=own, lock_config=True)
  flags.DEFINE_string("workdir", None, "", flag_values=own)
  try:
    own(argv)
    config = own.config
    config.task
  except Exception as error:
    reason = command_line.command_line_mistake(argv, error)
    if reason is None:
      raise
    return reason
  if section := command_line.section_given(argv, config):
    return section
  try:
    check_config(config)
  except ConfigError as error:
    return str(error)
  return None


@settings(
  max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.lists(st.tuples(names, values), min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads a file in this way
def test_malformed_command_lines_are_answered_in_one_line(tmp_path_factory, pairs):
  folder = tmp_path_factory.getbasetemp() / "fuzz"
  folder.mkdir(exist_ok=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    said = answer([f"--config.{name}={value}" for name, value in pairs])
  assert said is None or (said.strip() and "Traceback" not in said and len(said) < 2000)
  assert not list(folder.iterdir())


@pytest.mark.filterwarnings("ignore:the load_module")
def test_the_fuzzer_sees_refusals_and_valid_configs():
  assert answer(["--config.steps=7"]) is None
  assert "at least 1" in answer(["--config.steps=0"])
  assert "is a section" in answer(["--config.lab={}"])


@pytest.mark.parametrize(
  "secret", ["hf_" + "A1b2" * 9, "https://me:pw@hub.co/x", "sk-" + "x1" * 12, "ghp_" + "a" * 36]
)
def test_a_secret_is_refused_and_not_repeated(secret):
  config = quickstart.get_config("test")
  config.export.push_to = secret
  with pytest.raises(
    ConfigError, match="config.export.push_to looks like it holds a token"
  ) as refusal:
    check_config(config)
  assert secret not in str(refusal.value)

"""The command line: its flags, and each mistake on it told in one line with exit status 2."""

import functools
import re
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from r2m_jax.config import DICT_EXAMPLE, ConfigError, check_fields, is_dict
from r2m_jax.run.process import stop

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, such as configs/quickstart.py", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the report")
flags.mark_flags_as_required(["config", "workdir"])


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with a mistake on the command line told in one line and exit status 2."""
  try:
    rest = flags.FLAGS(argv)
    CONFIG.value.task  # a config file that could not be read is noticed on first use
  except Exception as error:
    reason = command_line_mistake(argv, error)
    if reason is None:
      raise  # by the config file's own code: the traceback says where
    stop(reason)
  if section := section_given(argv, CONFIG.value):
    stop(section)
  if len(rest) > 1:
    stop(f"unknown arguments {rest[1:]}; settings are --config.FIELD=VALUE")
  return rest


def section_given(argv: list[str], config) -> str | None:
  """The refusal of --config.SECTION={...}, which would take the place of all that the section
  has.
  """
  for field in re.findall(r"^--?config\.([^=\n]*)", "\n".join(argv), re.M):
    if not is_dict(field) and isinstance(
      functools.reduce(lambda section, name: section[name], field.split("."), config), ConfigDict
    ):
      return f"config.{field} is a section: set its fields one by one, such as --config.{field}.FIELD=VALUE"
  return None


def command_line_mistake(argv: list[str], error: Exception) -> str | None:
  """What on the command line made absl raise `error`, in the words of the config; None where
  nothing there did.
  """
  given = "\n".join(argv)
  for name, example in (("config", "configs/quickstart.py"), ("workdir", "runs/mine")):
    if not re.search(rf"^--?{name}[=\n].", given, re.M):
      return f"--{name} is missing; give one, such as --{name}={example}"
  path = re.search(r"^--?config[=\n](.+)", given, re.M)[1]
  if not Path(path.split(":")[0]).is_file():
    return f"--config is {path}: there is no such file from {Path.cwd()}"
  try:
    config = flags.FLAGS["config"].parser.parse(path)
    check_fields(config, re.findall(r"^--?(?:no)?config\.([^=\n]*)", given, re.M))
  except ConfigError as unknown:
    return str(unknown)
  except (
    ValueError
  ) as refused:  # by get_config; absl puts its traceback into the message, the reason comes last
    return str(refused).strip().splitlines()[-1].removeprefix("ValueError: ")
  wrong = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.S)
  if wrong:
    field, value = wrong.groups()
    default = functools.reduce(lambda section, name: section[name], field.split("."), config)
    if is_dict(field):
      return f"config.{field} is {value!r}: must be a dict, such as {DICT_EXAMPLE}"
    if isinstance(default, ConfigDict):
      return f"config.{field} is a section: set one of {', '.join(f'config.{field}.{name}' for name in default)}"
    return (
      f"config.{field} is {value!r}: must be of type {type(default).__name__}, such as {default!r}"
    )
  return " ".join(str(error).split()) if isinstance(error, flags.Error) else None

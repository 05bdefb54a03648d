"""The command line: its flags, its help, and one-line reports of mistakes, with exit status 2."""

import ast
import difflib
import functools
import re
import sys
import textwrap
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

import r2m_jax
from r2m_jax.config import DICT_EXAMPLE, ConfigError, check_fields, is_dict
from r2m_jax.knobs import TASKS
from r2m_jax.run.process import stop

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A config's name, such as quickstart, or its file", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the report")
flags.mark_flags_as_required(["config", "workdir"])


CONFIGS = Path(r2m_jax.__file__).parent / "configs"
HELP = """\
r2m_jax {version}: a reward model that reads the policy, in JAX

  r2m --config=CONFIG --workdir=FOLDER [--config.task=TASK] [--config.FIELD=VALUE ...]

`python -m r2m_jax.main` is the same command. The workdir holds checkpoints, metrics and the report;
the same command with the same workdir resumes the run. Every FIELD, with its default and unit:
python -m r2m_jax.knobs

CONFIG is a name of this list or the path of a Python file with a function get_config. Text after a
colon is passed to that function: --config=quickstart:test is the quickstart at its smallest size.
{configs}

The config sets TASK, unless you name another one:
{tasks}
"""


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser. --help lists configs and tasks. A mistake on the command line is reported in one
  line with exit status 2.
  """
  if {"--help", "-help", "-h"} & set(argv[1:]):
    print(help_text(), end="")
    sys.exit(0)
  argv = with_config_paths(argv)
  try:
    rest = flags.FLAGS(argv)
    CONFIG.value.task  # an unreadable config file is noticed on first use
  except Exception as error:
    reason = command_line_mistake(argv, error)
    if reason is None:
      raise  # raised by the config file's own code: the traceback shows where
    stop(reason)
  if section := section_given(argv, CONFIG.value):
    stop(section)
  if len(rest) > 1:
    stop(f"unknown arguments {rest[1:]}; give settings as --config.FIELD=VALUE")
  return rest


def help_text() -> str:
  """The output of `r2m --help`."""
  configs, tasks = table(named_configs()), table(TASKS)
  return HELP.format(version=r2m_jax.__version__, configs=configs, tasks=tasks)


def table(rows: dict[str, str]) -> str:
  """A line for each name with its meaning, wrapped if it is long."""
  width = max(map(len, rows))
  lines = []
  for name, about in rows.items():
    start, rest = f"  {name:<{width}}  ", " " * (width + 4)
    lines += textwrap.wrap(about, 100, initial_indent=start, subsequent_indent=rest)
  return "\n".join(lines)


def named_configs() -> dict[str, str]:
  """Name -> the first sentence of its docstring, for every config of the package."""
  found = {}
  for path in sorted(CONFIGS.glob("*.py")):
    module = ast.parse(path.read_text(encoding="utf-8"))
    if any(isinstance(part, ast.FunctionDef) and part.name == "get_config" for part in module.body):
      about = " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split())
      found[path.stem] = re.split(r"(?<=\.) ", about)[0]
  return found


def with_config_paths(argv: list[str]) -> list[str]:
  """`argv` with the name of the config replaced by its path; a path is not changed."""
  given = list(argv)
  for at, word in enumerate(given):
    if re.match(r"--?config=", word):
      flag, _, value = word.partition("=")
      given[at] = f"{flag}={config_path(value)}"
    elif at and re.fullmatch(r"--?config", given[at - 1]):
      given[at] = config_path(word)
  return given


def config_path(value: str) -> str:
  """The path of a config that is given by its name, with any text after a colon; otherwise
  `value`.
  """
  name, colon, words = value.partition(":")
  if name in named_configs() and not Path(name).is_file():
    return f"{CONFIGS / name}.py{colon}{words}"
  return value


def no_such_config(value: str) -> str:
  """The message for a config that is neither a name nor a file."""
  path = Path(value.partition(":")[0])
  names = list(named_configs())
  if re.fullmatch(r"\w+", str(path)):
    if path.with_suffix(".py").is_file():
      return f"--config is {value}: there is no such config; did you mean {path}.py?"
    close = difflib.get_close_matches(str(path), names, n=1)
    meant = f"; did you mean {close[0]}?" if close else f"; choose one of {', '.join(names)}"
    return (
      f"--config is {value}: there is no such config, and no such file from {Path.cwd()}{meant}"
    )
  meant = f"; --config={path.stem} needs no file" if path.stem in names else ""
  return f"--config is {value}: there is no such file from {Path.cwd()}{meant}"


def section_given(argv: list[str], config) -> str | None:
  """The message for --config.SECTION={...}, which would replace the whole section."""
  for field in re.findall(r"^--?config\.([^=\n]*)", "\n".join(argv), re.M):
    if not is_dict(field) and isinstance(
      functools.reduce(lambda section, name: section[name], field.split("."), config), ConfigDict
    ):
      return f"config.{field} is a section: set its fields one by one, such as --config.{field}.FIELD=VALUE"
  return None


def command_line_mistake(argv: list[str], error: Exception) -> str | None:
  """The mistake on the command line that made absl raise `error`, in terms of the config; None if
  there is none.
  """
  given = "\n".join(argv)
  for name, example in (("config", "quickstart"), ("workdir", "runs/mine")):
    if not re.search(rf"^--?{name}[=\n].", given, re.M):
      return f"--{name} is missing; give one, such as --{name}={example}"
  path = re.search(r"^--?config[=\n](.+)", given, re.M)[1]
  if not Path(path.split(":")[0]).is_file():
    return no_such_config(path)
  try:
    config = flags.FLAGS["config"].parser.parse(path)
    check_fields(config, re.findall(r"^--?(?:no)?config\.([^=\n]*)", given, re.M))
  except ConfigError as unknown:
    return str(unknown)
  except AttributeError as missing:
    if "has no attribute 'get_config'" not in str(missing):
      raise
    return f"--config is {path}: the file has no function get_config"
  except ValueError as refused:  # by get_config; absl adds a traceback, reason last
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
  if isinstance(error, flags.Error) and (early := setting_before_config(argv)):
    return f"{early} is set before --config: give --config first, then the settings that change it"
  if isinstance(error, flags.UnrecognizedFlagError):
    return unknown_flag(error.flagname, config)
  return " ".join(str(error).split()) if isinstance(error, flags.Error) else None


def setting_before_config(argv: list[str]) -> str | None:
  """The first setting on the command line if it comes before --config."""
  first = next((word for word in argv if re.match(r"--?config\b", word)), "")
  found = re.match(r"--?(config\.[^=]+)", first)
  return found and found[1]


def unknown_flag(name: str, config: ConfigDict) -> str:
  """The message for a flag that does not exist, such as --steps for --config.steps."""
  try:
    check_fields(config, [name])
  except ConfigError:
    return f"there is no flag --{name}: give settings as --config.FIELD=VALUE; see r2m --help"
  return f"there is no flag --{name}; did you mean --config.{name}?"

"""Entry point: python -m r2m_jax.main --config=configs/quickstart.py --workdir=runs/mine
[--config.FIELD=VALUE ...]
"""

import ctypes
import errno
import functools
import importlib.util
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from r2m_jax.config import ConfigError, check_config, check_fields, redact
from r2m_jax.parallel import hosts

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, such as configs/quickstart.py", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the report")
DISK = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EFBIG,
  errno.EIO,
  errno.EACCES,
  errno.ENOENT,
  errno.ESTALE,
  errno.EPIPE,
)
flags.mark_flags_as_required(["config", "workdir"])


def leave_absent_tpu_alone() -> None:
  """Has JAX not look for a TPU where libtpu is installed and no TPU is: it would print alarms,
  and may wait for one.
  """
  import jax

  chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
  gpus = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
  if (
    jax.config.jax_platforms is None
    and not chips
    and not gpus
    and importlib.util.find_spec("libtpu")
  ):
    jax.config.update("jax_platforms", "cpu")


def require_platform() -> None:
  """Raises ConfigError if JAX finds no device, for instance since JAX_PLATFORMS names one that
  is not there.
  """
  import jax

  try:
    jax.devices()
  except (
    RuntimeError,
    AssertionError,
  ) as error:  # the latter of a platform that jax has no plugin for
    wanted, reason = os.environ.get("JAX_PLATFORMS", ""), " ".join(str(error).split())[:300]
    given = f" with JAX_PLATFORMS={wanted}" if wanted else ""
    raise ConfigError(
      f"JAX finds no device{given}{f': {reason}' if reason else ''}. Set JAX_PLATFORMS=cpu, or "
      "install jax for the device: pip install -e .[cuda] or .[tpu]"
    ) from None


def keep_freed_memory() -> None:
  """Tells glibc not to hand freed memory back at once, which costs small CPU runs most of their
  time in the kernel.
  """
  if sys.platform == "linux":
    try:
      libc = ctypes.CDLL("libc.so.6")
      libc.mallopt(-4, 0)  # M_MMAP_MAX
      libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    except (OSError, AttributeError):
      pass  # another C library: slower, not wrong


def spare_threads() -> None:
  """Has XLA keep more threads than there are virtual CPU devices, before it starts any.

  A device that waits for the others keeps a thread, and there is one for each: where some wait in
  one collective and some in another, none is left to bring the rest, and all wait until XLA ends
  the process.
  """
  devices = re.search(
    r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
  )
  if devices:
    os.environ.setdefault("PJRT_NPROC", str(8 * int(devices[1])))


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
    if isinstance(
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
    if isinstance(default, ConfigDict):
      return f"config.{field} is a section: set one of {', '.join(f'config.{field}.{name}' for name in default)}"
    return (
      f"config.{field} is {value!r}: must be of type {type(default).__name__}, such as {default!r}"
    )
  return " ".join(str(error).split()) if isinstance(error, flags.Error) else None


def stop(reason, status: int = 2) -> NoReturn:
  """Ends the program: status 2 for a command that cannot run, 1 for a run that somebody must
  look after.
  """
  print(redact(f"error: {reason}"), file=sys.stderr)
  sys.exit(status)


def show_traceback(kind, error, trace) -> None:
  """Python's own, without secrets: for mistakes of the program, which nobody foresaw."""
  print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def show_unraisable(unraisable) -> None:
  """Python's own, but for the writes of a failed save, which end after all that waited for them
  has gone.
  """
  if (
    str(unraisable.exc_value) != "Event loop is closed"
  ):  # the save's own error is raised, and told in one line
    show_traceback(type(unraisable.exc_value), unraisable.exc_value, unraisable.exc_traceback)


def main(argv):
  del argv  # read by parse_flags
  config = CONFIG.value
  sys.excepthook, sys.unraisablehook = show_traceback, show_unraisable
  for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a sample must not end a run
    stream.reconfigure(errors="backslashreplace")
  keep_freed_memory()
  spare_threads()
  logging.set_verbosity(
    logging.FATAL
  )  # checkpointing is chatty otherwise; its errors are raised, and told in one line
  try:
    check_config(config)
    if config.task == "plan":
      from r2m_jax.plan import plan

      sys.exit(0 if plan.run(config, Path(WORKDIR.value)) else 1)
    import jax  # after the checks: a config that cannot run is refused before any device is touched

    leave_absent_tpu_alone()
    if config.dtype == "float64":
      jax.config.update("jax_enable_x64", True)
    cache = (
      os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "r2m_jax" / "jax"
    )
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if config.task == "lab" and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
      jax.config.update(
        "jax_num_cpu_devices", os.cpu_count() or 1
      )  # seeds side by side, a core each
    with hosts.together(config.hosts):
      require_platform()
      run(config, Path(WORKDIR.value))
  except (ConfigError, hosts.HostsError) as error:
    stop(error)


def run(config, workdir: Path) -> None:
  """The task: a tokenizer, batch use of a folder, an export, a replay, an analysis, a run on
  text, or the gold task.
  """
  import jax

  from r2m_jax.analysis import analyse
  from r2m_jax.data.jsonl import DataError
  from r2m_jax.data.text import TextError
  from r2m_jax.hf.folders import FolderError
  from r2m_jax.lab import grid, realtext
  from r2m_jax.run import loop
  from r2m_jax.run.checkpoint import CheckpointError
  from r2m_jax.run.files import DamagedFile
  from r2m_jax.run.identities import IdentityError
  from r2m_jax.run.workdir import with_date
  from r2m_jax.tasks import export, folders, gold, replay, scratch, serve, tokenizer

  try:
    given = {name: value for name, value in json.loads(config.to_json()).items() if name != "hosts"}
    hosts.require_same(
      [given, str(workdir)], "what they were given; start the same command on every host"
    )
    config = with_date(config, workdir)
    with loop.signals_end_the_run():
      if config.task in ("generate", "score"):
        serve.run(config)
      elif config.task == "export":
        export.run(config)
      elif config.task in ("replay", "analyse"):
        if jax.process_count() > 1:
          alone = f"for one process; add --config.hosts.coordinator={hosts.ALONE}"
          raise ConfigError(f"config.task is {config.task!r}: {alone}")
        {"replay": replay.run, "analyse": analyse.run}[config.task](config, workdir)
      elif config.task == "tokenizer":
        tokenizer.run(config, workdir)
      elif config.task == "scratch":
        scratch.run(config, workdir)
      elif config.task == "lab_text":
        realtext.run(config, workdir)
      elif config.policy.path or config.reward.path:
        folders.run(config, workdir)
      elif config.task == "lab":
        grid.run(config, workdir)
      else:
        gold.run(config, workdir)
  except (ConfigError, DataError, FolderError, TextError, hosts.HostsError) as error:
    stop(error)
  except hosts.Elsewhere:
    sys.exit(1)
  except loop.Interrupted as signal:
    print(f"stopped by {signal}: the same command goes on from what is saved", file=sys.stderr)
    sys.exit(loop.RESUME)
  except (CheckpointError, DamagedFile, IdentityError, loop.Diverged) as error:
    hosts.end_if_lost(error)
    stop(error, status=1)
  except OSError as error:
    if error.errno not in DISK:
      raise
    stop(
      f"{error}; repair that, then give the same command: it goes on from what is saved in "
      f"{workdir}",
      status=1,
    )


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)

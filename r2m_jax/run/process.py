"""The process around a run: memory, threads, streams, JAX, and how the process ends."""

import contextlib
import ctypes
import errno
import importlib.util
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from absl import logging

from r2m_jax.config import ConfigError, redact
from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.run import log

# of OSError: errors of the machine, which the user can fix
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


def set_up() -> None:
  """Streams, memory, threads and logging, before JAX starts."""
  sys.excepthook, sys.unraisablehook = show_traceback, show_unraisable
  for stream in (
    sys.stdout,
    sys.stderr,
  ):  # a terminal that cannot show a sample must not end a run
    stream.reconfigure(errors="backslashreplace")
  log.tee()
  keep_freed_memory()
  spare_threads()
  logging.set_verbosity(
    logging.FATAL
  )  # otherwise checkpointing logs much; its errors are raised, and reported in one line


def set_up_jax(config) -> None:
  """Sets the platform, float width, compilation cache and number of CPU devices. Touches no
  device.
  """
  import jax

  leave_absent_tpu_alone()
  if config.dtype == "float64":
    jax.config.update("jax_enable_x64", True)
  jax.config.update("jax_compilation_cache_dir", compilation_cache())
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  if config.task == "lab" and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # seeds in parallel, one core each
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def compilation_cache() -> str | None:
  """The folder of JAX's compiled programs, created here: under the home folder unless
  JAX_COMPILATION_CACHE_DIR names another one.

  None, with a warning, if it cannot be written or there is no home folder. JAX then compiles again
  at each start.
  """
  named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if named and "://" in named:  # a bucket
    return named
  try:
    folder = Path(named) if named else Path.home() / ".cache" / "r2m_jax" / "jax"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      return str(folder)
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
    print(
      f"warning: compiled programs cannot be kept ({error}), so each start compiles again; set "
      "JAX_COMPILATION_CACHE_DIR to a folder that can be written",
      file=sys.stderr,
    )
    return None


def leave_absent_tpu_alone() -> None:
  """Stops JAX from looking for a TPU if libtpu is installed but there is no TPU. Otherwise JAX
  would print errors, and might wait for one.
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
  """Raises ConfigError if JAX finds no device, for instance because JAX_PLATFORMS names a missing
  one.
  """
  import jax

  try:
    jax.devices()
  except (
    RuntimeError,
    AssertionError,
  ) as error:  # the latter for a platform without a jax plugin
    wanted, reason = os.environ.get("JAX_PLATFORMS", ""), " ".join(str(error).split())[:300]
    given = f" with JAX_PLATFORMS={wanted}" if wanted else ""
    raise ConfigError(
      f"JAX finds no device{given}{f': {reason}' if reason else ''}. Set JAX_PLATFORMS=cpu, or "
      "install jax for the device: pip install 'r2m_jax[cuda12]', [cuda13] or [tpu]"
    ) from None


def agreed(config, workdir: Path):
  """The config of the task, with its date, after checking that all processes were given the same
  one.

  Raises:
    HostsError: the processes were given different configs or workdirs.
    ConfigError: there are several processes and the task is for one.
  """
  import jax

  from r2m_jax.run.workdir import with_date

  given = {name: value for name, value in json.loads(config.to_json()).items() if name != "hosts"}
  hosts.require_same(
    [given, str(workdir)], "what they were given; start the same command on every host"
  )
  if config.task in ("replay", "analyse", "judge", "rewardbench") and jax.process_count() > 1:
    raise ConfigError(
      f"config.task is {config.task!r}: for one process; add "
      f"--config.hosts.coordinator={hosts.ALONE}"
    )
  return with_date(config, workdir)


def keep_freed_memory() -> None:
  """Tells glibc not to return freed memory at once. Otherwise small CPU runs spend most of their
  time in the kernel.
  """
  if sys.platform == "linux":
    try:
      libc = ctypes.CDLL("libc.so.6")
      libc.mallopt(-4, 0)  # M_MMAP_MAX
      libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    except (OSError, AttributeError):
      pass  # with another C library it is slower, but correct


def spare_threads() -> None:
  """Makes XLA keep more threads than there are virtual CPU devices, before it starts any.

  A device that waits for the others keeps a thread, and by default there is one thread for each
  device. If some devices wait in one collective and some in another, no thread is left for the
  others, and all wait until XLA ends the process.
  """
  devices = re.search(
    r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
  )
  if devices:
    os.environ.setdefault("PJRT_NPROC", str(8 * int(devices[1])))


# ---- the end ----


@contextlib.contextmanager
def mistakes_end_it() -> Iterator[None]:
  """Inside this context, a UserError ends the program with its message and its exit status."""
  try:
    yield
  except UserError as error:
    stop(error, error.status)


@contextlib.contextmanager
def trouble_ends_it(workdir: Path) -> Iterator[None]:
  """Inside this context, a signal, a UserError or a fault of the machine ends the program with one
  line and an exit status.
  """
  from r2m_jax.run import loop

  try:
    with mistakes_end_it():
      try:
        with loop.signals_end_the_run():
          yield
      except UserError as error:
        if error.status == 1:  # of a running run; a lost process may be the cause
          hosts.end_if_lost(error)
        raise
  except hosts.Elsewhere:
    sys.exit(1)
  except loop.Interrupted as signal:
    print(f"stopped by {signal}: the same command resumes from what is saved", file=sys.stderr)
    sys.exit(loop.RESUME)
  except OSError as error:
    if error.errno not in DISK:
      raise
    stop(
      f"{error}; repair that, then run the same command: it resumes from what is saved in "
      f"{workdir}",
      status=1,
    )


def stop(reason, status: int = 2) -> NoReturn:
  """Ends the program: status 2 for a command that cannot run, 1 for a run that needs attention."""
  print(redact(f"error: {reason}"), file=sys.stderr)
  sys.exit(status)


def show_traceback(kind, error, trace) -> None:
  """Python's own traceback, without secrets, for unexpected errors of the program."""
  print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def show_unraisable(unraisable) -> None:
  """Python's own hook, except for writes of a failed save that end after nothing waits for them any
  more.
  """
  if (
    str(unraisable.exc_value) != "Event loop is closed"
  ):  # the save's own error is raised, and reported in one line
    show_traceback(type(unraisable.exc_value), unraisable.exc_value, unraisable.exc_traceback)

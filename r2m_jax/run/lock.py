"""A workdir is used by one run at a time: a lock that the operating system releases when the
process ends.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from r2m_jax.config import ConfigError

LOCK = ".lock"

_held: dict[Path, IO] = {}  # by path; closing any file of a path releases its lock


def take(workdir: Path, *, shared: bool = False) -> None:
  """Keeps other runs out of `workdir` until this process ends, and creates the workdir.

  Args:
    shared: other processes may hold the workdir too, if they also use a shared lock.

  Raises:
    ConfigError: a process of another run holds it; the message names host, process and time.
    OSError: the workdir cannot be written.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path = (workdir / LOCK).resolve()
  file = _held.get(path)
  if file is None or not _is_at(file, path):
    file = _held[path] = path.open("a+", encoding="utf-8")
  try:
    fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EACCES, errno.EAGAIN):
      raise ConfigError(
        f"--workdir={workdir} is in use by {_holder(file)}: wait until it has ended or stop it "
        "there, or choose another --workdir"
      ) from None
    print(
      f"warning: {path} cannot be locked ({error.strerror}): make sure that no other run uses this "
      "--workdir",
      file=sys.stderr,
    )
    return
  file.truncate(0)
  json.dump({"host": socket.gethostname(), "pid": os.getpid(), "start": _now()}, file)
  file.flush()


def _is_at(file: IO, path: Path) -> bool:
  """Whether an open file is still the one at `path`: the workdir may have been deleted."""
  return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _holder(file: IO) -> str:
  """The process named in a lock file."""
  file.seek(0)
  try:
    found = json.loads(file.read())
    return f"process {found['pid']} on {found['host']}, since {found['start']}"
  except (ValueError, KeyError, TypeError):  # it has locked the file but not yet written its name
    return "another process"


def _now() -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S")

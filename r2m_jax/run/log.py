"""WORKDIR/log.txt: the output of a run's first process, over all starts."""

import os
import socket
import sys
import time
from pathlib import Path

from r2m_jax.config import redact

LOG = "log.txt"

_before: list[str] | None = None  # lines printed before the workdir is claimed; None: no tee
_file = None


class Tee:
  """A stream whose complete lines are also written to the log. Everything else is delegated to the
  stream.
  """

  def __init__(self, stream):
    self._stream = stream
    self._line = ""  # not yet complete

  def write(self, text: str) -> int:
    *lines, self._line = (self._line + text).split("\n")
    self._line = last_state(self._line)
    if lines:
      add([last_state(line) for line in lines])  # first: the terminal may be gone
    return self._stream.write(text)

  def __getattr__(self, name):
    return getattr(self._stream, name)


def last_state(line: str) -> str:
  """What a terminal finally shows of a line with carriage returns, such as a progress bar."""
  end = "\r" if line.endswith("\r") else ""
  return line.rstrip("\r").rpartition("\r")[2] + end


def tee() -> None:
  """From now on, stdout and stderr are kept for the log that `begin` opens."""
  global _before
  _before = []
  sys.stdout, sys.stderr = Tee(sys.stdout), Tee(sys.stderr)


def begin(workdir: Path) -> None:
  """Opens the log of a claimed workdir and adds what was printed so far.

  Nothing happens without `tee`, or if the log of an outer workdir is open.
  """
  global _before, _file
  if _before is None or _file is not None:
    return
  _file = open(workdir / LOG, "a", encoding="utf-8", errors="backslashreplace")
  start = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()} on {socket.gethostname()}"
  add([f"---- {start}: {' '.join(sys.argv)}", *_before])
  _before = None


def add(lines: list[str]) -> None:
  """Adds lines, without secrets. If the log cannot be written, it ends with a note on the
  terminal.
  """
  global _file
  if _before is not None:
    _before.extend(lines)
  if _file is None:
    return
  try:
    _file.write(redact("".join(line.rstrip("\r") + "\n" for line in lines)))
    _file.flush()
  except (OSError, ValueError) as error:
    _file = None  # first: the note is printed through a Tee
    print(f"{LOG} ends here: {error}; the run continues", file=sys.stderr)

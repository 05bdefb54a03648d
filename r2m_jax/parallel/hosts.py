"""Several processes as one program: how they find each other, share rows and values, and end.

Every process runs the same program on its own devices and holds its own rows of a batch. Only the
first process (number 0) writes, prints and reports. With a single process every function here is
free.
"""

import contextlib
import ctypes
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from r2m_jax.parallel.errors import UserError

# exit status if another process was lost, the same as "resume me": the same command resumes
LOST = 75
ALONE = "none"  # config.hosts.coordinator of a process that runs by itself
PATIENCE = 20.0  # seconds within which a shared disk must show what another machine wrote
# the runtime's messages about a lost process, and those of libraries such as orbax
GONE = re.compile(
  r"Gloo|[Bb]arrier|[Hh]eartbeat|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED"
)
CUT = re.compile(
  r"ncclRemote|connection (closed|reset|refused)|socket closed|broken pipe", re.I
)  # only the runtime


class HostsError(UserError, ValueError):
  """Processes that cannot work together; the message names the setting and the fix."""


class Elsewhere(RuntimeError):
  """The first process met an error in work that it does for all processes, and reports it
  itself.
  """


# ---- beginning and end ----


def addresses(settings, environ=os.environ) -> tuple[str, int, int] | None:
  """(coordinator, processes, process) as config.hosts or the environment gives them; None: detected
  from the cluster, or a single process.

  Raises:
    HostsError: a value is invalid; the message shows it as it was given.
  """
  given = {}
  for field, variable, none in (
    ("coordinator", "JAX_COORDINATOR_ADDRESS", ""),
    ("processes", "JAX_NUM_PROCESSES", 0),
    ("process", "JAX_PROCESS_ID", -1),
  ):
    value, name = settings[field], f"config.hosts.{field}"
    if value == none and environ.get(variable):
      value, name = environ[variable], f"the environment's {variable}"
    given[field] = value, name
  address, name = given["coordinator"]
  if address == ALONE:
    return None
  numbers = []
  for field in ("processes", "process"):
    value, of = given[field]
    if not re.fullmatch(r"-?\d+", str(value)):
      raise HostsError(f"{of} is {value!r}: give a whole number")
    numbers.append(int(value))
  processes, process = numbers
  if not address:
    if processes or process != -1:
      wrong, value = ("processes", processes) if processes else ("process", process)
      raise HostsError(
        f"{given[wrong][1]} is {value}, but no address is given: name process 0 with "
        "config.hosts.coordinator=HOST:PORT"
      )
    return None
  host, colon, port = address.rpartition(":")
  if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
    raise HostsError(
      f"{name} is {address!r}: give HOST:PORT of process 0, such as 10.0.0.1:1234, or {ALONE!r}"
    )
  if processes < 1:
    raise HostsError(f"{given['processes'][1]} is {processes}: give the total number of processes")
  if not 0 <= process < processes:
    raise HostsError(
      f"{given['process'][1]} is {process}: each of the {processes} processes has its own number "
      "from 0 to "
      f"{processes - 1}; give each its own"
    )
  return address, processes, process


@contextlib.contextmanager
def together(settings) -> Iterator[None]:
  """Joins the other processes of the run, if there are any, for the duration of the block.

  In the block only the first process prints to stdout. If a process is lost, the others end with
  status `LOST` within config.hosts.heartbeat_timeout seconds. If a process ends with an error, they
  end within config.hosts.end_timeout.

  Raises:
    HostsError: the other processes did not join.
  """
  with contextlib.ExitStack() as stack:
    on_abort = stack.enter_context(_last_words())
    on_abort(f"error: {_missing(settings)}", 2)
    if not _join(settings):
      stack.close()
      yield
      return
    silence = settings.heartbeat_timeout
    on_abort(
      _lost(
        f"killed, its host gone, or no sign of life for {silence} s "
        "(config.hosts.heartbeat_timeout)"
      ),
      LOST,
    )
    status = 0
    try:
      with contextlib.ExitStack() as quiet:
        if not first():
          quiet.enter_context(
            contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w")))
          )
        yield
      meet()  # the first may still be writing its report
    except BaseException as error:
      end_if_lost(error)
      told = isinstance(error, SystemExit)
      status = error.code if told and isinstance(error.code, int) else 1
      on_abort("" if told else traceback.format_exc(), status)
      raise
    finally:
      late = threading.Timer(
        settings.end_timeout + 10, os._exit, [status]
      )  # whatever delays the others
      late.start()
      with contextlib.suppress(
        RuntimeError
      ):  # another process left without a message: there is nothing to wait for
        jax.distributed.shutdown()
      late.cancel()


def _join(settings) -> bool:
  """Starts jax.distributed if there are several processes. Touches no device before all have
  joined.
  """
  if settings.coordinator == ALONE:
    return False
  given = addresses(settings)
  limits = dict(
    initialization_timeout=settings.start_timeout,
    heartbeat_timeout_seconds=settings.heartbeat_timeout,
    shutdown_timeout_seconds=settings.end_timeout,
  )
  jax.config.update(
    "jax_enable_preemption_service", False
  )  # otherwise it would take SIGTERM away from loop.signals_end_the_run
  try:
    if given is None:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from something that is not a cluster
        jax.distributed.initialize(**limits)
    elif given[1] > 1:
      jax.distributed.initialize(*given, cluster_detection_method="deactivate", **limits)
    else:
      return False
  except ValueError as error:
    if given is None and "coordinator_address" in str(error):
      return False  # no cluster
    raise HostsError(
      f"config.hosts: {error}; correct its fields, or give coordinator={ALONE} for one process alone"
    ) from None
  except (RuntimeError, OSError, LookupError, ImportError) as error:
    raise HostsError(f"{_missing(settings)} ({' '.join(str(error).split())[:300]})") from error
  return jax.process_count() > 1


def _missing(settings) -> str:
  given = addresses(settings)
  what = "the other processes" if given is None else f"{given[1]} processes at {given[0]}"
  return (
    f"{what} did not come together: start the same command on every host within "
    "config.hosts.start_timeout = "
    f"{settings.start_timeout} seconds, let them reach one another, or give "
    f"config.hosts.coordinator={ALONE} for one "
    "process alone"
  )


def _lost(how: str) -> str:
  return (
    f"error: process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()} "
    f"ends, because another process was lost: {how}. Its own output says why. The same command "
    "on every host resumes from the last checkpoint."
  )


@contextlib.contextmanager
def _last_words() -> Iterator[Callable[[str, int], None]]:
  """JAX aborts a process whose peers are lost or never join. Inside this context, such an abort
  prints the (words, status) that were set with the function it yields.
  """
  words, status = b"", LOST

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def aborted(number):
    del number
    os.write(2, words)
    os._exit(status)

  def on_abort(text: str, code: int) -> None:
    nonlocal words, status
    words, status = f"\n{text}\n".encode(), code

  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
  before = libc.signal(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))
  try:
    yield on_abort
  finally:
    libc.signal(signal.SIGABRT, before)


def end_if_lost(error: BaseException | None) -> None:
  """Ends the program with status `LOST` if an error, or its cause, is the loss of another
  process.
  """
  while error is not None and jax.process_count() > 1:
    of_runtime = isinstance(error, jax.errors.JaxRuntimeError)
    if GONE.search(str(error)) or of_runtime and CUT.search(str(error)):
      print(
        _lost(f"killed or its host gone ({' '.join(str(error).split())[:200]})"),
        file=sys.stderr,
        flush=True,
      )
      os._exit(LOST)  # not sys.exit, which would wait for the lost process
    error = error.__cause__ or error.__context__


# ---- values ----


def first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def any_of(flag: bool) -> bool:
  """Whether `flag` is true in any process. All processes must call it."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.asarray(bool(flag))).any())


def largest(number: int) -> int:
  """The largest of every process's `number`."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).max())


def total(number: int) -> int:
  """The sum of every process's `number`. All processes must call it."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).sum())


def from_first(value: Any) -> Any:
  """The first process's `value`, as JSON, in every process. The values of the others are
  ignored.
  """
  if jax.process_count() == 1:
    return value
  data = json.dumps(value).encode() if first() else b""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = np.zeros(1 << max(size - 1, 255).bit_length(), np.uint8)  # few sizes mean few programs
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  return json.loads(
    np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].astype(np.uint8).tobytes()
  )


def on_first(f: Callable[[], Any]) -> Any:
  """Runs `f` only in the first process and returns its result, as JSON, in all. An error ends all
  processes.

  Raises:
    Elsewhere: in the other processes, if f raised an error. The first process raises f's error.
  """
  if jax.process_count() == 1:
    return f()
  result = error = None
  if first():
    try:
      result = f()
    except (
      ArithmeticError,
      AttributeError,
      LookupError,
      OSError,
      RuntimeError,
      TypeError,
      ValueError,
    ) as raised:
      error = raised
  result, failed = from_first([result, error is not None])
  if error is not None:
    raise error
  if failed:
    raise Elsewhere("process 0 met an error, which it prints itself")
  return result


def meet() -> None:
  """Returns when every process has reached this point."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("r2m_jax")


def require_same(value: Any, what: str) -> None:
  """Raises HostsError unless `value`, JSON, is the same in every process."""
  if jax.process_count() == 1:
    return
  sums = multihost_utils.process_allgather(
    np.uint32(zlib.crc32(json.dumps(value, sort_keys=True).encode()))
  )
  if different := np.flatnonzero(sums != sums[0]).tolist():
    raise HostsError(f"process {', '.join(map(str, different))} and process 0 differ in {what}")


def require_shared(folder: Path, what: str = "--workdir") -> None:
  """Raises HostsError unless every process sees a file that the first process writes into
  `folder`.
  """
  if jax.process_count() == 1:
    return
  name = from_first(f".shared.{secrets.token_hex(8)}")
  on_first(lambda: (folder / name).write_text(""))
  until = time.monotonic() + PATIENCE
  while not (seen := (folder / name).exists()) and time.monotonic() < until:
    time.sleep(0.2)
  blind = np.flatnonzero(~multihost_utils.process_allgather(np.asarray(seen)).reshape(-1)).tolist()
  if first():
    (folder / name).unlink()
  if blind:
    raise HostsError(
      f"{what}={folder} is not one folder for all processes: process {', '.join(map(str, blind))} "
      "does not see what "
      "process 0 wrote there; give a folder on a disk that all hosts share, such as NFS or a "
      "mounted bucket"
    )


# ---- rows ----


def rows_of(layout: NamedSharding, rows: int) -> np.ndarray:
  """Indices of the rows of a batch of `rows` that are on this process's devices, in ascending
  order.
  """
  if jax.process_count() == 1:
    return np.arange(rows)
  parts = layout.addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def take(tree, layout: NamedSharding):
  """This process's rows of host arrays that every process has in full."""
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(lambda x: x[rows_of(layout, len(x))], tree)


def place(tree, layout: NamedSharding):
  """Puts host arrays as batches on the devices of `layout`; each process passes its own rows
  (`rows_of`), in their order.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, layout)
  shards = layout.num_devices // _copies(layout)
  held = len(rows_of(layout, shards))

  def one(x):
    rows = len(x) * shards // held
    mine = rows_of(layout, rows)

    def part(index):
      begin, end, _ = index[0].indices(rows)
      at = np.searchsorted(mine, begin)
      return x[at : at + end - begin]

    return jax.make_array_from_callback((rows, *x.shape[1:]), layout, part)

  return jax.tree.map(one, tree)


def _copies(layout: NamedSharding) -> int:
  """The number of devices that hold the same rows."""
  split = layout.spec[0] if len(layout.spec) else None
  axes = () if split is None else (split,) if isinstance(split, str) else split
  return layout.num_devices // int(np.prod([layout.mesh.shape[axis] for axis in axes], dtype=int))


def put(tree, layouts):
  """Puts host arrays that every process has in full on the devices, with the shardings
  `layouts`.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, layouts)

  def whole(x, layout):
    return jax.make_array_from_callback(np.shape(x), layout, lambda index: np.asarray(x)[index])

  return jax.tree.map(whole, tree, layouts)


def local(tree):
  """This process's rows of batches on devices, as host arrays."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def one(x):
    parts = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])

  return jax.tree.map(one, tree)


def fetch(tree):
  """Full arrays on every host. All processes must request the same arrays."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def far(x):
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)

  return jax.tree.map(
    lambda x: multihost_utils.process_allgather(x, tiled=True) if far(x) else jax.device_get(x),
    tree,
  )

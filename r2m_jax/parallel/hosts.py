"""Several processes as one program: how they find each other, share rows and values, and what ends
them.

Every process runs the same program on its own devices and holds its own rows of a batch. Only the
first one (number 0) writes, prints and reports. One process alone passes through every function
here at no cost.
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

# exit status where another process was lost, that of "resume me": the same command goes on
LOST = 75
ALONE = "none"  # config.hosts.coordinator of a process that looks for no others
PATIENCE = 20.0  # seconds that a shared disk has to show what another machine wrote
# what the runtime says of a process that is gone, and what others, such as orbax, make of it
GONE = re.compile(
  r"Gloo|[Bb]arrier|[Hh]eartbeat|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED"
)
CUT = re.compile(
  r"ncclRemote|connection (closed|reset|refused)|socket closed|broken pipe", re.I
)  # the runtime alone


class HostsError(UserError, ValueError):
  """Processes that cannot work together; the message names the setting and the fix."""


class Elsewhere(RuntimeError):
  """The first process met an error in what it does for all, and says it itself."""


# ---- beginning and end ----


def addresses(settings, environ=os.environ) -> tuple[str, int, int] | None:
  """(coordinator, processes, process) as config.hosts or the environment gives them; None:
  detected, or alone.

  Raises:
    HostsError: for a value that cannot be, named as it was given.
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
    raise HostsError(
      f"{given['processes'][1]} is {processes}: say how many processes there are in all"
    )
  if not 0 <= process < processes:
    raise HostsError(
      f"{given['process'][1]} is {process}: each of the {processes} processes has its own number "
      "from 0 to "
      f"{processes - 1}; give each its own"
    )
  return address, processes, process


@contextlib.contextmanager
def together(settings) -> Iterator[None]:
  """Joins the other processes of the run, where there are any, for the length of the block.

  In the block only the first process prints to stdout. A process that is lost ends the others with
  status `LOST` within config.hosts.heartbeat_timeout seconds, and one that ends with an error
  within config.hosts.end_timeout.

  Raises:
    HostsError: the others did not come.
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
      )  # whatever holds the others up
      late.start()
      with contextlib.suppress(
        RuntimeError
      ):  # another one left without a word: nothing more to wait for
        jax.distributed.shutdown()
      late.cancel()


def _join(settings) -> bool:
  """Starts jax.distributed where there are several processes. Touches no device before all are
  there.
  """
  if settings.coordinator == ALONE:
    return False
  given, limits = (
    addresses(settings),
    dict(
      initialization_timeout=settings.start_timeout,
      heartbeat_timeout_seconds=settings.heartbeat_timeout,
      shutdown_timeout_seconds=settings.end_timeout,
    ),
  )
  jax.config.update(
    "jax_enable_preemption_service", False
  )  # it would take SIGTERM from loop.signals_end_the_run
  try:
    if given is None:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cluster that is none
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
    "ends, because another "
    f"process was lost: {how}. Its own output says why. The same command on every host goes on "
    "from what is saved."
  )


@contextlib.contextmanager
def _last_words() -> Iterator[Callable[[str, int], None]]:
  """JAX aborts a process whose peers are gone or never come. In here such an abort says what was
  set as (words, status) with the function that this gives."""
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
  """Ends the program with status `LOST` where an error, or what caused it, is that another
  process is gone.
  """
  while error is not None and jax.process_count() > 1:
    of_runtime = isinstance(error, jax.errors.JaxRuntimeError)
    if GONE.search(str(error)) or of_runtime and CUT.search(str(error)):
      print(
        _lost(f"killed or its host gone ({' '.join(str(error).split())[:200]})"),
        file=sys.stderr,
        flush=True,
      )
      os._exit(LOST)  # not sys.exit, which would wait for the one that is gone
    error = error.__cause__ or error.__context__


# ---- values ----


def first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def any_of(flag: bool) -> bool:
  """Whether `flag` is true in any process. All must ask."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.asarray(bool(flag))).any())


def largest(number: int) -> int:
  """The largest of every process's `number`."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).max())


def total(number: int) -> int:
  """The sum of every process's `number`. All must ask."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).sum())


def from_first(value: Any) -> Any:
  """The first process's `value` in every process; JSON. The others' is not read."""
  if jax.process_count() == 1:
    return value
  data = json.dumps(value).encode() if first() else b""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = np.zeros(1 << max(size - 1, 255).bit_length(), np.uint8)  # few sizes, few programs
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  return json.loads(
    np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].astype(np.uint8).tobytes()
  )


def on_first(f: Callable[[], Any]) -> Any:
  """Runs `f` in the first process alone and gives its result, JSON, to all. An error ends them all.

  Raises:
    Elsewhere: in the others, where f raised; the first raises what f did.
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
  """Returns when every process has come here."""
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
  """Raises HostsError unless every process sees what the first one writes into `folder`."""
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
  """Numbers of the rows of a batch, of `rows` in all, that lie on this process's devices;
  ascending.
  """
  if jax.process_count() == 1:
    return np.arange(rows)
  parts = layout.addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def take(tree, layout: NamedSharding):
  """This process's rows of host arrays that every process has whole."""
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(lambda x: x[rows_of(layout, len(x))], tree)


def place(tree, layout: NamedSharding):
  """Host arrays as batches on the devices of `layout`; each process gives its own rows
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
  """How many devices hold the same rows."""
  split = layout.spec[0] if len(layout.spec) else None
  axes = () if split is None else (split,) if isinstance(split, str) else split
  return layout.num_devices // int(np.prod([layout.mesh.shape[axis] for axis in axes], dtype=int))


def put(tree, layouts):
  """Host arrays that every process has whole, laid out as `layouts` says."""
  if jax.process_count() == 1:
    return jax.device_put(tree, layouts)

  def whole(x, layout):
    return jax.make_array_from_callback(np.shape(x), layout, lambda index: np.asarray(x)[index])

  return jax.tree.map(whole, tree, layouts)


def local(tree):
  """The rows of batches on devices that lie on this process's, as host arrays."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def one(x):
    parts = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])

  return jax.tree.map(one, tree)


def fetch(tree):
  """Whole arrays on every host. All processes must ask for the same."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def far(x):
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)

  return jax.tree.map(
    lambda x: multihost_utils.process_allgather(x, tiled=True) if far(x) else jax.device_get(x),
    tree,
  )

"""Facts about the machine for measurements: the use by other processes, resident memory, and the
machine's limits.

Imports only the standard library, so that a child process can measure its memory before it loads
anything.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
QUIET = 0.1  # share of all cores that others may use while something is timed


# ---- memory ----


def status(name: str) -> int:
  """A line of /proc/self/status, in bytes: VmRSS is the present resident memory, VmHWM its peak."""
  lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
  """Resets VmHWM."""
  pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
  """Bytes at the peak: of the accelerator, counted from the start of the process, or else of this
  process's resident memory.
  """
  jax = sys.modules.get("jax")
  found = jax.local_devices()[0].memory_stats() if jax else None
  return found["peak_bytes_in_use"] if found and "peak_bytes_in_use" in found else status("VmHWM")


def set_up() -> None:
  """Sets the allocator and platform as r2m_jax.main does."""
  from r2m_jax.run import process

  process.keep_freed_memory()
  process.leave_absent_tpu_alone()


# ---- other processes ----


@dataclasses.dataclass(frozen=True)
class Ticks:
  """Seconds of processor time since the start of machine and process."""

  wall: float
  everyone: float  # all cores, including time taken by the hypervisor
  own: float  # this process and its finished children

  @classmethod
  def now(cls) -> "Ticks":
    first = pathlib.Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    used = os.times()
    own = used.user + used.system + used.children_user + used.children_system
    return cls(time.perf_counter(), busy_ticks(first) / os.sysconf("SC_CLK_TCK"), own)


def busy_ticks(line: str) -> int:
  """Busy ticks in the first line of /proc/stat: all but idle and iowait. A guest's time is already
  in user and nice.
  """
  user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
  return user + nice + system + irq + softirq + steal


def others_share(before: Ticks, after: Ticks, cores: int) -> float:
  """The share of all cores that other processes used in between, 0 to 1."""
  others = after.everyone - before.everyone - (after.own - before.own)
  return min(max(others / (cores * (after.wall - before.wall)), 0.0), 1.0)


def timed(once) -> tuple[float, float]:
  """(seconds of `once()`, share of the cores that other processes used meanwhile). `once` must wait
  for its result.
  """
  before = Ticks.now()
  once()
  after = Ticks.now()
  return after.wall - before.wall, others_share(before, after, os.cpu_count() or 1)


@dataclasses.dataclass
class Times:
  seconds: list[float] = dataclasses.field(default_factory=list)
  busy: list[float] = dataclasses.field(default_factory=list)  # share used by others, for each
  dropped: int = 0  # because others were busy
  quiet: bool = True  # False: there were too few quiet rounds, and these are the quietest

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  def __str__(self) -> str:
    return f"{self.median:9.4f}  {min(self.seconds):9.4f}  {max(self.seconds):9.4f}  {max(self.busy):6.0%}"


HEADER = f"{'median s':>9}  {'fastest':>9}  {'slowest':>9}  {'others':>6}"  # of Times


def take_turns(
  settings: dict, rounds: int, quiet: float = QUIET, most: int = 3
) -> dict[str, Times]:
  """Times the functions of `settings` one after another in rounds, so that a slow period of the
  machine affects all.

  A round in which others used more than `quiet` of the cores is dropped and repeated, up to `most`
  times as many rounds. If too few are quiet, the quietest are kept and marked.
  """
  found = []
  while len(found) < most * rounds and sum(busy <= quiet for busy, _ in found) < rounds:
    one = {name: timed(once) for name, once in settings.items()}
    found.append((max(busy for _, busy in one.values()), one))
  kept, enough = quietest([busy for busy, _ in found], rounds, quiet)
  times = {name: Times(dropped=len(found) - len(kept), quiet=enough) for name in settings}
  for i in kept:
    for name, (seconds, busy) in found[i][1].items():
      times[name].seconds.append(seconds)
      times[name].busy.append(busy)
  return times


def quietest(busy: list[float], count: int, quiet: float) -> tuple[list[int], bool]:
  """(rounds to keep, in order; whether all of them are quiet): the quiet rounds if there are
  `count`, otherwise the quietest.
  """
  kept = [i for i, share in enumerate(busy) if share <= quiet]
  if len(kept) >= count:
    return kept, True
  return sorted(sorted(range(len(busy)), key=busy.__getitem__)[:count]), False


def kernels(once) -> list[tuple[str, tuple[float, int]]]:
  """(name, (seconds, calls)) of every kernel that an accelerator runs in `once()`, the longest
  first.
  """
  import jax

  found = {}
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      once()
    path = next(pathlib.Path(folder).rglob("*.xplane.pb"))
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      for line in plane.lines if plane.name.startswith("/device:") else ():
        for event in line.events if "Stream" in line.name or line.name == "XLA Ops" else ():
          spent, calls = found.get(event.name, (0.0, 0))
          found[event.name] = spent + event.duration_ns / 1e9, calls + 1
  return sorted(found.items(), key=lambda item: -item[1][0])


# ---- limits ----


def limits() -> dict[str, float]:
  """The first device's limits through JAX: {"float32", "bfloat16": FLOP/s of a matmul, "copy":
  bytes/s}.

  The fastest of several, each long enough to keep all cores busy.
  """
  import jax
  import jax.numpy as jnp

  host = jax.devices()[0].platform == "cpu"
  size, numbers = (2048, 2**26) if host else (8192, 2**28)
  product = jax.jit(lambda a, b: a @ b)
  found = {}
  for dtype in ("float32", "bfloat16"):
    a = jax.random.normal(
      jax.random.key(0), (size, size), dtype
    )  # a GPU is faster if all numbers are equal
    found[dtype] = 2 * size**3 / fastest(lambda a=a: product(a, a).block_until_ready())
  back = jax.jit(lambda x: -x, donate_argnums=0)  # in place: no fresh pages
  x = jnp.ones(numbers, jnp.float32)

  def copy():
    nonlocal x
    x = back(x).block_until_ready()

  found["copy"] = 2 * 4 * numbers / fastest(copy)
  return found


def fastest(once, least: float = 0.5, runs: int = 5) -> float:
  """Seconds of the fastest of at least `runs` calls that take at least `least` seconds together,
  after a warm-up call.
  """
  once()
  times = []
  while len(times) < runs or sum(times) < least:
    times.append(timed(once)[0])
  return min(times)


def show_limits(found: dict[str, float]) -> str:
  return (
    f"this machine: {found['float32'] / 1e9:.0f} GFLOP/s in float32, {found['bfloat16'] / 1e9:.0f} "
    "in bfloat16, "
    f"copies at {found['copy'] / 1e9:.0f} GB/s"
  )


def instructions() -> str:
  """The widest vector instructions that XLA may use on this CPU: "AVX-512", "AVX2", "SSE4.2" or, if
  /proc/cpuinfo does not list them, "unknown instructions".
  """
  cpu = pathlib.Path("/proc/cpuinfo")
  has = set(cpu.read_text().split()) if cpu.exists() else set()
  limit = re.search(r"xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
  names = (
    ("AVX512", "avx512f", "AVX-512"),
    ("AVX2", "avx2", "AVX2"),
    ("SSE4_2", "sse4_2", "SSE4.2"),
  )
  allowed = [name for name, _, _ in names]
  first = allowed.index(limit[1]) if limit and limit[1] in allowed else 0
  return next((shown for _, flag, shown in names[first:] if flag in has), "unknown instructions")


# ---- children and verdicts ----


def child(module: str, *args: str, env: dict[str, str] | None = None) -> dict:
  """Runs a benchmark in a separate process and returns its last line, as JSON. Ends this process if
  that one failed.
  """
  command = [sys.executable, "-m", module, *args]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | (env or {})
  )
  if not done.stdout.strip():
    sys.exit(f"{' '.join(command)} ended with status {done.returncode}\n{done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def plans(config: str, *settings: str) -> list[dict]:
  """The plan.json of task=plan for a config file and `settings`, FIELD=VALUE each; the run need not
  fit. Ends this process if the plan failed. Its output goes to standard error.
  """
  with tempfile.TemporaryDirectory() as workdir:
    command = [
      sys.executable,
      "-m",
      "r2m_jax.main",
      f"--config={config}",
      f"--workdir={workdir}",
      "--config.task=plan",
      *(f"--config.{setting}" for setting in settings),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    found = pathlib.Path(workdir) / "plan.json"
    if not found.exists():
      sys.exit(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(found.read_text(encoding="utf-8"))


def conclude(result: dict, bounds: list[tuple[str, bool]], quiet: bool = True) -> None:
  """Prints whether each target is met, and the result as the last line. Exits with status 1 if a
  target is missed, and with 2 if others were too busy for a verdict.
  """
  for sentence, held in bounds:
    print(f"{'met' if held else 'MISSED'}: {sentence}")
  if not quiet:
    print(f"VOID: others used more than {QUIET:.0%} of the cores; run it again on a quiet machine")
  print(json.dumps(result), flush=True)
  sys.exit(2 if not quiet else int(not all(held for _, held in bounds)))


# ---- exponents ----


def exponent(sizes: list[float], values: list[float]) -> tuple[float, float]:
  """Least squares of log value over log size: (exponent, half-width of its 95% interval)."""
  x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
  mean_x = statistics.fmean(x)
  mean_y = statistics.fmean(y)
  n = len(x)
  spread = sum((a - mean_x) ** 2 for a in x)
  slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
  left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
  return slope, student(n - 2) * math.sqrt(left / (n - 2) / spread) if n > 2 else math.inf


def student(freedom: int) -> float:
  """The 97.5% point of Student's t, from a table for few degrees of freedom, otherwise the
  normal's.
  """
  table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
  return table[freedom - 1] if freedom <= len(table) else 1.96

"""What a measurement must know of the machine: how busy the others are, resident memory, and the
most that it can do.

Only the standard library at import: a child process may look at its memory before it loads
anything.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
QUIET = 0.1  # share of all cores that others may use while something is timed


# ---- memory ----


def status(name: str) -> int:
  """A line of /proc/self/status, in bytes: VmRSS is what is resident now, VmHWM the most that
  ever was.
  """
  lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
  """VmHWM begins anew."""
  pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
  """Bytes at the peak: of the accelerator, which counts from the start of the process, else
  resident in this one.
  """
  jax = sys.modules.get("jax")
  found = jax.local_devices()[0].memory_stats() if jax else None
  return found["peak_bytes_in_use"] if found and "peak_bytes_in_use" in found else status("VmHWM")


def set_up() -> None:
  """Allocator and platform as r2m_jax.main has them."""
  from r2m_jax.run import process

  process.keep_freed_memory()
  process.leave_absent_tpu_alone()


# ---- who else is at work ----


@dataclasses.dataclass(frozen=True)
class Ticks:
  """Seconds of processor time since the start of machine and process."""

  wall: float
  everyone: float  # all cores, what the hypervisor took away included
  own: float  # this process and its children that have ended

  @classmethod
  def now(cls) -> "Ticks":
    first = pathlib.Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    used = os.times()
    own = used.user + used.system + used.children_user + used.children_system
    return cls(time.perf_counter(), busy_ticks(first) / os.sysconf("SC_CLK_TCK"), own)


def busy_ticks(line: str) -> int:
  """Of the first line of /proc/stat: all but idle and iowait; a guest's time is in user and nice
  already.
  """
  user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
  return user + nice + system + irq + softirq + steal


def others_share(before: Ticks, after: Ticks, cores: int) -> float:
  """Share of all cores that other processes used in between, 0 to 1."""
  others = after.everyone - before.everyone - (after.own - before.own)
  return min(max(others / (cores * (after.wall - before.wall)), 0.0), 1.0)


def timed(once) -> tuple[float, float]:
  """(seconds that `once()` took, share of the cores that others had meanwhile). `once` waits for
  its result.
  """
  before = Ticks.now()
  once()
  after = Ticks.now()
  return after.wall - before.wall, others_share(before, after, os.cpu_count() or 1)


@dataclasses.dataclass
class Times:
  seconds: list[float] = dataclasses.field(default_factory=list)
  busy: list[float] = dataclasses.field(default_factory=list)  # share of the others, of each
  dropped: int = 0  # since others were busy
  quiet: bool = True  # False: there were too few quiet ones, and these are the quietest

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  def __str__(self) -> str:
    return f"{self.median:9.4f}  {min(self.seconds):9.4f}  {max(self.seconds):9.4f}  {max(self.busy):6.0%}"


HEADER = f"{'median s':>9}  {'fastest':>9}  {'slowest':>9}  {'others':>6}"  # of Times


def take_turns(
  settings: dict, rounds: int, quiet: float = QUIET, most: int = 3
) -> dict[str, Times]:
  """Times the functions of `settings` one after another in rounds, so that a slow spell of the
  machine falls on all.

  A round in which others used more than `quiet` of the cores is dropped whole, and made up for, up
  to `most` times as many rounds; where too few are quiet, the quietest are kept, and marked.
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
  """(which to keep, in order; whether all of them are quiet): the quiet ones if they are
  `count`, else the quietest.
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
  """What the first device can do through JAX: {"float32", "bfloat16": FLOP/s of a matrix product,
  "copy": bytes/s}.

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
    )  # a GPU is faster on numbers that are all alike
    found[dtype] = 2 * size**3 / fastest(lambda a=a: product(a, a).block_until_ready())
  back = jax.jit(lambda x: -x, donate_argnums=0)  # in place: no fresh pages
  x = jnp.ones(numbers, jnp.float32)

  def copy():
    nonlocal x
    x = back(x).block_until_ready()

  found["copy"] = 2 * 4 * numbers / fastest(copy)
  return found


def fastest(once, least: float = 0.5, runs: int = 5) -> float:
  """Seconds of the fastest of at least `runs` calls that last `least` seconds together, after
  one to warm up.
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


# ---- children and verdicts ----


def child(module: str, *args: str, env: dict[str, str] | None = None) -> dict:
  """The last line of a benchmark run in a process of its own, as JSON; ends this one where that
  failed.
  """
  command = [sys.executable, "-m", module, *args]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | (env or {})
  )
  if not done.stdout.strip():
    sys.exit(f"{' '.join(command)} ended with status {done.returncode}\n{done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def plans(config: str, *settings: str) -> list[dict]:
  """What task=plan writes for a config's file and `settings`, FIELD=VALUE each; it need not fit.
  Ends this process where it failed. What it prints goes to standard error."""
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
  """Prints what each bound says and the result as the last line. Status 1 where one is missed, 2
  where others were too busy to say."""
  for sentence, held in bounds:
    print(f"{'held' if held else 'MISSED'}: {sentence}")
  if not quiet:
    print(f"VOID: others used more than {QUIET:.0%} of the cores; run it again on a quiet machine")
  print(json.dumps(result), flush=True)
  sys.exit(2 if not quiet else int(not all(held for _, held in bounds)))


# ---- exponents ----


def exponent(sizes: list[float], values: list[float]) -> tuple[float, float]:
  """Least squares of log value over log size: (exponent, half-width of its 95% interval)."""
  x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
  mean_x, mean_y, n = statistics.fmean(x), statistics.fmean(y), len(x)
  spread = sum((a - mean_x) ** 2 for a in x)
  slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
  left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
  return slope, student(n - 2) * math.sqrt(left / (n - 2) / spread) if n > 2 else math.inf


def student(freedom: int) -> float:
  """The 97.5% point of Student's t, for few degrees of freedom as a table, else the normal's."""
  table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
  return table[freedom - 1] if freedom <= len(table) else 1.96

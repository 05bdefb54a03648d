"""The targets of r2m_jax relative to other libraries, and the verdict on a run's numbers."""

import dataclasses
import statistics

from benchmarks import machine, peer_task


@dataclasses.dataclass(frozen=True)
class Peer:
  """A peer's environment, and the targets for our speed-up: its seconds divided by ours."""

  child: str  # module that runs in its environment
  requirements: tuple[str, ...]
  bound: dict[str, tuple[float, float]]  # by size: with AVX-512, without


PEERS = {
  "trl": Peer(
    "benchmarks.peer_trl",
    ("trl==1.16.0", "torch==2.13.0", "transformers==5.24.0"),  # this torch has a build without CUDA
    {"tiny": (2.6, 2.2), "small": (3.5, 2.8)},
  ),
  "tunix": Peer(
    "benchmarks.peer_tunix",
    ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"),
    {"tiny": (3.3, 3.0), "small": (3.5, 2.8)},
  ),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """The measurements of one process, or of several together."""

  version: str
  seconds: list[float]  # seconds of each step: a rollout of 64 trajectories with all its updates
  busy: list[float]  # share of the cores that others used during each
  peak: int  # bytes resident

  @classmethod
  def of(cls, results: list[dict]) -> "Run":
    """The run from the JSON lines of one program's processes."""
    joined = {name: [x for result in results for x in result[name]] for name in ("seconds", "busy")}
    return cls(
      results[0].get("version", ""), **joined, peak=max(result["peak"] for result in results)
    )

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  @property
  def quiet(self) -> bool:
    return max(self.busy) <= machine.QUIET

  def __str__(self) -> str:
    spread = f"{self.median:9.3f}  {min(self.seconds):9.3f}  {max(self.seconds):9.3f}"
    return f"{spread}  {len(self.seconds):5}  {max(self.busy):6.0%}  {self.peak / 1e9:7.2f}"


# of a Run
HEADER = (
  f"{'median s':>9}  {'fastest':>9}  {'slowest':>9}  {'steps':>5}  {'others':>6}  {'peak GB':>7}"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  ratio: float  # the peer's seconds divided by ours
  asked: float
  void: str  # why the ratio is void, or ""
  memory: bool  # our peak is no higher

  @property
  def held(self) -> bool:
    return self.ratio >= self.asked


def judge(size: str, ours: Run, peer: Peer, its: Run, wide: bool) -> Verdict:
  """The verdict on both runs of one sitting. It is void only if the machine was not quiet: a ratio
  counts on any machine.

  wide: whether the processor has AVX-512 and XLA may use it.
  """
  reasons = [
    f"others used up to {max(run.busy):.0%} of the cores during {name} steps"
    for name, run in (("its", its), ("our", ours))
    if not run.quiet
  ]
  asked = peer.bound[size][0 if wide else 1]
  return Verdict(its.median / ours.median, asked, "; ".join(reasons), ours.peak <= its.peak)


def status(verdicts: list[Verdict]) -> int:
  """Exit status: 2 if a ratio is void, 1 if a target is missed, otherwise 0."""
  if any(verdict.void for verdict in verdicts):
    return 2
  return int(not all(verdict.held and verdict.memory for verdict in verdicts))


def floor_flops(size: str) -> float:
  """FLOPs of every matmul of a peer's step, each counted once: each prompt K times, without
  attention's own matmuls.

  They are a generation, two log-prob passes (old and reference), the reward model's pass, and the
  equivalent of 3 passes per epoch. All but the reward model project the response tokens onto the
  vocabulary.
  """
  shape, task = peer_task.SIZES[size], peer_task
  hidden, kv = shape["hidden_size"], shape["hidden_size"] // shape["heads"] * shape["kv_heads"]
  layer = 2 * hidden * (hidden + kv) + 3 * hidden * shape["intermediate_size"]
  layers = 2 * shape["layers"] * layer * task.ROWS * (task.LENGTH + task.RESPONSE)
  head = 2 * hidden * shape["vocab_size"] * task.ROWS * task.RESPONSE
  return (3 + 3 * task.EPOCHS) * (layers + head) + layers

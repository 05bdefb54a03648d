"""The cost of a step or an update: learning rates, seconds of each phase, tokens a second, padding,
memory, and model FLOPs utilisation.

Everything is computed on the host from the step's normal outputs. docs/metrics.md defines every
scalar. `metrics.CLOCKED` lists those that depend on the clock or the machine.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from r2m_jax.algorithm.schedules import learning_rate
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.models.generate import decoded_places
from r2m_jax.parallel import hosts, sharding
from r2m_jax.parallel.chips import GIB, peak_flops
from r2m_jax.step import StepOutput
from r2m_jax.types import Sequences, TrainState

# ---- seconds of each phase ----

_seconds: dict[str, float] = {}  # of each phase since the last row


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
  """Adds the seconds spent inside this context to `seconds/NAME` of the next row, and names them in
  a profile.
  """
  began = time.perf_counter()
  try:
    with jax.profiler.TraceAnnotation(name):
      yield
  finally:
    _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - began


def take_seconds() -> dict[str, float]:
  """`seconds/NAME` of every phase since the last call, in seconds."""
  taken = {f"seconds/{name}": seconds for name, seconds in _seconds.items()}
  _seconds.clear()
  return taken


@contextlib.contextmanager
def profiled(window: tuple[int, ...], folder: Path) -> Iterator[Callable[[int], None]]:
  """Yields `at(step)`, which must be called before each step. It traces the steps of the window to
  `folder`.

  Args:
    window: (first step, number of steps), or () for no trace. If a window begins before the first
      step of this start, its remaining steps are traced.
  """
  tracing = False

  def stop():
    nonlocal tracing
    if tracing:
      tracing = False
      jax.profiler.stop_trace()
      print(f"profile  {folder}: open it with xprof or TensorBoard's profile plugin")

  def at(step: int):
    nonlocal tracing
    wanted = bool(window) and window[0] <= step < sum(window)
    if wanted and not tracing:
      jax.profiler.start_trace(str(folder))
      tracing = True
    elif not wanted:
      stop()

  try:
    yield at
  finally:
    stop()


# ---- learning rates ----


def rate_table(settings, updates: int) -> np.ndarray:
  """The learning rate of every update of a section's optimizer.   -> f64[updates]"""
  schedule = learning_rate(settings.lr_schedule, settings.lr, updates, settings.warmup_steps)
  rates = jax.jit(schedule)(np.arange(updates))
  return np.broadcast_to(np.asarray(rates, np.float64), (updates,))


def last_rate(table: np.ndarray, opt) -> float:
  """The learning rate of the last update, or of the first one if there was none yet.

  Skipped updates do not advance the schedule, so the optimizer's own count is used.
  """
  return float(table[np.clip(int(opt.count) - 1, 0, len(table) - 1)])


# ---- memory ----


def peak_memory() -> dict[str, float]:
  """`memory/device_peak`: the largest peak of this process's devices, in GiB, if they report it.

  Otherwise `memory/process_peak`: the peak resident memory of this process, in GiB.
  """
  found = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
  if peaks:
    return {"memory/device_peak": max(peaks) / GIB}
  unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {"memory/process_peak": resident / GIB}


# ---- tokens and FLOPs of an RL step ----


class Cost:
  """The cost of an RL step as scalars, from its output on the host."""

  def __init__(self, config, state: TrainState):
    """state: any state of the run; only its shapes are read."""
    _seconds.clear()  # earlier seconds belong to no step
    updates = config.steps * config.ppo.epochs * config.ppo.minibatches
    self.config = config
    self.rates = {"policy": rate_table(config.policy, updates)}
    if VARIANTS[config.variant].trained:
      self.rates["reward"] = rate_table(config.r2m, config.steps)
    if state.critic_opt is not None:
      self.rates["critic"] = rate_table(config.critic, updates)
    peak = config.log.peak_flops or peak_flops(jax.devices()[0].device_kind)
    self.peak = peak * len(state.step.sharding.device_set)
    self.policy = matrices(state.ref)
    has_reward = state.reward_backbone is not None  # otherwise rewards come from outside
    self.reward = matrices(state.reward_backbone) if has_reward else (0, 0)
    self.critic = (0, 0) if state.critic is None else matrices(state.critic["backbone"])

  def __call__(self, state: TrainState, out: StepOutput, seconds: dict[str, float]) -> dict:
    """The scalars of a step that ended in `state` and took `seconds` (`take_seconds`)."""
    tokens, sampled = count_tokens(out.sequences)
    took = seconds["seconds/step"]
    opts = dict(policy=state.policy_opt, reward=state.reward_opt, critic=state.critic_opt)
    found = {f"lr/{name}": last_rate(table, opts[name]) for name, table in self.rates.items()}
    found |= shares_real(self.config.rollout, out)
    found |= {"speed/generated_tokens": sampled / took, "speed/tokens": tokens / took}
    if self.peak:
      found["speed/mfu"] = self.flops(tokens, sampled) / took / self.peak
    return {**found, "seconds/save": 0.0, "seconds/eval": 0.0, **seconds, **peak_memory()}

  def flops(self, tokens: int, sampled: int) -> float:
    """Model FLOPs of a step: matmuls with weights on real tokens, without recomputation.

    A multiply-add is two FLOPs. A forward pass has 2 FLOPs per weight and token, a backward pass 4,
    or 2 if only adapters are trained. Attention's matmuls of queries and keys, and the reward head,
    are not counted.

    Args:
      tokens: number of tokens in the prompts and responses of all rows.
      sampled: number of response tokens among them; only they have logits.
    """
    config, (layers, head) = self.config, self.policy
    prompts = (tokens - sampled) / config.rollout.group_size  # computed once for all responses
    rollout = 2 * (layers * (prompts + sampled) + head * sampled)
    forward = 2 * (layers * tokens + head * sampled)
    backward = forward if config.lora.rank else 2 * forward
    policy = 2 * forward + config.ppo.epochs * (forward + backward)  # old and reference, updates
    critic = 2 * self.critic[0] * tokens * (1 + 3 * config.ppo.epochs)
    return rollout + policy + 2 * self.reward[0] * tokens + critic


def matrices(model) -> tuple[int, int]:
  """Number of elements in the weight matrices of a Transformer's layers, and in the matrix that
  computes logits.

  The latter is the embedding if there is no separate head; for a model without logits it is not
  used.
  """
  sizes = {
    sharding.path_name(path): x.size for path, x in jax.tree_util.tree_flatten_with_path(model)[0]
  }
  layers = sum(n for name, n in sizes.items() if name.startswith("layers") and "kernel" in name)
  return layers, sizes.get("lm_head/kernel", sizes["embed/embedding"])


def count_tokens(sequences: Sequences) -> tuple[int, int]:
  """Numbers of real tokens of all rows, and of the sampled ones among them."""
  return int(sequences.token_mask.sum()), int(sequences.response_mask.sum())


def shares_real(rollout, out: StepOutput) -> dict[str, float]:
  """The shares of the computed positions that hold a real token.

  `real/rollout`: share of the decoded positions, see `decoded_places`, with all rows on one device.
  `real/learn`: share of the positions that the policy's passes compute, with a prompt counted once
  for its responses.

  Args:
    rollout: config.rollout.
  """
  sequences, K = out.sequences, rollout.group_size
  lengths, width = sequences.response_mask.sum(-1), sequences.response_mask.shape[1]
  prompts = sequences.token_mask[::K, :-width]
  computed = float(out.metrics.get("learn/computed", 1.0)) * (prompts.size + lengths.size * width)
  return {
    "real/rollout": float(lengths.sum() / decoded_places(lengths, width, rollout.halvings)),
    "real/learn": float((prompts.sum() + lengths.sum()) / computed),
  }


# ---- fits ----


class FitCost:
  """The cost of a fit's updates between two logged rows, as scalars."""

  def __init__(self, settings=None, updates: int = 0):
    """settings: the config section of the fit's optimizer, for `updates` updates; None: its
    learning rate is not known.
    """
    self.rates = None if settings is None else rate_table(settings, updates)
    self.since = time.perf_counter()
    self.updates = self.tokens = self.positions = 0

  def count(self, batch: dict) -> None:
    """Adds an update's batch: this process's rows, as host arrays."""
    masks = [batch[name] for name in batch if name.endswith("mask") and name != "response_mask"]
    self.updates += 1
    self.tokens += sum(int(mask.sum()) for mask in masks)
    self.positions += sum(mask.size for mask in masks)

  def take(self, opt) -> dict[str, float]:
    """The scalars since the last call. All processes must call it; `opt` is the optimizer's
    state.
    """
    now, tokens = time.perf_counter(), hosts.total(self.tokens)
    took, positions = now - self.since, hosts.total(self.positions)
    found = {"seconds/update": took / self.updates, **peak_memory()}
    if positions:  # a batch without tokens has no masks
      found |= {"speed/tokens": tokens / took, "real/learn": tokens / positions}
    if self.rates is not None:
      found["lr"] = last_rate(self.rates, opt)
    self.since = now
    self.updates = 0
    self.tokens = 0
    self.positions = 0
    return found

"""A small run for tests: a random policy, reference and reward model on prompts of the gold-reward
task.
"""

import contextlib
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from r2m_jax.goldtask import task as goldtask
from r2m_jax.parallel import sharding
from r2m_jax.run import build
from r2m_jax.run.workdir import LAYOUT
from r2m_jax.step import make_step
from r2m_jax.types import Prompts, Sequences

FLOAT64 = dict(dtype="float64", param_dtype="float64")  # under jax.enable_x64(True)
FLOAT32 = dict(dtype="float32", param_dtype="float32")


def config(**overrides):
  """The smallest quickstart with `section__field=value` overrides."""
  result = quickstart.get_config("test")
  result.variant = "r2m"
  result.rollout.max_new_tokens = 8
  result.policy.arch.update(activation="silu", gated_mlp=True, num_kv_heads=2)
  for name, value in overrides.items():
    result.update_from_flattened_dict({name.replace("__", "."): value})
  return result


def perturb(tree, seed: int, size: float = 0.1):
  """Adds Gaussian noise to every leaf, on the host, so that parameters have no special initial
  values.
  """
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (np.asarray(x) + size * rng.standard_normal(x.shape)).astype(x.dtype), tree
  )


@functools.cache
def models(arch: str, param_dtype: str, ensemble: int):
  """(policy, reward model) on the host: random, different from each other, with a non-zero score
  head.
  """
  cfg = config(param_dtype=param_dtype, reward__ensemble=ensemble)
  cfg.policy.arch.update(json.loads(arch))
  built = build.build(cfg, sharding.make_mesh((1, 1, 1)), vocab_size=goldtask.VOCAB_SIZE)
  policy = perturb(build.init_policy(cfg, built, jax.random.key(1)), 1)
  return policy, perturb(build.init_reward_model(cfg, built, policy, jax.random.key(2)), 2)


def start(cfg, mesh=(1, 1, 1), ref_noise=0.0):
  """(built, state) of a run's first step. In float64 it has the numbers of the float32 state."""
  built = build.build(cfg, sharding.make_mesh(mesh), vocab_size=goldtask.VOCAB_SIZE)
  if cfg.param_dtype == "float64":
    low = cfg.copy_and_resolve_references()
    low.update(FLOAT32)
    with jax.enable_x64(False):  # random numbers in float64 would differ
      _, state = start(low, mesh, ref_noise)
    beta = jax.device_put(np.float64(cfg.kl.beta), state.beta.sharding)  # a setting: not rounded
    return built, widened(state).replace(beta=beta)
  policy, reward = models(cfg.policy.arch.to_json(), cfg.param_dtype, cfg.reward.ensemble)
  state = build.initial_state(cfg, built, policy, reward["backbone"], reward["phi"])
  if ref_noise:
    ref = jax.device_put(
      perturb(state.ref, 3, ref_noise), jax.tree.map(lambda x: x.sharding, state.ref)
    )
    state = state.replace(ref=ref)
  return built, state


def widened(tree):
  """Converts float32 arrays to float64, on their devices. Others are unchanged."""

  def wide(x):
    return jax.device_put(np.asarray(x, np.float64), x.sharding) if x.dtype == jnp.float32 else x

  return jax.tree.map(wide, tree)


def rounded(tree):
  """Float64 numbers changed by half a unit in the last place of float32, up or down at random."""
  rng = np.random.default_rng(0)

  def move(x):
    return jax.device_put(np.asarray(x) * (1 + rng.choice([-1, 1], x.shape) * 2.0**-24), x.sharding)

  return jax.tree.map(move, tree)


def documented_metrics() -> dict[str, bool]:
  """{key in the tables of docs/metrics.md: whether it is marked as depending on the clock}."""
  page = pathlib.Path(__file__).parents[2] / "docs/metrics.md"
  found = {}
  for line in page.read_text(encoding="utf-8").splitlines():
    if line.startswith("| `"):
      first = line.split(" | ")[0]
      found |= {name: first.endswith("*") for name in re.findall(r"`([^`]+)`", first)}
  return found


def step_of(cfg, built, state, labeller=None):
  layout = sharding.shardings(state, built.mesh)
  return make_step(built.defs, cfg, built.mesh, (goldtask.EOS,), goldtask.PAD, layout, labeller)


def prompts(cfg, t, left_pad=0):
  batch = goldtask.prompts(cfg.seed, 1, t, cfg.rollout.prompts)
  if left_pad:
    pad = np.full((cfg.rollout.prompts, left_pad), goldtask.PAD, np.int32)
    batch = batch.replace(
      tokens=np.concatenate([pad, batch.tokens], 1),
      mask=np.concatenate([pad.astype(bool), batch.mask], 1),
    )
  return batch


def run(cfg, steps, mesh=(1, 1, 1)):
  """[StepOutput on the host] of `steps` steps, and the last state."""
  built, state = start(cfg, mesh)
  step, outputs = step_of(cfg, built, state), []
  for t in range(steps):
    state, out = step(state, prompts(cfg, t))
    outputs.append(jax.device_get(out))
  return outputs, state


def same_tokens(outputs, others):
  for t, (a, b) in enumerate(zip(outputs, others, strict=True)):
    np.testing.assert_array_equal(
      a.sequences.tokens, b.sequences.tokens, err_msg=f"tokens of step {t}"
    )


def metrics_of(outputs) -> dict[str, np.ndarray]:
  """Each metric at every step, under the name "metric ..."; all are finite."""
  columns = {name: [out.metrics[name] for out in outputs] for name in outputs[0].metrics}
  found = {f"metric {name}": np.array(column, np.float64) for name, column in columns.items()}
  assert all(np.isfinite(x).all() for x in found.values()), found
  return found


def equal_in_float64(found, exact, rtol=1e-10):
  """Compares two orders of one computation, {name: array}: each array is within `rtol` of its norm.

  An array that is zero in exact arithmetic, or a metric, which may be a sum of numbers near one
  that cancel, is within `rtol` of the size from `scales`.
  """
  within(found, exact, {name: rtol * size for name, size in scales(exact).items()})


def as_good_in_float32(found, low, exact, times=8, floor=8):
  """`found` is as near to float64 as `low`, another order of the same computation in float32, is,
  {name: array} each.

  The order of sums and the exponential depend on the processor. The bound is therefore `times` the
  distance of `low` from `exact` on this processor. That distance may be small by chance, so it is
  at least `floor` eps of the size.
  """
  eps = np.finfo(np.float32).eps

  def far(name, size):
    return max(np.linalg.norm(low[name] - exact[name]), floor * eps * size)

  within(found, exact, {name: times * far(name, size) for name, size in scales(exact).items()})


def scales(exact) -> dict[str, float]:
  """The size of the terms that each array is a sum of: its norm, and at least 1 for an entry of a
  metric.

  An array that is zero in exact arithmetic, such as the gradient of a bias that shifts all scores
  alike, has the size of the largest array with the same beginning of the name.
  """
  sizes = {name: float(np.linalg.norm(x)) for name, x in exact.items()}
  largest = {}
  for name, size in sizes.items():
    family = name.split("/")[0]
    largest[family] = max(size, largest.get(family, 0.0))

  def scale(name):
    if name.startswith("metric "):
      return max(sizes[name], np.sqrt(np.size(exact[name])))
    return (
      sizes[name]
      if sizes[name] > 1e-10 * largest[name.split("/")[0]]
      else largest[name.split("/")[0]]
    )

  return {name: scale(name) for name in exact}


def within(found, exact, bounds):
  """Checks that every array of `found` is within its bound of that in `exact`, by the norm of the
  difference.
  """
  assert set(found) == set(exact)
  shares = {
    name: np.linalg.norm(found[name] - exact[name]) / bound
    for name, bound in bounds.items()
    if bound
  }
  worst = max(shares, key=shares.get)
  print(f"largest difference {shares[worst]:.2f} of its bound: {worst}")
  assert shares[worst] <= 1, {name: share for name, share in shares.items() if share > 1}
  assert all(
    np.array_equal(found[name], exact[name]) for name, bound in bounds.items() if not bound
  )


def interrupt(monkeypatch, module, calls, run):
  """Calls `run()` and interrupts it with a Ctrl-C at call number `calls` of module.gold_metrics.
  Patches are removed.
  """
  made, original = [], module.gold_metrics

  def dies(*of):
    made.append(1)
    if len(made) == calls:
      raise KeyboardInterrupt
    return original(*of)

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(module, "gold_metrics", dies)
    run()


def unlisted(folder):
  """Names in a workdir that are not in LAYOUT."""
  names = [re.escape(entry.name) for entry in LAYOUT]
  pattern = re.compile("|".join(re.sub(r"<\w+>", ".+", name) for name in names))
  found = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
  return [name for name in found if not pattern.fullmatch(name)]


def sequences_of(prompts: Prompts, responses, length, ended):
  """Sequences from lists of tokens (including the ending token if `ended`), with random tokens as
  padding.
  """
  rng = np.random.default_rng(9)
  tokens = rng.integers(0, 64, (len(responses), length)).astype(np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, response in enumerate(responses):
    tokens[row, : len(response)], mask[row, : len(response)] = response, True
  return Sequences(
    tokens=np.concatenate([prompts.tokens, tokens], 1),
    token_mask=np.concatenate([prompts.mask, mask], 1),
    response_mask=mask,
    has_eos=np.array(ended, bool),
  )


@contextlib.contextmanager
def compiled_programs():
  """Within it, the list that is given grows by the name of every program that JAX lowers to compile
  it. A program that is called again is not lowered again.
  """
  names = []

  def listen(event, start, end, fun_name="", **_):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
      names.append(fun_name)

  jax.monitoring.register_event_time_span_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_time_span_listener(listen)


@contextlib.contextmanager
def recorded_steps(module, maker: str):
  """Within it, the list that is given grows by (StepOutput on the host, what the step returned with
  it) for every step of a run from folders that `module.maker` builds.
  """
  seen, original = [], getattr(module, maker)

  def recording(*args):
    step = original(*args)

    def call(state, prompts, texts):
      state, out, more = step(state, prompts, texts)
      seen.append((jax.device_get(out), more))
      return state, out, more

    return call

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, maker, recording)
    yield seen

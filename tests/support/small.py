"""A small run for tests: random policy, reference and reward model on the gold-reward task's
prompts.
"""

import functools
import json
import re

import jax
import numpy as np
import pytest

from configs import quickstart
from r2m_jax.goldtask import task as goldtask
from r2m_jax.parallel import sharding
from r2m_jax.run import build
from r2m_jax.run.workdir import LAYOUT
from r2m_jax.step import make_step


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
  """Adds Gaussian noise to every leaf, so that a fresh initialisation is no special point. On
  the host.
  """
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (np.asarray(x) + size * rng.standard_normal(x.shape)).astype(x.dtype), tree
  )


@functools.cache
def models(arch: str, param_dtype: str, ensemble: int):
  """(policy, reward model) on the host: random, unlike each other, with a score head that is not
  zero.
  """
  cfg = config(param_dtype=param_dtype, reward__ensemble=ensemble)
  cfg.policy.arch.update(json.loads(arch))
  built = build.build(cfg, sharding.make_mesh((1, 1, 1)), vocab_size=goldtask.VOCAB_SIZE)
  policy = perturb(build.init_policy(cfg, built, jax.random.key(1)), 1)
  return policy, perturb(build.init_reward_model(cfg, built, policy, jax.random.key(2)), 2)


def start(cfg, mesh=(1, 1, 1), ref_noise=0.0):
  """(built, state) of a run's first step."""
  built = build.build(cfg, sharding.make_mesh(mesh), vocab_size=goldtask.VOCAB_SIZE)
  policy, reward = models(cfg.policy.arch.to_json(), cfg.param_dtype, cfg.reward.ensemble)
  state = build.initial_state(cfg, built, policy, reward["backbone"], reward["phi"])
  if ref_noise:
    ref = jax.device_put(
      perturb(state.ref, 3, ref_noise), jax.tree.map(lambda x: x.sharding, state.ref)
    )
    state = state.replace(ref=ref)
  return built, state


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


def interrupt(monkeypatch, module, calls, run):
  """`run()` until the `calls`th call of module.gold_metrics, which a Ctrl-C interrupts; nothing
  stays patched.
  """
  made, original = [], module.gold_metrics

  def dies(out, group_size):
    made.append(1)
    if len(made) == calls:
      raise KeyboardInterrupt
    return original(out, group_size)

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(module, "gold_metrics", dies)
    run()


def unlisted(folder):
  """Names in a workdir that LAYOUT does not have."""
  names = [re.escape(entry.name) for entry in LAYOUT]
  pattern = re.compile("|".join(re.sub(r"<\w+>", ".+", name) for name in names))
  found = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
  return [name for name in found if not pattern.fullmatch(name)]

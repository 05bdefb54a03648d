"""The work behind the figures of speed: random models of a given size, random prompts, the
library's own step.

*tiny* and *small* are the sizes of the peers' reference figures: Qwen2 architecture, policy,
reference and reward model of one shape, float32, 8 prompts x K = 8, prompt of 64 tokens without
padding, 64 new tokens, temperature 0.7, RLOO, 2 epochs of one minibatch, k1 of the reference in the
reward as in TRL's. *0.5b* and *3b* are for one GPU, in bfloat16: 32 prompts x 8, 512 new tokens,
the latter with a reward model of an 8B Llama's shape. No row ends before its last token, because
the only end token is outside the vocabulary. Weights are random, and so is every score.
"""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from r2m_jax.algorithm.annotate import make_annotate
from r2m_jax.algorithm.read import make_read
from r2m_jax.config import check_config
from r2m_jax.configs import default
from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.parallel import sharding
from r2m_jax.plan.sizes import ARCHS, Sizes
from r2m_jax.plan.work import (
  Layout,
  blocks_flops,
  layer_weights,
  logits_flops,
  phases_of,
  vocabulary,
)
from r2m_jax.run import build
from r2m_jax.step import make_learn, make_rollout, make_step
from r2m_jax.types import Prompts, Rollout

SIZE = flags.DEFINE_string("size", "tiny", "tiny, small, 0.5b or 3b")
SETTING = flags.DEFINE_list(
  "setting", [], "config.FIELD=VALUE, without the `config.`, separated by commas"
)

QWEN2 = functools.partial(ArchConfig, family="qwen2", qkv_bias=True, rope_theta=1e6)
POLICIES = {
  "tiny": QWEN2(
    vocab_size=512,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=512,
  ),
  "small": QWEN2(
    vocab_size=32000,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    intermediate_size=2048,
  ),
  "0.5b": ARCHS["qwen2.5-0.5b"],
  "3b": ARCHS["qwen2.5-3b"],
}
# the reward model reads the same tokens, so its vocabulary is the policy's
REWARDS = POLICIES | {"3b": ARCHS["llama3.1-8b"].replace(vocab_size=POLICIES["3b"].vocab_size)}
# targets: the learning phase's share of the matmul rate, decoding's share of its limit, R2M's
# additional cost
BOUNDS = {
  "small": dict(learn=0.6, decode=0.5, r2m=0.03),
  "0.5b": dict(learn=0.45, decode=0.5, r2m=0.03),
}
BOUNDS["3b"] = BOUNDS["0.5b"]


def get_config(size: str, variant: str = "vanilla", settings: list[str] = ()):
  """The config of a size's step; `settings` in the form of the flag --setting."""
  config = default.get_config()
  config.variant, config.policy.lr = variant, 1e-6
  config.rollout.prompts = 8
  config.rollout.group_size = 8
  config.rollout.max_new_tokens = 64
  config.rollout.temperature, config.plan.prompt_length = 0.7, 64
  config.ppo.epochs, config.ppo.minibatches = 2, 1
  config.kl.placement = "reward"
  config.kl.estimator = "k1"
  config.kl.beta = 0.05
  config.r2m.attention_dim = POLICIES[size].hidden_size
  if size in ("0.5b", "3b"):
    config.dtype = config.param_dtype = config.policy.moment_dtype = "bfloat16"
    config.rollout.prompts, config.rollout.max_new_tokens = 32, 512
    config.ppo.accumulation = 8 if size == "0.5b" else 16
  change(config, settings)
  check_config(config)
  return config


def change(config, settings: list[str]) -> None:
  """Sets FIELD=VALUE in the config; the value is JSON if the field is not a string."""
  for setting in settings:
    field, value = setting.split("=", 1)
    old = functools.reduce(lambda section, name: section[name], field.split("."), config)
    config.update_from_flattened_dict(
      {field: value if isinstance(old, str) else type(old)(json.loads(value))}
    )


def sizes_of(config, arch: ArchConfig, reward_arch: ArchConfig) -> Sizes:
  prompts, length = config.rollout.prompts, config.plan.prompt_length
  rows, response = prompts * config.rollout.group_size, config.rollout.max_new_tokens
  return Sizes(
    arch,
    reward_arch.replace(lm_head=False),
    prompts,
    rows,
    length,
    response,
    length + response,
    same_tokens=True,
  )


class PolicyState(NamedTuple):
  """The parts of a TrainState that a rollout reads."""

  policy: nnx.State
  ref: None
  key: jax.Array
  step: jax.Array


class Work:
  """A state and the parts of a step, each as () -> None, which waits for its result and stores it
  here.

  `step` is the whole step as one program; `rollout`, `read`, `judge` and `learn` are programs of
  the same functions. With `policy_alone` there are only a policy and its `rollout`.
  """

  def __init__(self, config, sizes: Sizes, policy_alone: bool = False, eos_ids=None):
    """eos_ids: tokens that end a row; None: one outside the vocabulary, so that no row ends."""
    self.config = config
    self.sizes = sizes
    self.count = 0
    self.mesh = sharding.make_mesh((1, 1, 1))
    self.built = build.build(config, self.mesh, arch=sizes.arch, reward_arch=sizes.reward_arch)
    self.eos_ids = (sizes.arch.vocab_size,) if eos_ids is None else eos_ids
    self.pad_id = 0
    if policy_alone:
      policy = build.init_policy(config, self.built, jax.random.key(1))
      self.state = PolicyState(policy, None, jax.random.key(config.seed), jnp.int32(0))
      self.programs = {"rollout": self.rollout_program(config)}
      return
    self.state = random_state(config, self.built)
    defs, layout = self.built.defs, sharding.shardings(self.state, self.mesh)
    read = make_read(config)
    annotate = make_annotate(defs, config)
    group = config.rollout.group_size
    self.programs = {
      "step": make_step(defs, config, self.mesh, self.eos_ids, self.pad_id, layout),
      "rollout": self.rollout_program(config),
      "read": jax.jit(
        lambda state, sequences: read(
          defs.open_policy(state.policy, state.ref), defs.open_ref(state.ref), sequences, group
        )
      ),
      "judge": jax.jit(
        lambda state, w, sequences, old, ref: annotate(
          state, w, Rollout(sequences), old, ref, group=group
        )[0]
      ),
      "learn": jax.jit(
        make_learn(defs, config, self.mesh),
        donate_argnums=0,
        in_shardings=(layout, None),
        out_shardings=(layout, None),
      ),
    }

  def rollout_program(self, config):
    """rollout(state, prompts), jitted, with the lengths of this config."""
    rollout = make_rollout(self.built.defs, config, self.mesh, self.eos_ids, self.pad_id)
    return jax.jit(rollout, out_shardings=self.built.rows)

  def prompts(self) -> Prompts:
    """New prompts at every call."""
    shape, rng = (self.sizes.prompts, self.sizes.prompt_length), np.random.default_rng(self.count)
    self.count += 1
    tokens = rng.integers(0, self.sizes.arch.vocab_size, shape).astype(np.int32)
    ids = np.arange(shape[0], dtype=np.int32)
    return jax.device_put(Prompts(tokens, np.ones(shape, bool), ids), self.built.rows)

  def step(self) -> None:
    self.state, self.output = self.programs["step"](self.state, self.prompts())
    jax.block_until_ready((self.state, self.output))

  def rollout(self) -> None:
    drawn = jax.block_until_ready(self.programs["rollout"](self.state, self.prompts()))
    self.sequences = drawn.samples

  def read(self) -> None:
    self.feedback = jax.block_until_ready(self.programs["read"](self.state, self.sequences))

  def judge(self) -> None:
    jax.block_until_ready(
      self.programs["judge"](self.state, self.state.omega, self.sequences, *self.feedback)
    )

  def learn(self) -> None:
    self.state, output = self.programs["learn"](self.state, Rollout(self.sequences))
    jax.block_until_ready((self.state, output))


def of_size(
  size: str, variant: str = "vanilla", settings: list[str] = (), policy_alone: bool = False
) -> Work:
  config = get_config(size, variant, settings)
  return Work(config, sizes_of(config, POLICIES[size], REWARDS[size]), policy_alone)


def random_state(config, built):
  """The first TrainState: random policy, its copy as the reference, a random reward model with a
  random score head.
  """
  kwargs = build.model_kwargs(config, built.mesh)

  def backbone(key):
    return transformer.init(built.reward_arch, key, **kwargs)[1]

  def phi(key):
    return nnx.state(build.make_head(config, built.arch, built.reward_arch, key).phi)

  policy, *keys = (
    build.init_policy(config, built, jax.random.key(1)),
    jax.random.key(2),
    jax.random.key(3),
  )
  reward = [
    build.place(make, built.mesh, key) for make, key in zip((backbone, phi), keys, strict=True)
  ]
  return build.initial_state(config, built, policy, *reward, donate=True)


# ---- FLOPs and bytes ----


def counts(config, sizes: Sizes, platform: str) -> tuple[dict[str, float], dict[str, float]]:
  """(FLOPs, bytes moved) of a step by phase, as in plan.work, without recomputation in the backward
  pass.
  """
  config = config.copy_and_resolve_references()
  config.remat, config.logits_chunk = "none", 0
  phases = phases_of(config, sizes, Layout(1, 1, 1), platform)
  return {phase.name: phase.flops for phase in phases}, {
    phase.name: phase.moved for phase in phases
  }


# phases of plan.work, by program; `updates` has all others
PARTS = {
  "rollout": ("prefill", "decode"),
  "read": ("feedback and log-probs", "reference"),
  "judge": ("reward backbone",),
}


def by_program(phases: dict[str, float]) -> dict[str, float]:
  """FLOPs or bytes of each program, from plan.work's phases."""
  found = {program: sum(phases[name] for name in names) for program, names in PARTS.items()}
  found["step"] = sum(phases.values())
  found["learn"] = found["step"] - found["rollout"]
  found["updates"] = found["learn"] - found["read"] - found["judge"]
  return found


def decode_limits(sizes: Sizes, dtype: str, limits: dict[str, float]) -> dict[str, float]:
  """Lower bounds in seconds for all tokens after the first, by limiting resource, on a machine with
  these `machine.limits()`.
  """
  moved = decode_bytes(sizes, jnp.dtype(dtype).itemsize)
  return {
    f"{dtype} products": decode_flops(sizes) / limits[dtype],
    "bandwidth": moved / limits["copy"],
  }


def decode_flops(sizes: Sizes) -> float:
  """FLOPs of all tokens after the first: layers and logits of every row, attention over the written
  tokens.
  """
  steps, arch = sizes.response_length - 1, sizes.arch
  return steps * (
    blocks_flops(arch, sizes.rows, 1, mean_length(sizes)) + logits_flops(arch, sizes.rows)
  )


def decode_bytes(sizes: Sizes, width: int) -> float:
  """Least traffic of all tokens after the first, with `width` bytes per element: for each token,
  the weights once, the cache of each row's response, and each prompt's cache once for its K rows.
  """
  steps, arch = sizes.response_length - 1, sizes.arch
  weights = arch.num_layers * layer_weights(arch) + vocabulary(arch)
  slots = (
    sizes.rows * (mean_length(sizes) - sizes.prompt_length) + sizes.prompts * sizes.prompt_length
  )
  return steps * width * (weights + 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * slots)


def mean_length(sizes: Sizes) -> float:
  """The mean number of tokens that a decoded token's query sees, including itself, over all tokens
  after the first.
  """
  return sizes.prompt_length + sizes.response_length / 2


def parameters(arch: ArchConfig) -> int:
  """Number of elements in a policy's matrices, including its embedding."""
  return arch.num_layers * layer_weights(arch) + vocabulary(arch) * (1 + arch.untied_head)

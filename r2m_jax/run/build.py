"""Builds the static definitions, the mesh and the run's first TrainState from a config."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from r2m_jax.algorithm.advantages import ESTIMATORS
from r2m_jax.algorithm.optim import make_optimizer
from r2m_jax.algorithm.read import Defs
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.models import lora as adapters
from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.reward import RewardHead
from r2m_jax.parallel import sharding
from r2m_jax.types import TrainState

# purposes of a random key; folded in where an RL step folds in its number
KEY_INIT, KEY_PAIRS, KEY_TABLE, KEY_HEAD = range(2**31 - 4, 2**31)


@dataclasses.dataclass(frozen=True)
class Build:
  """The parts of a run that exist before any weight."""

  mesh: Mesh
  arch: ArchConfig  # of the policy
  reward_arch: ArchConfig  # of the reward model's backbone
  defs: Defs
  rows: NamedSharding  # of arrays with the batch as their leading axis
  lora: adapters.LoraConfig | None = None  # of the policy's adapters


def build(
  config,
  mesh: Mesh,
  *,
  vocab_size: int = 0,
  arch: ArchConfig | None = None,
  reward_arch: ArchConfig | None = None,
) -> Build:
  """Builds the `Build` without allocating anything. The architectures are the given ones, or the
  config's with `vocab_size` for both models.
  """
  arch = arch or ArchConfig(vocab_size=vocab_size, **config.policy.arch)
  reward_arch = reward_arch or arch.replace(lm_head=False)
  kwargs = model_kwargs(config, mesh)
  lora = lora_of(config)
  critic = {}
  if ESTIMATORS[config.algorithm].baseline == "critic":
    critic_arch = reward_arch if config.critic.init == "reward" else arch.replace(lm_head=False)
    critic = dict(
      critic_backbone=transformer.abstract(critic_arch, **kwargs)[0],
      critic_head=nnx.graphdef(nnx.eval_shape(lambda: make_value_head(config, critic_arch))),
      critic_tx=make_optimizer(
        config.critic, config.steps * config.ppo.epochs * config.ppo.minibatches
      ),
    )
  head = nnx.eval_shape(lambda: make_head(config, arch, reward_arch, jax.random.key(0)))
  defs = Defs(
    vocab_size=arch.vocab_size,
    policy=adapters.graphdef(arch, lora, **kwargs)
    if lora
    else transformer.abstract(arch, **kwargs)[0],
    reward_backbone=transformer.abstract(reward_arch, **kwargs)[0],
    reward_head=nnx.graphdef(head),
    phi=nnx.graphdef(head.phi),
    policy_tx=make_optimizer(
      config.policy, config.steps * config.ppo.epochs * config.ppo.minibatches
    ),
    reward_tx=make_optimizer(config.r2m, config.steps),
    base=transformer.abstract(arch, **kwargs)[0] if lora else None,
    **critic,
  )
  return Build(mesh, arch, reward_arch, defs, NamedSharding(mesh, sharding.BATCH), lora)


def lora_of(config) -> adapters.LoraConfig | None:
  """The config's adapters; None if they are off."""
  settings = config.lora
  return (
    adapters.LoraConfig(settings.rank, settings.alpha, settings.targets) if settings.rank else None
  )


def make_head(config, arch: ArchConfig, reward_arch: ArchConfig, key: jax.Array) -> RewardHead:
  """Cross-attention and phi. At least float32, whatever the models' dtype, because scores are."""
  own = config.variant != "" and VARIANTS[config.variant].width == "reward"
  return RewardHead(
    reward_arch.hidden_size if own else arch.hidden_size,
    reward_arch.embedding_size,
    config.r2m.attention_dim,
    config.r2m.num_heads,
    ensemble=config.reward.ensemble,
    attention_scale=config.r2m.attention_scale,
    rngs=nnx.Rngs(key),
    param_dtype=jnp.promote_types(config.param_dtype, jnp.float32),
  )


def make_value_head(config, arch: ArchConfig) -> nnx.Linear:
  """The critic's linear head, initialised with zeros: before training, every state has the value
  0.
  """
  zeros = nnx.initializers.zeros
  dtype = jnp.promote_types(config.param_dtype, jnp.float32)
  return nnx.Linear(arch.hidden_size, 1, kernel_init=zeros, param_dtype=dtype, rngs=nnx.Rngs(0))


def model_kwargs(config, mesh: Mesh) -> dict:
  attention = config.attention, mesh.devices.flat[0].platform
  dtypes = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))
  return dict(**dtypes, remat=config.remat, attention=attention)


def abstract(make, mesh: Mesh, *args):
  """Shapes, dtypes and shardings of the result of `make(*args)`, without computing it."""
  tree = jax.eval_shape(make, *args)

  def as_struct(x, layout):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

  return jax.tree.map(as_struct, tree, sharding.shardings(tree, mesh))


def place(make, mesh: Mesh, *args, donate: tuple[int, ...] = ()):
  """Runs `make(*args)` as one program whose results are on their shards, each in a separate buffer.

  The arguments at the positions `donate` must not be used again: the result reuses their memory.
  """
  layout = sharding.shardings(jax.eval_shape(make, *args), mesh)
  return jax.jit(make, out_shardings=layout, donate_argnums=donate)(*args)


def init_policy(config, built: Build, key: jax.Array):
  """Random weights of the policy, created on their shards."""
  return place(
    lambda key: transformer.init(built.arch, key, **model_kwargs(config, built.mesh))[1],
    built.mesh,
    key,
  )


def init_reward_model(config, built: Build, policy, key: jax.Array):
  """A reward model {"backbone", "phi"} that starts from the policy's weights, with a score head
  of zeros.
  """

  def make(policy, key):
    backbone = without_lm_head(policy)
    phi = nnx.state(make_head(config, built.arch, built.reward_arch, key).phi)
    return {"backbone": backbone, "phi": jax.tree.map(jnp.zeros_like, phi)}

  return place(make, built.mesh, policy, key)


def without_lm_head(policy) -> nnx.State:
  return nnx.State({name: value for name, value in policy.items() if name != "lm_head"})


def init_critic(config, built: Build, policy, reward_backbone, phi):
  """The critic {"backbone", "head"}: the policy's weights and a head of zeros, or the reward model
  with the mean of phi's heads, so that the critic starts with the reward model's score of each
  prefix.
  """
  from_reward = config.critic.init == "reward"
  head = nnx.state(make_value_head(config, built.reward_arch if from_reward else built.arch))
  if from_reward:
    for name in ("kernel", "bias"):
      head[name][...] = phi[name][...].mean(-1, keepdims=True).astype(head[name][...].dtype)
  return {"backbone": reward_backbone if from_reward else without_lm_head(policy), "head": head}


def init_adapters(config, built: Build, mesh: Mesh):
  """Fresh adapters of `built.lora`, on their shards."""
  key = jax.random.fold_in(jax.random.key(config.seed), KEY_INIT)
  return adapters.init(built.arch, built.lora, key, mesh, **model_kwargs(config, mesh))


def make_first_state(config, built: Build) -> Callable[..., TrainState]:
  """Builds `make(key, policy, reward_backbone, phi) -> TrainState`, see `initial_state`; key is
  the run's.
  """
  defs, wide = built.defs, jnp.promote_types(config.param_dtype, jnp.float32)

  def make_reward_head(key, phi):
    head = make_head(config, built.arch, built.reward_arch, jax.random.fold_in(key, KEY_HEAD))
    nnx.update(head.phi, phi)
    return nnx.state(head)

  def make(key, policy, reward_backbone, phi):
    head = None if phi is None else make_reward_head(key, phi)
    ref = policy
    critic = critic_opt = None
    if defs.critic_tx is not None:
      critic = init_critic(config, built, policy, reward_backbone, phi)
      critic_opt = defs.critic_tx.init(critic)
    if built.lora:
      init_key = jax.random.fold_in(key, KEY_INIT)
      policy = adapters.init(built.arch, built.lora, init_key, **model_kwargs(config, built.mesh))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      key=key,
      policy=policy,
      policy_opt=defs.policy_tx.init(policy),
      beta=jnp.full((), config.kl.beta, wide),
      ref=ref,
      reward_backbone=reward_backbone,
      reward_frozen=phi,
      reward_head=head,
      reward_opt=None if head is None else defs.reward_tx.init(head),
      omega=jnp.ones((), wide),
      reward_average=head if config.r2m.average else None,
      critic=critic,
      critic_opt=critic_opt,
      # its place; `goldtask.stages.certificate` computes it
      certificate=jnp.eye(built.reward_arch.embedding_size) if config.certify.share else None,
    )

  return make


def initial_state(
  config,
  built: Build,
  policy,
  reward_backbone,
  phi,
  *,
  donate: bool = False,
  make: Callable | None = None,
) -> TrainState:
  """The run's first TrainState, distributed over the mesh. Every part is a separate buffer, because
  the step donates all of them.

  Args:
    policy: state of the starting policy; the reference is a copy. With adapters it is the reference
      itself, and the policy's state is only the adapters.
    reward_backbone, phi: state of the fitted reward model; phi is also kept as the frozen score
      head. None and None if the rewards come from outside.
    donate: the arguments must not be used again. This saves one copy at the start.
    make: from `make_first_state`, if one compiled program is to create several states.
  """
  make = make or make_first_state(config, built)
  given = (policy, reward_backbone, phi)
  return place(
    make, built.mesh, jax.random.key(config.seed), *given, donate=(1, 2) if donate else ()
  )

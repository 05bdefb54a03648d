"""Bytes per chip without compilation: the state exactly, temporaries as the sum of the arrays that
must be live together.

The compiler decides what is actually live together; `tests/plan/test_plan.py` and docs/plan.md show
the error of the sum.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.parallel import sharding
from r2m_jax.plan.programs import STATE_KINDS, abstract_state
from r2m_jax.plan.sizes import Sizes, fed_states, reads_feedback
from r2m_jax.plan.work import (
  Layout,
  cache_slots,
  fused_attention,
  layer_weights,
  trained_numbers,
  update_tokens,
  vocabulary,
)
from r2m_jax.run import build


def state_shapes(config, sizes: Sizes) -> list[tuple[str, str, tuple[int, ...], int]]:
  """(kind, parameter's name, shape, bytes per element) of every array of the TrainState."""
  mesh = sharding.make_mesh((1, 1, 1))
  built = build.build(config, mesh, arch=sizes.arch, reward_arch=sizes.reward_arch)
  state, rows = abstract_state(config, built), []
  for field, kind in STATE_KINDS.items():
    for path, x in jax.tree_util.tree_flatten_with_path(getattr(state, field))[0]:
      rows.append((kind, sharding.path_name(path), x.shape, x.dtype.itemsize))
  return rows


def state_on(shapes, layout: Layout) -> dict[str, int]:
  """Bytes of the state on one chip of a mesh, by kind."""
  mesh = AbstractMesh((layout.data, layout.fsdp, layout.tensor), sharding.AXES)
  total: dict[str, int] = {}
  for kind, name, shape, itemsize in shapes:
    spec = sharding.spec_for(name, shape, mesh)
    split = math.prod(mesh.shape[axis] for axis in spec if axis)
    total[kind] = total.get(kind, 0) + math.prod(shape) * itemsize // split
  return total


def cache_bytes(config, sizes: Sizes, layout: Layout) -> float:
  """Bytes of one wave's keys and values on a chip."""
  arch, width = sizes.arch, jnp.dtype(config.dtype).itemsize
  heads = arch.num_kv_heads / (layout.tensor if arch.num_kv_heads % layout.tensor == 0 else 1)
  slots = cache_slots(config, sizes) / layout.shards / config.rollout.waves
  return 2 * arch.num_layers * slots * heads * arch.head_dim * width


def feedback_bytes(config, sizes: Sizes, layout: Layout) -> float:
  """Bytes of the hidden states that live from the first read to the reward update: h and h'."""
  if not reads_feedback(config):
    return 0.0
  length, dim = fed_states(config, sizes)
  copies = 1 + VARIANTS[config.variant].trained
  return copies * sizes.rows / layout.shards * length * dim * jnp.dtype(config.dtype).itemsize


def rollout_temporaries(config, sizes: Sizes, layout: Layout, platform: str) -> float:
  """Bytes in addition to the cache: the prefill's cache, logits with their noise, and gathered
  weights. If layers decode separately (`models.decode`), a copy of their weights too.
  """
  arch, width = sizes.arch, jnp.dtype(config.dtype).itemsize
  rows = sizes.rows / layout.shards / config.rollout.waves
  logits = 3 * rows * arch.vocab_size * 4 / layout.tensor
  gathered = (
    (vocabulary(arch) + 2 * layer_weights(arch)) * width / layout.tensor * (layout.fsdp > 1)
  )
  prefill = cache_bytes(config, sizes, layout) / config.rollout.group_size
  apart = (
    arch.num_layers
    * layer_weights(arch)
    * width
    / (layout.fsdp * layout.tensor)
    * (platform != "tpu")
  )
  return logits + gathered + prefill + apart


def kept_bytes(config, arch, length: int, fused: bool, platform: str) -> float:
  """Bytes that a layer keeps per token for the backward pass."""
  width = jnp.dtype(config.dtype).itemsize
  hidden = arch.hidden_size
  wide = arch.intermediate_size
  squares = arch.num_heads * length * 3 * (not fused)
  if (
    platform == "gpu" and config.remat == "none"
  ):  # each norm's input and result in float32, five steps of the MLP
    return width * (8 * hidden + 5 * wide + squares) + 4 * 4 * hidden
  # the residual stream, then the arrays that a gradient needs
  products = 4 * hidden + (1 + arch.gated_mlp) * wide
  kept = {"none": 10 * hidden + 4 * wide + squares, "full": hidden, "dots": products}[config.remat]
  # elsewhere twice: the forward loop's arrays are laid out again for the backward loop
  return (1 if platform == "gpu" else 2) * width * kept


def learn_temporaries(config, sizes: Sizes, layout: Layout, fused: bool, platform: str) -> float:
  """Bytes in addition to feedback: the gradient with the policy's backward pass, or a reward pass,
  or the head's update.
  """
  arch = sizes.arch
  width = jnp.dtype(config.dtype).itemsize
  stored = jnp.dtype(config.param_dtype).itemsize
  tensor, parts = layout.tensor, config.ppo.minibatches * config.ppo.accumulation
  own_rows = sizes.rows / layout.shards
  rows = max(1.0, own_rows / parts)
  # bytes: the sum in float32, and the gradient of one micro-batch
  held = 4 + stored if config.ppo.accumulation > 1 else stored
  gradient = trained_numbers(config, arch) / (layout.fsdp * tensor) * held

  def layer(arch, length, backward):
    squares = 0 if fused else (2 + backward) * 4 * arch.num_heads * length * length
    wide = (2 + backward) * (2 if arch.gated_mlp else 1) * length * arch.intermediate_size * 4
    gathered = 2 * layer_weights(arch) * width * (layout.fsdp > 1)
    return (rows * (squares + wide) + gathered) / tensor

  kept = update_tokens(config, sizes, layout, platform) * arch.num_layers
  kept *= kept_bytes(config, arch, sizes.length, fused, platform)
  every = sizes.response_length * arch.vocab_size
  logits = (
    4 * rows * (min(config.logits_chunk, every) if config.logits_chunk else every) * 4 / tensor
  )
  # laid out in blocks, and its gradient
  table = vocabulary(arch) * (width + 4) / (tensor * layout.fsdp)
  backward = kept + table + max(layer(arch, sizes.length, True), logits)
  reward = layer(sizes.reward_arch, sizes.reward_length, False)
  head = 4 * own_rows * sizes.length * arch.hidden_size * reads_feedback(config)  # h in float32
  return max(gradient + backward, reward, head)


def estimate(
  config, sizes: Sizes, shapes, layout: Layout, platform: str
) -> dict[str, dict[str, float]]:
  """{program: {kind: bytes on a chip}} without a compiler."""
  fused = fused_attention(config, sizes.arch, platform)
  state = state_on(shapes, layout)
  shared = {kind: float(size) for kind, size in state.items()}
  return {
    "rollout": shared
    | {
      "KV cache": cache_bytes(config, sizes, layout),
      "feedback": 0.0,
      "temporaries": rollout_temporaries(config, sizes, layout, platform),
    },
    "learn": shared
    | {
      "KV cache": 0.0,
      "feedback": feedback_bytes(config, sizes, layout),
      "temporaries": learn_temporaries(config, sizes, layout, fused, platform),
    },
  }

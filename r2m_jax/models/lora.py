"""Low-rank adapters on the linear layers of the blocks, by qwix: y = x W + (alpha / rank) x A B.

qwix finds the linear layers by running a module, and stores A and B next to each kernel. It cannot
be run over the whole model: the layers are stacked and scanned, so the arrays that it attaches
while tracing one layer have no layer axis (jax: "tuple index out of range" in scan). It is
therefore applied to one block inside the constructor that stacks the blocks, which gives
layers/attn/q/kernel_lora_a [N, in, rank] and kernel_lora_b [N, rank, out]. The vocabulary head is
outside the blocks and has no adapters.

A model with adapters consists of two states: the adapters, which are trained, and the base, which
is also the reference.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.parallel import sharding

LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  rank: int
  alpha: float
  targets: str  # pattern of whole paths below a block, such as attn/(q|v)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def linears(self, arch: ArchConfig) -> list[str]:
    """The linear layers of `arch` that get adapters; raises ValueError if there are none."""
    own = [name for name in LINEARS if name != "mlp/gate" or arch.gated_mlp]
    found = [name for name in own if re.fullmatch(self.targets, name)]
    if not found:
      raise ValueError(
        f"config.lora.targets is {self.targets!r}: it matches none of {', '.join(own)}"
      )
    return found


def adapt(
  arch: ArchConfig, lora: LoraConfig, dtype
) -> Callable[[nnx.Module, nnx.Rngs], nnx.Module]:
  """Builds `adapt(block, rngs)`, the block with adapters, for `Transformer(adapt=...)`."""
  import qwix

  provider = qwix.LoraProvider(
    module_path="|".join(lora.linears(arch)), rank=lora.rank, alpha=lora.alpha
  )

  def apply(block, rngs):
    x = jnp.zeros((1, 1, arch.hidden_size), dtype)
    angle = jnp.zeros((1, 1, 1, arch.rotary_dim // 2))
    table = transformer.Table(angle, angle, jnp.ones((1, 1, 1, 1), bool))
    return qwix.apply_lora_to_model(
      block, provider, x, table, lambda k, v: (k, v, (), None), rngs=rngs
    )

  return apply


def graphdef(arch: ArchConfig, lora: LoraConfig, *, dtype, **kwargs) -> Any:
  """The static half of a Transformer with adapters: `nnx.merge(graphdef, adapters, base)`."""
  return transformer.abstract(arch, dtype=dtype, adapt=adapt(arch, lora, dtype), **kwargs)[0]


def init(
  arch: ArchConfig, lora: LoraConfig, key: jax.Array, mesh=None, *, dtype, **kwargs
) -> nnx.State:
  """Fresh adapters: B is zero, so the model starts as its base."""

  def make(key):
    model = transformer.Transformer(
      arch, rngs=nnx.Rngs(key), dtype=dtype, adapt=adapt(arch, lora, dtype), **kwargs
    )
    return nnx.split_state(nnx.state(model), nnx.LoRAParam, ...)[0]

  layout = None if mesh is None else sharding.shardings(jax.eval_shape(make, key), mesh)
  return jax.jit(make, out_shardings=layout)(key)


def merged(adapters: nnx.State, base: nnx.State, lora: LoraConfig) -> nnx.State:
  """W + (alpha / rank) A B in every adapted kernel: the state of a plain Transformer. `base` is not
  changed.
  """
  found = {
    sharding.path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(adapters)[0]
  }

  @jax.jit
  def add(found, base):
    def one(path, x):
      name = sharding.path_name(path)
      if f"{name}_lora_a" not in found:
        return x
      wide = jnp.promote_types(x.dtype, jnp.float32)
      a, b = found[f"{name}_lora_a"].astype(wide), found[f"{name}_lora_b"].astype(wide)
      delta = jnp.matmul(a, b, precision="highest")
      return (x.astype(wide) + lora.scale * delta).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(one, base)

  return add(found, base)

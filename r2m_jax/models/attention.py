"""Attention in plain XLA, and the choice of an implementation.

`attend` is the reference: any dtype, any mask, with the logits [B, H, L, S] in memory. A pass over
whole rows can also use `dot_product`, or `kernels.splash` on TPUs. Both give the same results,
except at padding, where nothing reads the states. Decoding uses `attend`, or `kernels.slots` on a
GPU in bfloat16.

Rows with the same beginning, such as the responses to one prompt, can share it: see `Shared`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.logprobs import softcap
from r2m_jax.parallel.sharding import ROWS, lay

ATTENTION = ("auto", "xla", "dot_product", "splash")


class Shared(NamedTuple):
  """Rows in runs of `copies` neighbours whose first `length` columns are equal, padding included:
  one prompt and its responses. Each run becomes one line: its prompt once, then the rest of each
  row. There are G runs, and N = length + copies * rest.
  """

  length: int
  copies: int

  def pack(self, x: jax.Array) -> jax.Array:
    """[B, L, ...] -> [G, N, ...]."""
    runs = x.reshape(len(x) // self.copies, self.copies, *x.shape[1:])
    rest = runs[:, :, self.length :]
    return jnp.concatenate(
      [runs[:, 0, : self.length], rest.reshape(len(runs), -1, *x.shape[2:])], 1
    )

  def unpack(self, x: jax.Array) -> jax.Array:
    """[G, N, ...] -> [B, L, ...]."""
    prompt, rest = x[:, : self.length], x[:, self.length :]
    rest = rest.reshape(len(x) * self.copies, -1, *x.shape[2:])
    return jnp.concatenate([jnp.repeat(prompt, self.copies, 0), rest], 1)

  def masks(self, visible: jax.Array) -> "SharedMask":
    """bool[B, 1, L, L] of the rows -> the masks of prompt tokens and of response tokens."""
    return SharedMask(
      visible[:: self.copies, :, : self.length, : self.length], visible[:, :, self.length :]
    )


class SharedMask(NamedTuple):
  """The mask of rows that share a prompt."""

  prompt: jax.Array  # bool[G, 1, length, length]
  rest: jax.Array  # bool[B, 1, L - length, L]


def attend_shared(attend: Callable, q, k, v, seen: SharedMask) -> jax.Array:
  """`attend(q, k, v, mask)` for runs packed by `Shared`: first the prompts attend to themselves,
  then the responses to both.

  q [G, H, N, Dh], k and v [G, KV, N, Dh] -> [G, H, N, Dh].
  """
  length, copies = seen.prompt.shape[2], len(seen.rest) // len(q)

  def prompt(x):
    return x[:, :, :length]

  def rows(x):
    return lay(x.reshape(-1, *x.shape[2:]), ROWS, "tensor")  # [G, copies, ...] -> [B, ...]

  def rest(x):
    return from_runs(x[:, :, length:], len(seen.rest))

  def whole(x):
    return jnp.concatenate([rows(jnp.stack([prompt(x)] * copies, 1)), rest(x)], 2)

  of_prompt = attend(prompt(q), prompt(k), prompt(v), seen.prompt)
  of_rest = attend(rest(q), whole(k), whole(v), seen.rest)
  return jnp.concatenate([of_prompt, as_runs(of_rest, len(q))], 2)


def choose(how: str, platform: str, arch: ArchConfig, dtype) -> str:
  """The implementation that config.attention selects: "xla", "dot_product", "cudnn", "splash" or
  "interpreted".

  "auto" selects splash on a TPU, cuDNN on a GPU and XLA on a CPU, and XLA for models that these
  kernels do not support. "interpreted" is the splash kernel without a TPU; it is slow and meant for
  tests.

  Args:
    platform: of the devices, "cpu", "tpu" or "gpu".
    dtype: of the computation.

  Raises ValueError with the reason if the requested kernel cannot run.
  """
  if how not in ATTENTION:
    raise ValueError(
      f"config.attention is {how!r}: choose one of {', '.join(map(repr, ATTENTION))}"
    )
  dtype = jnp.dtype(dtype)
  # dtypes for which cuDNN has kernels
  fast = dtype == jnp.bfloat16 and arch.head_dim % 8 == 0 and arch.head_dim <= 128
  why_not = {}
  if dtype == jnp.float64:
    why_not["splash"] = "the kernel has no float64; use 'xla'"
  if arch.attn_softcap is not None:
    why_not["dot_product"] = "it has no soft cap of the logits, which this model needs; use 'xla'"
  if how == "auto":
    how = {"tpu": "splash", "gpu": "dot_product" if fast else "xla"}.get(platform, "xla")
    how = "xla" if how in why_not else how
  if how in why_not:
    raise ValueError(f"config.attention is {how!r}: {why_not[how]}")
  if how == "splash":
    return "splash" if platform == "tpu" else "interpreted"
  return "cudnn" if how == "dot_product" and platform == "gpu" and fast else how


def attend(q, k, v, mask, *, scale: float, cap: float | None, prompt: tuple = ()) -> jax.Array:
  """softmax(cap(scale q k^T)) v, with the softmax in at least float32. A query that may see nothing
  gives a finite mean.

  q [B, H, L, Dh], k and v [B, KV, S, Dh], mask bool[B, 1, L, S] -> [B, H, L, Dh]. Query head h
  reads key head h // (H / KV). Keys and values of `prompt` [n, KV, Sp, Dh], or (), come before k
  and v and are shared by B / n neighbouring rows, whose queries are multiplied with them together.
  The mask is then over Sp + S.
  """
  batch, heads, length, dim = q.shape
  wide = jnp.promote_types(q.dtype, jnp.float32)
  # the queries that share a key head, heads before tokens
  q = q.reshape(batch, k.shape[1], -1, dim)
  logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide)
  if prompt:
    keys, values = prompt
    before = jnp.matmul(as_runs(q, len(keys)), keys.swapaxes(-1, -2), preferred_element_type=wide)
    logits = jnp.concatenate([from_runs(before, batch), logits], -1)
  logits = softcap(logits * scale, cap)
  logits = jnp.where(mask, logits.reshape(batch, heads, length, -1), -0.5 * jnp.finfo(wide).max)
  weights = jax.nn.softmax(logits, -1).astype(v.dtype).reshape(*q.shape[:3], -1)
  if not prompt:
    return jnp.matmul(weights, v).reshape(batch, heads, length, dim)
  before, weights = jnp.split(weights, [keys.shape[2]], -1)
  mean = from_runs(jnp.matmul(as_runs(before, len(keys)), values), batch) + jnp.matmul(weights, v)
  return mean.reshape(batch, heads, length, dim)


def as_runs(x: jax.Array, runs: int) -> jax.Array:
  """[B, heads, N, ...] -> [runs, heads, B / runs * N, ...]: with neighbouring rows together, by
  head.
  """
  x = x.reshape(runs, -1, *x.shape[1:]).swapaxes(1, 2)
  return x.reshape(runs, x.shape[1], -1, *x.shape[4:])


def from_runs(x: jax.Array, rows: int) -> jax.Array:
  """The inverse of `as_runs` for this number of rows."""
  x = x.reshape(*x.shape[:2], rows // len(x), -1, *x.shape[3:]).swapaxes(1, 2)
  return lay(x.reshape(rows, *x.shape[2:]), ROWS, "tensor")


def dot_product(
  q, k, v, mask, *, scale: float, implementation: Literal["xla", "cudnn"]
) -> jax.Array:
  """`attend` without a cap, by `jax.nn.dot_product_attention`: "xla", or "cudnn" in bfloat16 or
  float16.
  """
  length = q.shape[2]
  # cuDNN's backward pass needs even lengths
  odd = [x.shape[2] % 2 if implementation == "cudnn" else 0 for x in (q, k, v)]
  q, k, v = (
    jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, n), (0, 0), (0, 0))) for x, n in zip((q, k, v), odd)
  )
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd[0]), (0, odd[1])))
  out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)
  return out.swapaxes(1, 2)[:, :, :length]

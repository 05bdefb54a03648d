"""Log-probabilities, entropies and exact KLs of tokens, without ever holding the logits of all of
them.

The vocabulary head is by far the widest layer: [B, T, V] is larger than anything else in a step.
Here one block of the vocabulary is multiplied at a time, for all tokens, and the sums over the
vocabulary are carried along. The backward pass recomputes the same logits. The blocks are
interleaved (block i of n has the entries i, i + n, ...), so that a head that is split over devices
is split equally in every block, and no block leaves its device.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from r2m_jax.models.packing import Packing
from r2m_jax.ops import Truncation, at_least_f32, check, kept
from r2m_jax.parallel.sharding import ROWS, lay, mesh_around

LANES = 128  # numbers in a row of a matrix unit's tile


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), or x if cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


@struct.dataclass
class Head:
  """A vocabulary head: hidden [..., D] -> logits [..., V], at least float32."""

  kernel: jax.Array  # [D, V], in the compute dtype
  cap: float | None = struct.field(pytree_node=False, default=None)  # of `softcap`

  def __call__(self, hidden: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    rows = hidden.reshape(-1, hidden.shape[-1])  # see transformer.as_rows
    logits = softcap(jnp.matmul(rows, self.kernel, preferred_element_type=wide), self.cap)
    return logits.reshape(*hidden.shape[:-1], -1)


@struct.dataclass
class TokenStats:
  """Statistics of the distribution from which each token was drawn, at the rollout temperature. All
  are [B, T], at least float32.
  """

  logprobs: jax.Array
  entropy: jax.Array  # nats
  # exact KL(policy || reference) over the vocabulary, nats; zero if there is no reference
  kl: jax.Array


LogitsOf = Head | Callable[[jax.Array], jax.Array]


def tempered(head: LogitsOf, hidden: jax.Array, temperature: float) -> jax.Array:
  """hidden [..., D] -> logits / temperature [..., V], at least float32."""
  if isinstance(head, Head) and head.cap is None and hidden.dtype == at_least_f32(hidden).dtype:
    # divides D numbers a token instead of V, here and in the gradient
    return head(hidden / temperature)
  return at_least_f32(head(hidden)) / temperature


@jax.custom_vjp
def own_logprob(logits: jax.Array, index: jax.Array) -> jax.Array:
  """The entry of log softmax(logits [..., V]) at i32[...] -> [...]. Its gradient 1_index - p is
  written in one pass. The gradient of a softmax and a gather would be scattered into zeros, summed,
  scaled and added.
  """
  return _own_logprob(logits, index)[0]


def _own_logprob(logits, index):
  logp = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logp, index[..., None], -1)[..., 0], (logp, index)


def _own_logprob_backward(saved, gradient):
  # otherwise XLA hoists the ones out of the scan over updates
  logp, index = jax.lax.optimization_barrier(saved)
  gradient = gradient[..., None]
  own = jnp.arange(logp.shape[-1]) == index[..., None]
  return gradient * (own - jnp.exp(logp)), None


own_logprob.defvjp(_own_logprob, _own_logprob_backward)


def token_stats(
  head: LogitsOf,
  hidden: jax.Array,
  tokens: jax.Array,
  *,
  temperature: float,
  truncation: Truncation = Truncation(),
  ref: tuple[LogitsOf, jax.Array] | None = None,
  support: tuple[LogitsOf, jax.Array] | None = None,
  chunk: int = 0,
  mask: jax.Array | None = None,
  share: float = 1.0,
) -> TokenStats:
  """Log-probability and entropy of each token, and the exact KL to a reference if one is given.

  Old, new and reference log-probabilities all come from this function. With the same weights it
  gives the same numbers, so the importance ratio is exactly 1 before the first update.

  Args:
    head: a `Head`, or any function hidden [..., D] -> logits [..., V].
    hidden: [B, T, D], the language-model head's inputs that predict each token.
    tokens: i32[B, T].
    temperature: divides the logits, as in sampling.
    truncation: as in sampling; probabilities are normalised over the kept tokens. The given token
      is always kept, so that a policy that has changed since sampling has a finite log-probability
      for it.
    ref: the reference's head and its hidden [B, T, Dref]; it is normalised over the same kept
      tokens. With a `Head` in parts no gradient flows to it.
    support: head and hidden of the model whose distribution defines the kept tokens; None: this
      model.
    chunk: logits of each row that are held at a time, and recomputed in the backward pass; 0: all T
      * V. A `Head` is processed in blocks of chunk / T vocabulary entries. If sampling is
      truncated, the kept entries depend on the whole vocabulary, and a function cannot be split. In
      these cases chunk / V tokens of each row (at least one) are processed at a time.
    mask: bool[B, T], True on the requested tokens; used if `share` is below 1.
    share: an upper limit for the share of True in the mask. Only this share of the tokens is
      computed; the other tokens get zeros.
  """
  if share < 1:
    whole = functools.partial(token_stats, head, temperature=temperature, chunk=chunk)
    return packed_stats(whole, mask, share, hidden, tokens, ref, support, truncation)
  check(hidden, "B T D")
  check(tokens, "B T", jnp.integer)
  other = ref or support  # a reference and another model's support are never combined
  if ref is not None and support is not None:
    raise ValueError("token_stats takes a reference or another model's support, not both")
  length = tokens.shape[1]
  vocab = jax.eval_shape(head, hidden[:1, :1]).shape[-1]
  if 0 < chunk < length * vocab and truncation == Truncation():
    parts = -(-length * vocab // chunk)
    if isinstance(head, Head) and (ref is None or isinstance(ref[0], Head)):
      return stats_in_parts(head, hidden, tokens, ref, temperature=temperature, parts=parts)
  slice_stats = functools.partial(
    whole_stats, head, temperature, truncation, ref and ref[0], support and support[0]
  )
  other_hidden = hidden[:, :, :0] if other is None else other[1]
  chunk = max(chunk // vocab, 1) if chunk else 0
  if not 0 < chunk < length:
    return slice_stats(hidden, tokens, other_hidden)
  return in_slices(slice_stats, chunk, hidden, tokens, other_hidden)


def packed_stats(
  stats: Callable, mask, share, hidden, tokens, ref, support, truncation
) -> TokenStats:
  """`stats` (`token_stats`) of the packed tokens, scattered back to their rows."""
  assert mask is not None, "only a share of the tokens is requested: `mask` defines which"
  packing = Packing.of(mask, share)
  found = stats(
    packing.pack(hidden),
    packing.pack(tokens),
    truncation=truncation,
    ref=ref and (ref[0], packing.pack(ref[1])),
    support=support and (support[0], packing.pack(support[1])),
  )
  return jax.tree.map(packing.unpack, found)


def whole_stats(
  head: LogitsOf,
  temperature: float,
  truncation: Truncation,
  ref: LogitsOf | None,
  support: LogitsOf | None,
  hidden: jax.Array,
  tokens: jax.Array,
  other_hidden: jax.Array,
) -> TokenStats:
  """`token_stats` from all logits at once; `other_hidden` is what `ref` or `support` reads."""
  logits = tempered(head, hidden, temperature)
  keep = None
  if truncation != Truncation():
    keep = kept(tempered(support, other_hidden, temperature) if support else logits, truncation)
    keep |= jnp.arange(logits.shape[-1]) == tokens[..., None]

  def inside(x):
    return x if keep is None else jnp.where(keep, x, jnp.finfo(x.dtype).min)

  logits = inside(logits)
  logp = jax.nn.log_softmax(logits)
  p = jnp.exp(logp)
  kl = jnp.zeros(tokens.shape, logp.dtype)
  if ref is not None:
    ref_logp = jax.nn.log_softmax(inside(tempered(ref, other_hidden, temperature)))
    kl = (p * (logp - ref_logp)).sum(-1)
  return TokenStats(logprobs=own_logprob(logits, tokens), entropy=-(p * logp).sum(-1), kl=kl)


def in_slices(slice_stats: Callable, chunk: int, *xs: jax.Array) -> TokenStats:
  """`slice_stats(*xs)` of arrays [B, T, ...] for `chunk` tokens of each row at a time, recomputed
  in the backward pass.
  """
  length = xs[0].shape[1]
  count = -(-length // chunk)

  def split(x):  # [B, T, ...] -> [count, B, chunk, ...], the last slice padded
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

  body = jax.checkpoint(lambda xs: slice_stats(*xs), prevent_cse=False)
  stats = jax.lax.map(body, tuple(map(split, xs)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length], stats)


class Sums(NamedTuple):
  """Sums that are carried over the blocks of a vocabulary, [B, T] each. l are the policy's logits,
  r the reference's.
  """

  top: jax.Array  # the largest l so far
  mass: jax.Array  # sum of exp(l - top)
  above: jax.Array  # sum of exp(l - top) (l - top)
  apart: jax.Array  # sum of exp(l - top) (l - r)
  own: jax.Array  # the token's own l
  ref_top: jax.Array
  ref_mass: jax.Array


def stats_in_parts(
  head: Head, hidden, tokens, ref, *, temperature: float, parts: int
) -> TokenStats:
  """`token_stats` of the whole distribution in about `parts` blocks of the vocabulary."""
  mesh = mesh_around()
  shards = 1 if mesh is None else mesh.shape["tensor"]
  split = vocabulary_parts(head.kernel.shape[1], parts, shards)
  ref_hidden = ref_kernel = ref_cap = None
  if ref is not None:
    ref_hidden = ref[1]
    ref_kernel = ref[0].kernel
    ref_cap = ref[0].cap
  static = (head.cap, ref_cap, temperature, split)
  frozen = jax.lax.stop_gradient((ref_hidden, ref_kernel))
  return TokenStats(*_stats(static, hidden, head.kernel, tokens, *frozen))


def vocabulary_parts(vocab: int, parts: int, shards: int) -> tuple[int, int]:
  """(number, entries of each): about `parts` blocks that hold the vocabulary, each split equally
  over `shards` devices.

  Matrix units need rows of whole `LANES`: with 64 blocks of 2,374 entries instead of 38 of 4,096,
  learning on an H200 took a fifth longer. If the blocks are narrow, the number of blocks divides
  the vocabulary if such a number exists within a factor of two, so that no padding is needed. It
  nearly always exists.
  """
  parts, lanes = min(parts, vocab), LANES * shards
  if vocab > 4 * lanes * parts:
    width = -(-vocab // (parts * lanes)) * lanes
    return -(-vocab // width), width
  parts = next(
    (n for n in range(parts, min(2 * parts, vocab) + 1) if vocab % (n * shards) == 0), parts
  )
  return parts, -(-vocab // parts)


def _split_vocab(kernel, parts):
  """[D, V] -> [number, D, width]: block i of n has the entries i, i + n, ...; zeros pad the last
  blocks.
  """
  (depth, vocab), (parts, width) = kernel.shape, parts
  kernel = jnp.pad(kernel, ((0, 0), (0, parts * width - vocab)))
  return lay(jnp.moveaxis(kernel.reshape(depth, -1, parts), 2, 0), None, "fsdp", "tensor")


def _part_logits(hidden, kernel, cap, temperature):
  """[B, T, D], [D, v] -> [B, T, v]. The kernel's rows are gathered here, one block at a time."""
  return _of_product(Head(lay(kernel, None, "tensor"))(hidden), cap, temperature)


def _of_product(product, cap, temperature):
  return lay(softcap(product, cap) / temperature, ROWS, None, "tensor")


def _entries(i, parts, vocab, tokens):
  """For block i: (bool[v], whether an entry is real and not padding; bool[B, T, v], the position of
  each token).
  """
  entry = i + parts[0] * jnp.arange(parts[1])
  return entry < vocab, entry == tokens[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(static, hidden, kernel, tokens, ref_hidden, ref_kernel):
  return _stats_forward(static, hidden, kernel, tokens, ref_hidden, ref_kernel)[0]


def _stats_forward(static, hidden, kernel, tokens, ref_hidden, ref_kernel):
  cap, ref_cap, temperature, parts = static
  wide, vocab = jnp.promote_types(hidden.dtype, jnp.float32), kernel.shape[1]
  floor = jnp.finfo(wide).min
  kernels = _split_vocab(kernel, parts)
  ref_kernels = None if ref_kernel is None else _split_vocab(ref_kernel, parts)

  def add(sums: Sums, xs):
    i, kernel, ref_kernel = xs
    real, own = _entries(i, parts, vocab, tokens)
    l = jnp.where(real, _part_logits(hidden, kernel, cap, temperature), floor)
    top = jnp.maximum(sums.top, l.max(-1))
    shrink, weight = jnp.exp(sums.top - top), jnp.exp(l - top[..., None])
    above = shrink * (sums.above + sums.mass * jnp.maximum(sums.top - top, floor / 2))
    above += jnp.where(real, weight * (l - top[..., None]), 0).sum(-1)
    apart = shrink * sums.apart
    ref_top = sums.ref_top
    ref_mass = sums.ref_mass
    if ref_kernel is not None:
      r = jnp.where(real, _part_logits(ref_hidden, ref_kernel, ref_cap, temperature), floor)
      apart += (weight * (l - r)).sum(-1)
      ref_top = jnp.maximum(sums.ref_top, r.max(-1))
      ref_mass = sums.ref_mass * jnp.exp(sums.ref_top - ref_top) + jnp.exp(
        r - ref_top[..., None]
      ).sum(-1)
    mass = shrink * sums.mass + weight.sum(-1)
    return Sums(
      top, mass, above, apart, sums.own + jnp.where(own, l, 0).sum(-1), ref_top, ref_mass
    ), None

  zero, lowest = jnp.zeros(tokens.shape, wide), jnp.full(tokens.shape, floor)
  start = Sums(lowest, zero, zero, zero, zero, lowest, zero)
  sums, _ = jax.lax.scan(add, start, (jnp.arange(len(kernels)), kernels, ref_kernels))
  log_mass = jnp.log(sums.mass)
  above = sums.above / sums.mass
  apart = sums.apart / sums.mass
  lse = sums.top + log_mass
  kl = zero if ref_kernel is None else apart - lse + sums.ref_top + jnp.log(sums.ref_mass)
  saved = (hidden, kernel, tokens, ref_hidden, ref_kernel, lse, sums.top + above, apart)
  return (sums.own - lse, log_mass - above, kl), saved


def _stats_backward(static, saved, gradients):
  """With p = softmax(l), the gradients in l are: log p: 1_token - p; entropy: -p (l - E l); KL: p
  (l - r - E(l - r)).
  """
  cap, ref_cap, temperature, parts = static
  hidden, kernel, tokens, ref_hidden, ref_kernel, lse, mean, apart = saved
  to_logprob, to_entropy, to_kl = (g[..., None] for g in gradients)
  vocab, kernels = kernel.shape[1], _split_vocab(kernel, parts)
  ref_kernels = None if ref_kernel is None else _split_vocab(ref_kernel, parts)

  def add(total, xs):
    i, kernel, ref_kernel = xs
    real, own = _entries(i, parts, vocab, tokens)
    kernel = lay(kernel, None, "tensor")
    l, pull = jax.vjp(lambda product: _of_product(product, cap, temperature), Head(kernel)(hidden))
    p = jnp.where(real, jnp.exp(l - lse[..., None]), 0)
    to_l = to_logprob * (own - p) - to_entropy * p * (l - mean[..., None])
    if ref_kernel is not None:
      r = _part_logits(ref_hidden, ref_kernel, ref_cap, temperature)
      to_l += to_kl * p * (l - r - apart[..., None])
    # products in the narrow dtype, summed in the wide one, as in the layers' own gradients
    (to_product,), rows = pull(to_l.astype(l.dtype)), hidden.reshape(-1, hidden.shape[-1])
    to_product = to_product.astype(hidden.dtype).reshape(len(rows), -1)
    to_hidden = jnp.matmul(to_product, kernel.T, preferred_element_type=total.dtype).reshape(
      total.shape
    )
    to_kernel = jnp.matmul(rows.T, to_product, preferred_element_type=total.dtype).astype(
      kernel.dtype
    )
    return total + to_hidden, lay(to_kernel, "fsdp", "tensor")

  zero = jnp.zeros(hidden.shape, lse.dtype)
  to_hidden, to_kernels = jax.lax.scan(add, zero, (jnp.arange(len(kernels)), kernels, ref_kernels))
  to_kernel = jnp.moveaxis(to_kernels, 0, 2).reshape(kernel.shape[0], -1)[:, :vocab]
  return to_hidden.astype(hidden.dtype), to_kernel, None, None, None


_stats.defvjp(_stats_forward, _stats_backward)

"""Log-probabilities, entropies and exact KLs against torch in float64, for several chunks and
meshes.
"""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r2m_jax.models import logprobs
from r2m_jax.models.logprobs import Head, token_stats
from r2m_jax.ops import Truncation
from r2m_jax.parallel.sharding import BATCH, make_mesh, on_mesh

pytestmark = pytest.mark.numerics

ROWS, LENGTH, WIDTH, VOCAB, TAU = 3, 7, 4, 11, 0.7


def problem(seed=0):
  """hidden, head, reference hidden of another width, reference head, tokens."""
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(ROWS, LENGTH, WIDTH)),
    rng.normal(size=(WIDTH, VOCAB)),
    rng.normal(size=(ROWS, LENGTH, WIDTH + 1)),
    rng.normal(size=(WIDTH + 1, VOCAB)),
    rng.integers(0, VOCAB, (ROWS, LENGTH)),
  )


def function(kernel):
  return lambda x: x @ kernel


def stats(hidden, head, ref_hidden, ref_head, tokens, chunk=0, with_ref=True, kind=function):
  ref = (kind(ref_head), ref_hidden) if with_ref else None
  return token_stats(kind(head), hidden, tokens, temperature=TAU, ref=ref, chunk=chunk)


def gradients(chunk, with_ref=True, kind=function):
  """Values, and gradients of a randomly weighted sum with respect to hidden states and heads."""
  hidden, head, ref_hidden, ref_head, tokens = problem()
  weights = np.random.default_rng(1).normal(size=(3, ROWS, LENGTH))

  @jax.jit
  def run(*args):
    def loss(*args):
      out = stats(*args, tokens, chunk, with_ref, kind)
      return sum((w * x).sum() for w, x in zip(weights, (out.logprobs, out.entropy, out.kl))), out

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*args)

  (_, out), grads = run(hidden, head, ref_hidden, ref_head)
  return out, grads, weights


@pytest.fixture(scope="module")
def unchunked():
  with jax.enable_x64(True):
    return gradients(0)


def test_token_stats_match_torch(unchunked):
  torch = pytest.importorskip("torch")
  out, grads, weights = unchunked
  *arrays, tokens = problem()
  tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
  logp = torch.log_softmax(tensors[0] @ tensors[1] / TAU, -1)
  ref_logp = torch.log_softmax(tensors[2] @ tensors[3] / TAU, -1)
  expected = (
    torch.gather(logp, -1, torch.tensor(tokens)[..., None])[..., 0],
    torch.distributions.Categorical(logits=logp).entropy(),
    torch.nn.functional.kl_div(ref_logp, logp, log_target=True, reduction="none").sum(-1),
  )
  for name, value in zip(("logprobs", "entropy", "kl"), expected):
    np.testing.assert_allclose(
      getattr(out, name), value.detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=name
    )
  sum((torch.tensor(w) * x).sum() for w, x in zip(weights, expected)).backward()
  for found, tensor in zip(grads, tensors):
    np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 7 * VOCAB, 20 * VOCAB])
def test_chunks_change_neither_values_nor_gradients(unchunked, chunk):
  """7 tokens: chunks of one, chunks with a padded last one, a single chunk, and a chunk size above
  7.
  """
  with jax.enable_x64(True):
    out, grads, _ = gradients(chunk)
  for name in ("logprobs", "entropy", "kl"):
    np.testing.assert_allclose(
      getattr(out, name), getattr(unchunked[0], name), rtol=1e-12, atol=1e-14, err_msg=name
    )
  for found, expected in zip(grads, unchunked[1]):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [function, Head])
@pytest.mark.parametrize("chunk", [0, 3 * LENGTH])
def test_without_a_reference_the_kl_is_zero(unchunked, chunk, kind):
  with jax.enable_x64(True):
    out, grads, _ = gradients(chunk, with_ref=False, kind=kind)
  np.testing.assert_array_equal(out.kl, np.zeros((ROWS, LENGTH)))
  np.testing.assert_allclose(out.logprobs, unchunked[0].logprobs, rtol=1e-12)
  assert not grads[2].any() and not grads[3].any()


# 11 entries in parts of 1, of 2 with a padded last part, of 4, of 6, and of 11
@pytest.mark.parametrize("chunk", [1, 2 * LENGTH, 4 * LENGTH, 6 * LENGTH, 10 * LENGTH + 3])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_parts_of_the_vocabulary_change_neither_values_nor_gradients(chunk, cap):
  """Against all logits at once, in float64. A reference gets no gradient."""

  def kind(kernel):
    return Head(kernel, cap)

  with jax.enable_x64(True):
    want, expected, _ = gradients(0, kind=lambda kernel: kind(kernel).__call__)
    out, grads, _ = gradients(chunk, kind=kind)
  for name in ("logprobs", "entropy", "kl"):
    np.testing.assert_allclose(
      getattr(out, name), getattr(want, name), rtol=1e-11, atol=1e-13, err_msg=name
    )
  for found, reference in zip(grads[:2], expected[:2]):
    np.testing.assert_allclose(found, reference, rtol=1e-10, atol=1e-12)
  assert not grads[2].any() and not grads[3].any()


@pytest.mark.parametrize(
  "vocab, parts, shards, found",
  [
    (151_936, 38, 1, (38, 4096)),
    (151_936, 64, 1, (63, 2432)),
    (151_936, 64, 4, (60, 2560)),
    (128_256, 32, 2, (32, 4096)),
    (11, 4, 1, (4, 3)),
    (512, 3, 1, (4, 128)),
    (512, 3, 2, (4, 128)),
    (32_000, 7, 8, (7, 5120)),
  ],
)
def test_parts_hold_the_vocabulary(vocab, parts, shards, found):
  number, width = logprobs.vocabulary_parts(vocab, parts, shards)
  assert (number, width) == found
  assert (number - 1) * width < vocab <= number * width


def test_parts_that_are_mostly_filling_change_neither_values_nor_gradients(monkeypatch):
  """11 entries in three parts of six, as parts of whole lanes could be."""
  monkeypatch.setattr(logprobs, "vocabulary_parts", lambda vocab, parts, shards: (3, 6))
  with jax.enable_x64(True):
    want, expected, _ = gradients(0, kind=lambda kernel: Head(kernel).__call__)
    out, grads, _ = gradients(4 * LENGTH, kind=Head)
  for name in ("logprobs", "entropy", "kl"):
    np.testing.assert_allclose(
      getattr(out, name), getattr(want, name), rtol=1e-11, atol=1e-13, err_msg=name
    )
  for found, reference in zip(grads[:2], expected[:2]):
    np.testing.assert_allclose(found, reference, rtol=1e-10, atol=1e-12)


def test_parts_of_the_vocabulary_against_finite_differences():
  """With a padded last part and a soft cap, along random directions."""
  hidden, head, ref_hidden, ref_head, tokens = problem()
  rng = np.random.default_rng(2)
  weights, along = (
    rng.normal(size=(3, ROWS, LENGTH)),
    (rng.normal(size=hidden.shape), rng.normal(size=head.shape)),
  )

  @jax.jit
  def f(hidden, head):
    ref = (Head(ref_head, 2.0), ref_hidden)
    out = token_stats(Head(head, 3.0), hidden, tokens, temperature=TAU, ref=ref, chunk=3 * LENGTH)
    return sum((w * x).sum() for w, x in zip(weights, (out.logprobs, out.entropy, out.kl)))

  with jax.enable_x64(True):
    grads = jax.grad(f, (0, 1))(hidden, head)
    for step in ((along[0], 0), (0, along[1])):

      def at(t):
        return f(hidden + t * step[0], head + t * step[1])

      slope = (at(1e-5) - at(-1e-5)) / 2e-5
      np.testing.assert_allclose(sum((g * s).sum() for g, s in zip(grads, step)), slope, rtol=1e-7)


def sizes(jaxpr):
  """The number of elements of every array in a program, including inner programs."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
    for inner in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(inner, "jaxpr", inner)  # a closed jaxpr holds one
      if hasattr(inner, "eqns"):
        yield from sizes(inner)


@pytest.mark.parametrize(
  "truncation", [Truncation(), Truncation(top_k=50)], ids=["vocabulary", "tokens"]
)
def test_all_logits_never_exist_at_a_time(truncation):
  B, T, D, V = 2, 64, 4, 1024
  chunk = T * V // 16

  def loss(hidden, kernel, chunk):
    out = token_stats(
      Head(kernel),
      hidden,
      jnp.zeros((B, T), int),
      temperature=1.0,
      truncation=truncation,
      chunk=chunk,
    )
    return out.logprobs.sum() + out.entropy.sum()

  def largest(chunk):
    return max(
      sizes(
        jax.make_jaxpr(jax.grad(functools.partial(loss, chunk=chunk), (0, 1)))(
          jnp.zeros((B, T, D)), jnp.zeros((D, V))
        ).jaxpr
      )
    )

  assert largest(0) == B * T * V
  assert largest(chunk) == B * chunk


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_head_over_a_mesh_is_gathered_a_part_at_a_time():
  """On 2 x 2 x 2 devices: equal numbers, and no device ever has more of the head than its share and
  one part.
  """
  B, T, D, V, parts = 4, 8, 16, 256, 8
  rng = np.random.default_rng(0)
  hidden, kernel, tokens = (
    rng.normal(size=(B, T, D)),
    rng.normal(size=(D, V)),
    rng.integers(0, V, (B, T)),
  )
  mesh = make_mesh((2, 2, 2))

  def put(x, spec):
    return jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, spec))

  def loss(hidden, kernel):
    out = token_stats(Head(kernel), hidden, tokens, temperature=1.0, chunk=T * V // parts)
    return (out.logprobs - out.entropy).sum()

  grad = jax.jit(on_mesh(mesh, jax.value_and_grad(loss, (0, 1))))
  args = put(hidden, BATCH), put(kernel, P("fsdp", "tensor"))
  value, grads = grad(*args)
  want, expected = jax.value_and_grad(lambda h, k: loss(h, Head(k).kernel), (0, 1))(
    *map(jnp.asarray, (hidden, kernel))
  )
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for found, reference in zip(grads, expected):
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)
  text = grad.lower(*args).compile().as_text()

  def elements(pattern):
    return [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(pattern, text)]

  gathered = elements(r"f32\[([\d,]+)\]\S* all-gather\(")
  assert (
    gathered and max(gathered) <= D * V // parts // 2
  )  # all rows of a part, and the columns of one device along tensor
  assert max(elements(r"= f32\[([\d,]+)\]")) <= max(D * V // 4, B // 4 * T * V // parts // 2)


def test_token_stats_of_bfloat16_logits_are_float32():
  hidden, head, ref_hidden, ref_head, tokens = problem()
  low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head, ref_hidden, ref_head)]
  out = jax.jit(stats)(*low, tokens)
  logits = np.asarray(low[0] @ low[1], np.float64) / TAU
  exact = np.take_along_axis(
    logits - np.log(np.exp(logits).sum(-1, keepdims=True)), tokens[..., None], -1
  )[..., 0]
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
  np.testing.assert_allclose(
    out.logprobs, exact, rtol=1e-4, atol=1e-4
  )  # in bfloat16 the error would be 1e-2


def test_token_stats_far_out_stay_finite():
  logits = jnp.array([[[1e4, 0.0, -1e4]]])
  out = token_stats(
    lambda x: x, logits, jnp.array([[2]]), temperature=1.0, ref=(lambda x: x, -logits)
  )
  np.testing.assert_allclose(
    [out.logprobs[0, 0], out.entropy[0, 0], out.kl[0, 0]], [-2e4, 0.0, 2e4], atol=1e-6
  )

"""Packed tokens: their positions, their gradients, and models that read them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_shared import COPIES, PROMPT, rows
from test_transformer import ARCHS

from r2m_jax.models import transformer
from r2m_jax.models.attention import Shared
from r2m_jax.models.logprobs import Head, token_stats
from r2m_jax.models.packing import Packing
from r2m_jax.ops import Truncation
from r2m_jax.parallel import sharding

RNG = np.random.default_rng(0)
MASK = RNG.random((6, 10)) < 0.4
X = RNG.standard_normal((6, 10, 3)).astype(np.float32)


def test_tokens_lie_end_to_end_and_come_back():
  packing = Packing.of(jnp.asarray(MASK), 0.5)
  packed = packing.pack(jnp.asarray(X))
  assert packed.shape == (6, 5, 3)
  want = np.zeros((30, 3), np.float32)
  want[: MASK.sum()] = X[MASK]
  np.testing.assert_array_equal(packed.reshape(30, 3), want)
  np.testing.assert_array_equal(packing.unpack(packed), np.where(MASK[..., None], X, 0))


def test_each_device_packs_its_own_rows():
  mesh = sharding.make_mesh((2, 1, 1))
  packed = jax.jit(sharding.on_mesh(mesh, lambda x: Packing.of(jnp.asarray(MASK), 0.6).pack(x)))(X)
  for half, of_half in ((packed[:3], slice(0, 3)), (packed[3:], slice(3, 6))):
    count = MASK[of_half].sum()
    np.testing.assert_array_equal(half.reshape(18, 3)[:count], X[of_half][MASK[of_half]])


def test_the_gradient_is_that_of_a_gather():
  weights = RNG.standard_normal((6, 5, 3)).astype(np.float32)

  def packed(x):
    packing = Packing.of(jnp.asarray(MASK), 0.5)
    return (packing.pack(x) * weights).sum() + (packing.unpack(packing.pack(x)) ** 2).sum()

  def gathered(x):
    flat = jnp.zeros((30, 3)).at[: MASK.sum()].set(x[MASK])
    return (flat * weights.reshape(30, 3)).sum() + (jnp.where(MASK[..., None], x, 0) ** 2).sum()

  np.testing.assert_allclose(jax.grad(packed)(X), jax.grad(gathered)(X), rtol=1e-6)


def test_a_token_without_a_place_is_nan():
  packing = Packing.of(jnp.asarray(MASK), 0.3)
  found = packing.unpack(packing.pack(jnp.asarray(X)))
  assert 18 < MASK.sum() and np.isnan(found).any(-1).sum() == MASK.sum() - 18


# Norms over all heads together, and layers of three kinds, one of them without positions.
JOINT = ARCHS["rich"].replace(
  qk_norm_joint=True, pre_norms=False, unrotated_layers=(1,), sliding_layers=(2,)
)


@pytest.mark.parametrize("lines", ["rows", "prompts once"])
@pytest.mark.parametrize(
  "arch", [ARCHS["plain"], ARCHS["rich"], JOINT], ids=["plain", "rich", "joint"]
)
def test_states_and_gradients_are_those_of_padded_rows(arch, lines):
  shared = Shared(PROMPT, COPIES) if lines == "prompts once" else None
  with jax.enable_x64(True):
    kinds = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    graphdef, state = transformer.init(arch, jax.random.key(0), **kinds)
    state = jax.tree.map(lambda x: x + 0.1 * RNG.standard_normal(x.shape), state)
    tokens, mask = rows()
    weights = RNG.standard_normal((*tokens.shape, arch.hidden_size)) * mask[..., None]

    @functools.partial(jax.jit, static_argnums=1)
    def run(state, share):
      def loss(state):
        model = nnx.merge(graphdef, state)
        out = model(tokens, mask, feedback_layer=1, shared=shared, share=share)
        return ((out.hidden + out.feedback) * weights).sum(), (out.hidden, out.feedback)

      return jax.value_and_grad(loss, has_aux=True)(state)

    padded, packed = run(state, 1.0), run(state, 0.8)
  for a, b in zip(padded[0][1], packed[0][1]):
    np.testing.assert_allclose(b[mask], a[mask], rtol=1e-9, atol=1e-11)
    assert not np.asarray(b)[~mask].any()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-11), padded[1], packed[1]
  )


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(top_k=5)])
def test_log_probabilities_are_those_of_padded_rows(truncation):
  kernel = Head(jnp.asarray(RNG.standard_normal((3, 11)), jnp.float32))
  tokens = RNG.integers(0, 11, MASK.shape)
  ref = kernel, jnp.asarray(X[::-1])
  settings = dict(temperature=0.7, truncation=truncation, ref=ref, mask=jnp.asarray(MASK), chunk=44)
  padded = token_stats(kernel, jnp.asarray(X), tokens, **settings)
  packed = token_stats(kernel, jnp.asarray(X), tokens, **settings, share=0.5)
  for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(packed)):
    np.testing.assert_allclose(b, np.where(MASK, a, 0), rtol=1e-6, atol=1e-6)

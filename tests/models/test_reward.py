"""The reward head against NumPy loops; padding, the limits of omega, precision, and the position
from which the embedding is read.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from r2m_jax.hf.folders import phi_score
from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.critic import read_values
from r2m_jax.models.reward import RewardHead, last_token, read_rte
from r2m_jax.types import Sequences

pytestmark = pytest.mark.numerics

ROWS, SLOTS, POLICY_DIM, REWARD_DIM, WIDTH = 3, 7, 6, 5, 8
MASK = np.array([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0]], bool)


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(ROWS, REWARD_DIM)), rng.normal(size=(ROWS, SLOTS, POLICY_DIM))


def make_head(num_heads, param_dtype=jnp.float32):
  head = RewardHead(
    POLICY_DIM, REWARD_DIM, WIDTH, num_heads, rngs=nnx.Rngs(0), param_dtype=param_dtype
  )
  head.phi.bias[...] = head.phi.bias[...] + 0.25
  return head


@nnx.jit
def run(head, rte, h, mask, omega):
  h_hat = head.cross_attend(rte, h, mask)
  fused = head.fuse(rte, h_hat, omega)
  return {
    "weights": head.attention_weights(rte, h, mask),
    "h_hat": h_hat,
    "fused": fused,
    "score": head.score(fused),
    "call": head(rte, h, mask, omega),
    "own": head.score(rte),
  }


def check_products_keep_all_bits(compute, *args, at_least: int):
  """Reads the program of the gradient of `compute`, traced where the default is bfloat16."""
  with jax.default_matmul_precision("bfloat16"):
    text = jax.jit(jax.grad(compute, tuple(range(len(args))))).lower(*args).as_text()
  found = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  assert len(found) >= at_least
  for line in found:
    assert "precision = [HIGHEST, HIGHEST]" in line


def test_no_product_of_the_reward_is_rounded_on_an_accelerator():
  """An update of R2M changes a weight by less than bfloat16 can hold. The forward and the backward
  products of attention and score ask for all bits, whatever the default of the device is.
  """
  graphdef, state = nnx.split(make_head(2))

  def loss(state, rte, h):
    return nnx.merge(graphdef, state)(rte, h, MASK, 0.7).sum()

  rte, h = inputs()
  check_products_keep_all_bits(loss, state, rte, jnp.asarray(h, jnp.bfloat16), at_least=18)


def test_no_product_of_the_critics_head_is_rounded_on_an_accelerator():
  head = nnx.Linear(POLICY_DIM, 1, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(head)
  rows = Sequences(MASK * 1, MASK, MASK[:, 3:], np.zeros(ROWS))

  def loss(state, h):
    def backbone(*_, **__):
      return SimpleNamespace(hidden=h)

    return read_values(backbone, nnx.merge(graphdef, state), rows).sum()

  check_products_keep_all_bits(loss, state, jnp.asarray(inputs()[1], jnp.bfloat16), at_least=2)


def test_no_product_of_a_two_layer_score_head_is_rounded_on_an_accelerator():
  """Both layers, as R2M reads the embedding and as a reward model by itself scores."""
  arch = ArchConfig(vocab_size=7, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)
  graphdef, state = transformer.abstract(arch.replace(lm_head=False, score_width=REWARD_DIM))
  head = nnx.eval_shape(lambda: nnx.Linear(REWARD_DIM, 1, rngs=nnx.Rngs(0)))

  def loss(state, phi, h):
    return phi_score(phi, nnx.merge(graphdef, state).embedding(h)).sum()

  states = jax.ShapeDtypeStruct((ROWS, 8), jnp.bfloat16)
  check_products_keep_all_bits(loss, state, nnx.state(head), states, at_least=5)


def test_the_attentions_scale_multiplies_what_it_adds():
  rte, h = inputs()
  made = [
    RewardHead(POLICY_DIM, REWARD_DIM, WIDTH, attention_scale=scale, rngs=nnx.Rngs(0))
    for scale in (1.0, 8.0)
  ]
  one, eight = (run(head, rte, h, MASK, 0.7) for head in made)
  np.testing.assert_array_equal(one["own"], eight["own"])
  np.testing.assert_allclose(8 * one["h_hat"], eight["h_hat"], rtol=1e-5)
  assert float(jnp.abs(one["h_hat"]).min()) > 0


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_head_matches_loops(num_heads):
  rte, h = inputs()
  with jax.enable_x64(True):
    head = make_head(num_heads, jnp.float64)
    found = jax.tree.map(np.asarray, run(head, rte, h, MASK, 0.7))
    wq, wk, wv, wo, phi = (
      np.asarray(getattr(head, name).kernel[...]) for name in ("wq", "wk", "wv", "wo", "phi")
    )
  h_hat, weights = oracles.cross_attend_loop(rte, h, MASK, wq, wk, wv, wo, num_heads)
  fused = oracles.fuse_loop(rte, h_hat, 0.7)
  scores = [sum(fused[b, d] * phi[d, 0] for d in range(REWARD_DIM)) + 0.25 for b in range(ROWS)]
  for name, value in {
    "weights": weights,
    "h_hat": h_hat,
    "fused": fused,
    "score": scores,
    "call": scores,
  }.items():
    assert found[name].dtype == np.float64
    np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


def test_attention_weights_are_a_distribution_over_real_tokens():
  weights = np.asarray(run(make_head(2), *inputs(), MASK, 0.7)["weights"])
  assert weights.shape == (ROWS, 2, SLOTS)
  np.testing.assert_allclose(weights.sum(-1), np.ones((ROWS, 2)), rtol=1e-6)
  for n in range(2):
    assert not weights[:, n][~MASK].any() and (weights[:, n][MASK] > 0).all()
  np.testing.assert_array_equal(weights[2, :, 3], [1.0, 1.0])  # the only token


def test_padding_has_no_influence_not_by_a_bit():
  rte, h = inputs()
  head = make_head(2)
  before = run(head, rte, h, MASK, 0.7)
  for garbage in (0.0, -3.0, 1e6, 1e30):
    after = run(head, rte, np.where(MASK[..., None], h, garbage), MASK, 0.7)
    jax.tree.map(np.testing.assert_array_equal, after, before)
  moved = h.copy()
  moved[0, 2] += 1e-2  # a real token
  after = run(head, rte, moved, MASK, 0.7)
  assert after["score"][0] != before["score"][0]
  np.testing.assert_array_equal(after["score"][1:], before["score"][1:])


def test_the_order_of_the_tokens_does_not_matter():
  rte, h = inputs()
  order = np.random.default_rng(1).permutation(SLOTS)
  head = make_head(2)
  before, after = run(head, rte, h, MASK, 0.7), run(head, rte, h[:, order], MASK[:, order], 0.7)
  np.testing.assert_allclose(after["score"], before["score"], rtol=1e-5, atol=1e-6)


def test_omega_one_reads_the_reward_models_own_embedding_only():
  rte, h = inputs()
  found = run(make_head(2), rte, h, MASK, 1.0)
  np.testing.assert_array_equal(found["score"], found["own"])
  np.testing.assert_array_equal(found["fused"], rte.astype(np.float32))


def test_omega_zero_reads_the_feedback_only():
  rte, h = inputs()
  found = run(make_head(2), rte, h, MASK, 0.0)
  np.testing.assert_array_equal(found["fused"], found["h_hat"])


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_scores_never_run_below_float32(param_dtype):
  """For any dtype of the feedback and of the parameters. Those are rounded, but no later
  computation is.
  """
  rte, h = inputs()
  low = jnp.asarray(h, jnp.bfloat16)
  head = make_head(2, param_dtype)
  found = run(head, rte.astype(np.float32), low, MASK, 0.7)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
  wide_head = make_head(2)
  nnx.update(wide_head, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(head)))
  wide = run(wide_head, rte.astype(np.float32), np.asarray(low, np.float32), MASK, 0.7)
  np.testing.assert_allclose(found["score"], wide["score"], rtol=1e-5)


def test_gradients_reach_all_weights_but_not_the_bias_of_the_score():
  """A shift of all rewards changes no loss of the head, so the bias must not be trained."""
  rte, h = inputs()
  graphdef, state = nnx.split(make_head(2))
  weights = jnp.arange(
    1.0, ROWS + 1
  )  # they do not sum to zero: a gradient of the bias would be noticed
  grads = jax.jit(jax.grad(lambda s: (weights * nnx.merge(graphdef, s)(rte, h, MASK, 0.7)).sum()))(
    state
  )
  for name in ("wq", "wk", "wv", "wo", "phi"):
    assert np.abs(grads[name]["kernel"][...]).max() > 1e-3, name
  np.testing.assert_array_equal(grads["phi"]["bias"][...], [0.0])


def test_initial_weights_have_variance_one_over_fan_in():
  head = RewardHead(400, 100, 64, rngs=nnx.Rngs(0))
  for name, fan_in in {"wq": 100, "wk": 400, "wv": 400, "wo": 64}.items():
    layer = getattr(head, name)
    assert layer.bias is None
    np.testing.assert_allclose(np.var(layer.kernel[...]) * fan_in, 1.0, rtol=0.1, err_msg=name)


def test_head_refuses_wrong_shapes():
  head, (rte, h) = make_head(1), inputs()
  with pytest.raises(TypeError, match=r"\[B S D\]"):
    head.cross_attend(jnp.asarray(rte), jnp.asarray(rte), MASK)
  with pytest.raises(TypeError, match="bool"):
    head.cross_attend(jnp.asarray(rte), jnp.asarray(h), jnp.asarray(MASK, jnp.int32))


def test_last_token_matches_loop():
  """Right-padded, left-padded, both, a gap, and a single token at either end."""
  mask = [
    [1, 1, 1, 0, 0],
    [0, 0, 1, 1, 1],
    [0, 1, 1, 1, 0],
    [1, 0, 1, 0, 0],
    [0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0],
  ]
  mask = np.array(mask, bool)
  hidden = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
  found = jax.jit(last_token)(hidden, mask)
  np.testing.assert_array_equal(found, oracles.last_token_loop(hidden, mask))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rte_does_not_depend_on_where_the_padding_is(dtype):
  arch = ArchConfig(
    vocab_size=17, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, lm_head=False
  )
  graphdef, state = transformer.init(arch, jax.random.key(0), dtype=jnp.dtype(dtype))
  rng = np.random.default_rng(0)
  text = rng.integers(0, 17, 5)
  tokens, mask = (
    rng.integers(0, 17, (4, 9)),
    np.zeros((4, 9), bool),
  )  # the values of padding are arbitrary
  for row, start in enumerate((0, 4, 2)):
    tokens[row, start : start + 5], mask[row, start : start + 5] = text, True
  tokens[3, :6], mask[3, :6] = np.append(text, 3), True  # one more token

  @jax.jit
  def read(state, tokens, mask):
    model = nnx.merge(graphdef, state)
    return read_rte(model, tokens, mask), model(tokens, mask).hidden

  rte, hidden = map(np.asarray, read(state, tokens, mask))
  assert rte.dtype == np.float32
  np.testing.assert_array_equal(rte, oracles.last_token_loop(hidden, mask).astype(np.float32))
  tolerance = 1e-5 if dtype == "float32" else 5e-2
  np.testing.assert_allclose(rte[1], rte[0], atol=tolerance)
  np.testing.assert_allclose(rte[2], rte[0], atol=tolerance)
  assert np.abs(rte[3] - rte[0]).max() > 0.1

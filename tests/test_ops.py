"""Array helpers against torch in float64 and against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from r2m_jax import ops

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


def stats(hidden, head, ref_hidden, ref_head, tokens, chunk=0, with_ref=True):
  ref = (lambda x: x @ ref_head, ref_hidden) if with_ref else None
  return ops.token_stats(lambda x: x @ head, hidden, tokens, temperature=TAU, ref=ref, chunk=chunk)


def gradients(chunk, with_ref=True):
  """Values, and gradients of a sum with random weights to hidden states and heads."""
  hidden, head, ref_hidden, ref_head, tokens = problem()
  weights = np.random.default_rng(1).normal(size=(3, ROWS, LENGTH))

  @jax.jit
  def run(*args):
    def loss(*args):
      out = stats(*args, tokens, chunk, with_ref)
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
    np.testing.assert_allclose(getattr(out, name), value.detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=name)
  sum((torch.tensor(w) * x).sum() for w, x in zip(weights, expected)).backward()
  for found, tensor in zip(grads, tensors):
    np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_chunks_change_neither_values_nor_gradients(unchunked, chunk):
  """7 tokens: one at a time, slices with a padded last one, all at once, and more than there are."""
  with jax.enable_x64(True):
    out, grads, _ = gradients(chunk)
  for name in ("logprobs", "entropy", "kl"):
    np.testing.assert_allclose(getattr(out, name), getattr(unchunked[0], name), rtol=1e-12, atol=1e-14, err_msg=name)
  for found, expected in zip(grads, unchunked[1]):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [0, 3])
def test_without_a_reference_the_kl_is_zero(unchunked, chunk):
  with jax.enable_x64(True):
    out, grads, _ = gradients(chunk, with_ref=False)
  np.testing.assert_array_equal(out.kl, np.zeros((ROWS, LENGTH)))
  np.testing.assert_allclose(out.logprobs, unchunked[0].logprobs, rtol=1e-12)
  assert not grads[2].any() and not grads[3].any()


def test_chunks_keep_logits_small():
  shapes = []

  def logits(x):
    shapes.append(x.shape)
    return x @ jnp.zeros((WIDTH, VOCAB))

  take = lambda x: ops.token_stats(logits, x, jnp.zeros((ROWS, LENGTH), int), temperature=1.0, chunk=3).logprobs.sum()
  jax.eval_shape(jax.grad(take), jnp.zeros((ROWS, LENGTH, WIDTH)))
  assert shapes and set(shapes) == {(ROWS, 3, WIDTH)}


def test_token_stats_of_bfloat16_logits_are_float32():
  hidden, head, ref_hidden, ref_head, tokens = problem()
  low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head, ref_hidden, ref_head)]
  out = jax.jit(stats)(*low, tokens)
  logits = np.asarray(low[0] @ low[1], np.float64) / TAU
  exact = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), tokens[..., None], -1)[..., 0]
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
  np.testing.assert_allclose(out.logprobs, exact, rtol=1e-4, atol=1e-4)  # in bfloat16 it would be off by 1e-2


def test_token_stats_far_out_stay_finite():
  logits = jnp.array([[[1e4, 0.0, -1e4]]])
  out = ops.token_stats(lambda x: x, logits, jnp.array([[2]]), temperature=1.0, ref=(lambda x: x, -logits))
  np.testing.assert_allclose([out.logprobs[0, 0], out.entropy[0, 0], out.kl[0, 0]], [-2e4, 0.0, 2e4], atol=1e-6)


# ---- masked reductions ----


def masked(seed=0):
  x = np.random.default_rng(seed).normal(size=(4, 5)) + 3
  return x, np.arange(5) < np.array([5, 2, 0, 1])[:, None]


@pytest.mark.parametrize("how", ops.AGGREGATIONS)
def test_aggregate_matches_loop(how):
  x, mask = masked()
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      ops.aggregate(jnp.asarray(x), jnp.asarray(mask), how), oracles.aggregate_loop(x, mask, how), rtol=1e-12
    )
    dirty = jnp.where(mask, x, jnp.nan)
    np.testing.assert_allclose(
      ops.aggregate(dirty, jnp.asarray(mask), how), oracles.aggregate_loop(x, mask, how), rtol=1e-12
    )


def test_aggregations_differ_by_hand():
  x, mask = jnp.array([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]]), jnp.array([[True, True, True], [True, False, False]])
  found = {how: float(ops.aggregate(x, mask, how)) for how in ops.AGGREGATIONS}
  assert found == {"sequence_sum": 8.0, "sequence_mean": 6.0, "token_mean": 4.0, "constant": pytest.approx(16 / 6)}


def test_aggregate_refuses_an_unknown_name_and_wrong_arrays():
  x, mask = map(jnp.asarray, masked())
  with pytest.raises(ValueError, match="'mean'.*sequence_sum.*sequence_mean.*token_mean.*constant"):
    ops.aggregate(x, mask, "mean")
  with pytest.raises(TypeError, match="bool"):
    ops.aggregate(x, mask.astype(jnp.int32), "token_mean")
  with pytest.raises(TypeError, match=r"\[B T\]"):
    ops.aggregate(x[0], mask[0], "token_mean")


def test_masked_sum_and_mean():
  x, mask = masked()
  dirty = jnp.where(mask, x, jnp.inf)
  np.testing.assert_allclose(ops.masked_sum(dirty, mask), x[mask].sum(), rtol=1e-6)
  np.testing.assert_allclose(ops.masked_mean(dirty, mask), x[mask].mean(), rtol=1e-6)
  rows = [x[0].mean(), x[1, :2].mean(), 0.0, x[3, 0]]  # nothing kept: 0, not NaN
  np.testing.assert_allclose(ops.masked_mean(dirty, mask, -1), rows, rtol=1e-6)


def test_masked_whiten_matches_loop():
  x, mask = masked()
  with jax.enable_x64(True):
    found = ops.masked_whiten(jnp.where(mask, x, jnp.nan), jnp.asarray(mask), eps=1e-3)
  np.testing.assert_allclose(found, oracles.masked_whiten_loop(x, mask, 1e-3), rtol=1e-10, atol=1e-13)


def test_masked_whiten_of_equal_values_is_zero_and_has_a_finite_gradient():
  _, mask = masked()
  run = jax.jit(jax.value_and_grad(lambda x: (ops.masked_whiten(x, mask) * jnp.arange(5.0)).sum()))
  value, grad = run(jnp.full((4, 5), 0.5))
  assert value == 0 and np.isfinite(grad).all() and not grad[~mask].any()


# ---- shapes and dtypes ----


def test_check_passes_what_fits():
  x = jnp.zeros((2, 3))
  assert ops.check(x, "B T") is x
  assert ops.check(jnp.zeros((2, 3), jnp.bfloat16), "B T").dtype == jnp.bfloat16
  ops.check(jnp.zeros(2, jnp.int32), "B", jnp.integer)
  ops.check(jnp.zeros(2, bool), "B", jnp.bool_)


@pytest.mark.parametrize("array, axes, kind, message", [
  (np.zeros((2, 3), np.float32), "B", jnp.floating, r"\[B\], got shape \(2, 3\)"),
  (np.zeros((2,), np.float32), "B T", jnp.floating, r"\[B T\], got shape \(2,\)"),
  (np.zeros((2, 3), np.int32), "B T", jnp.floating, r"floating array with axes \[B T\], got int32"),
  (np.zeros((2, 3), np.float32), "B T", jnp.bool_, r"bool.* array with axes \[B T\], got float32"),
  (np.zeros((2, 3), bool), "B T", jnp.integer, r"integer array with axes \[B T\], got bool"),
])  # fmt: skip
def test_check_refuses_the_rest(array, axes, kind, message):
  with pytest.raises(TypeError, match=message):
    ops.check(jnp.asarray(array), axes, kind)


@pytest.mark.parametrize("given, result", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"),
                                           ("float64", "float64")])  # fmt: skip
def test_at_least_f32(given, result):
  with jax.enable_x64(True):
    assert ops.at_least_f32(jnp.zeros(2, given)).dtype == result


def test_predicts_response_is_one_column_early():
  columns = jnp.broadcast_to(jnp.arange(6), (2, 6))  # 4 prompt columns, then a response of 2
  np.testing.assert_array_equal(ops.predicts_response(columns, 2), [[3, 4], [3, 4]])
  assert ops.predicts_response(jnp.zeros((2, 6, 5)), 2).shape == (2, 2, 5)

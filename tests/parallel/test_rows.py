"""Rows in parts and minibatches: against NumPy's indexing. No row moves to another device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from r2m_jax.algorithm import optim
from r2m_jax.ops import AGGREGATIONS, aggregate
from r2m_jax.parallel.rows import (
  Deal,
  balanced,
  deal_orders,
  dealt,
  map_rows,
  neighbours,
  put_rows,
  scan_rows,
  take_rows,
)
from r2m_jax.parallel.sharding import BATCH, lay_rows, make_mesh, on_mesh

pytestmark = pytest.mark.numerics

X = np.random.default_rng(0).standard_normal((32, 3, 4)).astype(np.float32)
MOVES = r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\("


def test_a_part_has_neighbouring_rows():
  def see(seen, part, tree):
    return (seen.at[tree["i"][0]].set(part), {"x": part, "empty": part[:, :0]})

  seen, out = scan_rows(see, jnp.zeros((4, 8, 3, 4)), 4, X, {"i": np.arange(32) // 8})
  np.testing.assert_array_equal(seen, X.reshape(4, 8, 3, 4))
  np.testing.assert_array_equal(out["x"], X)
  assert out["empty"].shape == (32, 0, 4)


@pytest.mark.parametrize("parts, used", [(1, 1), (4, 4), (3, 4), (5, 8), (64, 32)])
def test_map_rows_takes_the_next_number_of_parts_into_which_rows_split(parts, used):
  seen = []

  def f(x, tree):
    seen.append(len(x))
    return {"sum": x.sum((1, 2)), "twice": 2 * tree["x"]}

  out = map_rows(f, parts, X, {"x": X})
  assert set(seen) == {32 // used}
  np.testing.assert_allclose(out["sum"], X.sum((1, 2)), rtol=1e-5)
  np.testing.assert_array_equal(out["twice"], 2 * X)


WEIGHTS = np.random.default_rng(1).integers(1, 100, 32).astype(np.float32)


def test_parts_that_are_dealt_by_weight_have_whole_runs_and_weigh_alike():
  """Runs of four rows of 32, two to each of four parts: the heaviest with the lightest."""
  runs = WEIGHTS.reshape(8, 4).sum(1)
  order = np.asarray(balanced(Deal(jnp.asarray(WEIGHTS), 4), 4))
  assert order.shape == (1, 4, 8)
  expected = np.argsort(-runs, kind="stable")
  pairs = [(expected[i], expected[7 - i]) for i in range(4)]
  rows = [[4 * run + i for run in pair for i in range(4)] for pair in pairs]
  np.testing.assert_array_equal(order[0], rows)
  assert WEIGHTS[order[0]].sum(1).max() <= WEIGHTS.reshape(4, 8).sum(1).max()
  np.testing.assert_array_equal(balanced(Deal(WEIGHTS, 4), 4), order)  # on the host


@pytest.mark.parametrize("group, parts", [(4, 4), (4, 8), (8, 8), (1, 2), (3, 4)])
def test_dealt_rows_come_back_in_their_order(group, parts):
  def see(count, part, tree):
    return count + part.sum(), {"x": 2 * part, "i": tree["i"]}

  deal = Deal(jnp.asarray(WEIGHTS), group)
  total, out = scan_rows(see, jnp.zeros(()), parts, X, {"i": np.arange(32)}, deal=deal)
  np.testing.assert_allclose(total, X.sum(), rtol=1e-4)
  np.testing.assert_array_equal(out["x"], 2 * X)
  np.testing.assert_array_equal(out["i"], np.arange(32))
  mapped = map_rows(lambda x: x + 1, parts, X, deal=deal)
  np.testing.assert_array_equal(mapped, X + 1)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_minibatches_take_every_row_once_and_one_of_every_run(minibatches):
  orders = np.asarray(deal_orders(jax.random.key(0), 32, minibatches))
  assert orders.shape == (minibatches, 32 // minibatches)
  rows = orders + minibatches * np.arange(32 // minibatches)
  assert sorted(rows.reshape(-1)) == list(range(32))
  filled = jnp.zeros_like(X)
  for order, index in zip(orders, rows):
    taken = take_rows({"x": X}, order, minibatches)["x"]
    np.testing.assert_array_equal(taken, X[index])
    filled = put_rows(filled, order, minibatches, taken)
  np.testing.assert_array_equal(filled, X)


def test_deals_are_uniform():
  """Each row of a run of four is in each minibatch a quarter of the time, within five standard
  errors.
  """
  orders = jax.vmap(lambda key: deal_orders(key, 64, 4))(jax.random.split(jax.random.key(1), 100))
  share = np.asarray(jax.nn.one_hot(orders, 4).mean((0, 2)))  # [minibatch, position in the run]
  assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 1600)
  assert len({str(o) for o in np.asarray(orders)}) == 100


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_no_row_leaves_its_device():
  mesh = make_mesh((2, 2, 2))
  x = jax.device_put(X, NamedSharding(mesh, BATCH))
  order = deal_orders(jax.random.key(0), 32, 2)

  def inside(x, order):
    mapped = map_rows(lambda part: jnp.tanh(part @ jnp.ones((4, 4))), 4, x)
    dealt_out = map_rows(lambda part: 2 * part, 4, x, deal=Deal(x.sum((1, 2)), 2))
    return mapped, dealt_out, put_rows(x, order[0], 2, 2 * take_rows(x, order[0], 2))

  found = jax.jit(on_mesh(mesh, inside))
  text = found.lower(x, order).compile().as_text()
  assert not re.findall(MOVES, text), re.findall(MOVES, text)
  moved = jax.jit(on_mesh(mesh, lambda x: lay_rows(x[::-1]))).lower(x).compile().as_text()
  assert re.findall(MOVES, moved)  # the check finds the collectives if rows do move
  for got, want in zip(found(x, order), inside(X, order)):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)  # a sum of four may cancel
    assert got.sharding.is_equivalent_to(x.sharding, got.ndim)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
  "group, minibatches, parts",
  [
    (8, 1, 1),
    (8, 1, 4),
    (8, 1, 8),
    (8, 2, 2),
    (8, 8, 1),
    (8, 16, 1),
    (6, 1, 2),
    (6, 4, 1),
    (1, 1, 1),
  ],
)
def test_neighbours_with_one_prompt(shape, group, minibatches, parts):
  """48 rows in runs with one prompt, distributed to minibatches and split into parts. Rows that are
  reported as having the same prompt have it.
  """
  if jax.device_count() < np.prod(shape):
    pytest.skip("needs more devices")
  prompts, order = (
    np.repeat(np.arange(48 // group), group),
    deal_orders(jax.random.key(0), 48, minibatches)[0],
  )
  left = []

  def see(part):
    left.append(neighbours(dealt(group, minibatches), len(part)))
    return part.reshape(-1, left[0]).repeat(left[0], 0)

  def find(x):
    taken = take_rows(x, order, minibatches)
    deal = Deal(jnp.sin(taken.astype(jnp.float32)), dealt(group, minibatches))
    return taken, map_rows(see, parts, taken), map_rows(see, parts, taken, deal=deal)

  taken, found, by_weight = jax.jit(on_mesh(make_mesh(shape), find))(prompts)
  shards = shape[0] * shape[1]
  assert left[0] == np.gcd(dealt(group, minibatches), 48 // (minibatches * parts * shards))
  assert (found == np.asarray(taken)[:, None]).all()
  assert (by_weight == np.asarray(taken)[:, None]).all()


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole(how, parts):
  """Rows have very different lengths, so a mean of means would be different."""
  rng = np.random.default_rng(1)
  rows = {
    "x": rng.standard_normal((8, 5, 3)),
    "mask": np.arange(5) < np.array([5, 1, 3, 0, 2, 5, 4, 1])[:, None],
  }
  rows = jax.tree.map(lambda x: jnp.asarray(x, jnp.bool_ if x.dtype == bool else jnp.float32), rows)
  w = jnp.asarray(rng.standard_normal(3), jnp.float32)

  def loss(w, rows, scale):
    y = jnp.tanh(rows["x"] @ w) * scale
    return aggregate(y, rows["mask"], how, whole["mask"]), y

  whole = rows
  want = jax.value_and_grad(lambda w: aggregate(jnp.tanh(rows["x"] @ w) * 3, rows["mask"], how))(w)
  value, y, grads = optim.gradient(loss, w, rows, 3.0, parts=parts)
  np.testing.assert_allclose(value, want[0], rtol=1e-5)
  np.testing.assert_allclose(grads, want[1], rtol=1e-5)
  np.testing.assert_allclose(y, jnp.tanh(rows["x"] @ w) * 3, rtol=1e-6)


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
  """256 micro-batches with a gradient of 1/256 each. In bfloat16 the sum would stop near 1/2."""
  rows = jnp.ones((256, 1), jnp.bfloat16)

  def loss(w, rows):
    return ((rows @ w).sum() / 256, rows)

  _, _, grads = optim.gradient(loss, jnp.ones((1,), jnp.bfloat16), rows, parts=256)
  assert grads.dtype == jnp.float32
  np.testing.assert_allclose(grads, 1.0, rtol=1e-6)

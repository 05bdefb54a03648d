"""Prompts that several responses share are computed once: the numbers are the same as row by row,
with less work.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from test_transformer import ARCHS

from r2m_jax import step
from r2m_jax.algorithm import read
from r2m_jax.models import transformer
from r2m_jax.models.attention import Shared
from r2m_jax.parallel import rows as row_parts
from r2m_jax.parallel import sharding

PROMPT, REST, GROUPS, COPIES = 6, 5, 2, 3


def rows(seed=0):
  """Tokens and mask [GROUPS * COPIES, PROMPT + REST]: prompts padded on the left, responses on
  the right.
  """
  rng = np.random.default_rng(seed)
  prompts = np.repeat(rng.integers(0, 37, (GROUPS, PROMPT)), COPIES, 0)
  tokens = np.concatenate([prompts, rng.integers(0, 37, (GROUPS * COPIES, REST))], 1).astype(
    np.int32
  )
  left = np.repeat([0, 2], COPIES)[:, None] <= np.arange(PROMPT)
  right = np.arange(REST) < rng.integers(1, REST + 1, (GROUPS * COPIES, 1))
  return tokens, np.concatenate([left, right], 1)


def test_pack_and_back():
  shared = Shared(PROMPT, COPIES)
  tokens, _ = rows()
  packed = shared.pack(jnp.asarray(tokens))
  assert packed.shape == (GROUPS, PROMPT + COPIES * REST)
  np.testing.assert_array_equal(
    packed[1, PROMPT + REST : PROMPT + 2 * REST], tokens[COPIES + 1, PROMPT:]
  )
  np.testing.assert_array_equal(shared.unpack(packed), tokens)


@pytest.mark.parametrize("attention", ["xla", "dot_product"])
@pytest.mark.parametrize("name", ARCHS)
def test_states_and_gradients_are_those_of_whole_rows(name, attention):
  if attention == "dot_product" and ARCHS[name].attn_softcap:
    pytest.skip("it has no soft cap")
  with jax.enable_x64(True):
    kinds = dict(dtype=jnp.float64, param_dtype=jnp.float64, attention=(attention, "cpu"))
    graphdef, state = transformer.init(ARCHS[name], jax.random.key(0), **kinds)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), state)
    tokens, mask = rows()
    weights = rng.standard_normal((*tokens.shape, ARCHS[name].hidden_size)) * mask[..., None]

    @functools.partial(jax.jit, static_argnums=1)
    def run(state, shared):
      def loss(state):
        out = nnx.merge(graphdef, state)(tokens, mask, feedback_layer=1, shared=shared)
        return ((out.hidden + out.feedback) * weights).sum(), (out.hidden, out.feedback)

      return jax.value_and_grad(loss, has_aux=True)(state)

    whole, once = run(state, None), run(state, Shared(PROMPT, COPIES))
    close = (
      dict(rtol=1e-9, atol=1e-11) if attention == "xla" else dict(rtol=1e-4, atol=1e-4)
    )  # its softmax is float32
    for a, b in zip(whole[0][1], once[0][1]):
      np.testing.assert_allclose(b[mask], a[mask], **close)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, **close), whole[1], once[1])


def flops(cfg, shared: bool, monkeypatch) -> float:
  """FLOPs of `learn`, as counted by the compiler."""
  monkeypatch.setattr(read, "neighbours", row_parts.neighbours if shared else lambda group, rows: 1)
  built, state = small.start(cfg)
  learn = step.make_learn(built.defs, cfg, built.mesh)
  rollout = step.make_rollout(built.defs, cfg, built.mesh, (0,), 1)
  drawn = jax.eval_shape(rollout, state, small.prompts(cfg, 0))
  lowered = jax.jit(learn).lower(state, drawn)
  return lowered.cost_analysis()["flops"]


def test_a_step_computes_a_prompt_once(monkeypatch):
  """The compiler counts the layers of a scan once in both programs, so the difference is due to the
  prompts.
  """
  cfg = small.config(rollout__group_size=8, ppo__minibatches=1)
  assert flops(cfg, True, monkeypatch) < 0.8 * flops(cfg, False, monkeypatch)


CHANGES = dict(rollout__group_size=8, ppo__minibatches=2, ppo__accumulation=2, algorithm="ppo")


def three_steps(how: str, dtype: dict, monkeypatch):
  """Three steps of R2M with minibatches, micro-batches and a critic, with `shared` "once" (prompts
  are computed once) or "whole" (with every response).
  """
  with monkeypatch.context() as patched, jax.enable_x64(dtype is small.FLOAT64):
    if how == "whole":
      patched.setattr(read, "neighbours", lambda group, rows: 1)
    return small.run(small.config(**CHANGES, **dtype), 3)[0]


def test_a_step_gives_the_numbers_of_whole_rows(monkeypatch):
  once, whole = (three_steps(how, small.FLOAT64, monkeypatch) for how in ("once", "whole"))
  small.same_tokens(once, whole)
  small.equal_in_float64(small.metrics_of(once), small.metrics_of(whole))


@pytest.mark.long
def test_a_step_is_as_good_as_whole_rows_in_float32(monkeypatch):
  exact = three_steps("whole", small.FLOAT64, monkeypatch)
  once, whole = (three_steps(how, small.FLOAT32, monkeypatch) for how in ("once", "whole"))
  for outputs in (once, whole):
    small.same_tokens(outputs, exact)
  small.as_good_in_float32(*map(small.metrics_of, (once, whole, exact)))


def test_runs_that_do_not_split_over_the_mesh_are_computed_whole():
  """Two runs of three rows. They can be split over two devices, but not over three."""
  tokens, mask = rows()
  graphdef, state = transformer.init(ARCHS["plain"], jax.random.key(0))

  def read(state, shared):
    return nnx.merge(graphdef, state)(tokens, mask, shared=shared).hidden

  expected = jax.jit(read, static_argnums=1)(state, None)
  for shape in ((2, 1, 1), (3, 1, 1), (1, 2, 2)):
    mesh = sharding.make_mesh(shape)
    on_mesh = jax.device_put(state, sharding.shardings(state, mesh))
    found = jax.jit(sharding.on_mesh(mesh, lambda s: read(s, Shared(PROMPT, COPIES))))(on_mesh)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=2e-5, atol=2e-5)

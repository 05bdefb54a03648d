"""Sampling: against exact probabilities, against full forward passes, and by hand with a model that
counts down.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chi2

from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.generate import (
  GROUPED,
  decoded_places,
  generate,
  sample_keys,
  sample_token,
  stages,
)
from r2m_jax.models.logprobs import token_stats
from r2m_jax.ops import Truncation, kept, predicts_response
from r2m_jax.parallel import sharding
from r2m_jax.parallel.sharding import path_name
from r2m_jax.types import Prompts

VOCAB, TAU, T = 6, 0.7, 8
OPTIONS = (
  "group_size",
  "T",
  "temperature",
  "eos_ids",
  "pad_id",
  "repetition_stop",
  "greedy_rows",
  "waves",
  "halvings",
)
ARCH = ArchConfig(
  vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32
)


@pytest.fixture(scope="module")
def model():
  """graphdef and state of a tiny policy whose next token depends strongly on all tokens before
  it.
  """
  graphdef, state = transformer.init(ARCH, jax.random.key(3))
  state["embed"]["embedding"][...] = state["embed"]["embedding"][...] * 50
  state["lm_head"]["kernel"][...] = state["lm_head"]["kernel"][...] * 20
  for name, factor in {"q": 3, "k": 3, "o": 4}.items():
    kernel = state["layers"]["attn"][name]["kernel"]
    kernel[...] = kernel[...] * factor
  return graphdef, state


def notes(*, extra_padding=0):
  """Three prompts of 2, 4 and 3 tokens, padded on the left with a token that is also a word."""
  tokens = np.array([[5, 5, 1, 2], [3, 0, 4, 2], [5, 2, 2, 4]], np.int32)
  mask = np.arange(4) >= np.array([2, 0, 1])[:, None]
  pad = ((0, 0), (extra_padding, 0))
  tokens, mask = np.pad(tokens, pad, constant_values=4), np.pad(mask, pad)
  return Prompts(tokens=tokens, mask=mask, example_id=np.array([7, 11, 13], np.int32))


def one(prompts, i):
  return jax.tree.map(lambda x: x[i : i + 1], prompts)


@functools.partial(jax.jit, static_argnums=0, static_argnames=OPTIONS)
def draw(
  graphdef,
  state,
  prompts,
  step=0,
  *,
  group_size=4,
  T=T,
  temperature=TAU,
  eos_ids=(1, 3),
  pad_id=0,
  **others,
):
  settings = dict(
    group_size=group_size, max_new_tokens=T, temperature=temperature, eos_ids=eos_ids, pad_id=pad_id
  )
  settings |= others
  return generate(nnx.merge(graphdef, state), prompts, jax.random.key(5), step, **settings)


@functools.partial(jax.jit, static_argnums=(0, 4))
def read(graphdef, state, tokens, mask, T, temperature=TAU):
  """(log-probabilities of the last T tokens, most likely token at each of their positions), from
  one full pass.
  """
  net = nnx.merge(graphdef, state)
  hidden = predicts_response(net(tokens, mask).hidden, T)
  logprobs = token_stats(net.logits, hidden, tokens[:, -T:], temperature=temperature).logprobs
  return logprobs, net.logits(hidden).argmax(-1)


def chi_square(counts, expected):
  """(statistic, its 0.9999 quantile). Outcomes with an expected count below five are merged into
  one.
  """
  common = expected >= 5
  counts, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
  counts, expected = counts[expected > 0], expected[expected > 0]
  return ((counts - expected) ** 2 / expected).sum(), chi2.ppf(0.9999, len(counts) - 1)


def test_samples_follow_the_exact_distribution(model):
  """All outcomes of two tokens, 4096 draws, a fixed seed. A wrong temperature would fail."""
  count, eos, prompt = 4096, 0, one(notes(), 1)
  out = draw(*model, prompt, group_size=count, T=2, eos_ids=(eos,), pad_id=eos)
  pairs = np.array(list(itertools.product(range(VOCAB), repeat=2)), np.int32)
  tokens = np.concatenate([np.repeat(prompt.tokens, len(pairs), 0), pairs], 1)

  def expected(temperature):
    first, second = np.exp(
      np.asarray(read(*model, tokens, np.ones(tokens.shape, bool), 2, temperature)[0], float)
    ).T
    return count * np.where(
      pairs[:, 0] == eos, first * (pairs[:, 1] == eos), first * second
    )  # padding after the end

  drawn = np.asarray(out.tokens)[:, -2:]
  counts = np.array([(drawn == pair).all(1).sum() for pair in pairs])
  np.testing.assert_allclose(expected(TAU).sum(), count, rtol=1e-5)
  assert not counts[expected(TAU) == 0].any()
  statistic, bound = chi_square(counts, expected(TAU))
  assert statistic < bound
  for other in (0.8 * TAU, 1.25 * TAU):
    statistic, bound = chi_square(counts, expected(other))
    assert statistic > bound


def test_a_row_can_be_drawn_again_alone(model):
  """Its key is a function of run, step, prompt and sample index, and independent of the rest of the
  batch.
  """
  prompts = notes()
  everything = draw(*model, prompts)
  for i in range(3):
    alone = draw(*model, one(prompts, i))
    for name in ("tokens", "token_mask", "response_mask", "has_eos"):
      np.testing.assert_array_equal(
        getattr(alone, name), getattr(everything, name)[4 * i : 4 * i + 4], err_msg=name
      )
  fewer = draw(*model, one(prompts, 1), group_size=2)
  np.testing.assert_array_equal(fewer.tokens, everything.tokens[4:6])
  turned = draw(*model, jax.tree.map(lambda x: x[::-1], prompts))
  np.testing.assert_array_equal(
    turned.tokens.reshape(3, 4, -1)[::-1].reshape(12, -1), everything.tokens
  )


HALVED = dict(group_size=8, T=64, eos_ids=(3,))  # lengths from 2 to 49 tokens


@pytest.mark.parametrize("kind", ["slices of arrays", "arrays a layer"])
def test_the_unfinished_half_draws_the_same_tokens(model, kind):
  graphdef, state = model
  if kind == "slices of arrays":
    net = nnx.merge(*model)
    net.decodes_apart = False  # as on a TPU
    graphdef, state = nnx.split(net)
  whole = draw(graphdef, state, notes(), **HALVED)
  halved = draw(graphdef, state, notes(), halvings=3, **HALVED)
  lengths = np.sort(whole.response_mask.sum(1))
  assert lengths[12] < lengths[18] < lengths[21] < lengths[23]  # all three cases occur
  jax.tree.map(np.testing.assert_array_equal, halved, whole)


def test_the_unfinished_half_of_each_device_draws_the_same_tokens(model):
  prompts = jax.tree.map(lambda x: np.repeat(x, 2, 0)[:4], notes())
  prompts = prompts.replace(example_id=np.arange(4, dtype=np.int32))
  whole = draw(*model, prompts, **HALVED)
  mesh = sharding.make_mesh((2, 2, 2))
  graphdef, state = model
  state = jax.device_put(state, sharding.shardings(state, mesh))

  def sample(state, prompts):
    settings = dict(group_size=8, max_new_tokens=64, temperature=TAU, eos_ids=(3,), pad_id=0)
    net = nnx.merge(graphdef, state)
    return generate(net, prompts, jax.random.key(5), 0, halvings=2, **settings)

  halved = jax.jit(sharding.on_mesh(mesh, sample))(state, prompts)
  jax.tree.map(np.testing.assert_array_equal, halved, whole)


def test_decoded_places_are_those_of_a_count():
  """Eight rows: all of them for 3 tokens, then four up to the seventh token, then two, then one."""
  lengths = np.array([1, 2, 3, 3, 5, 7, 9, 10])
  assert decoded_places(lengths, 10, 0) == 8 * 10
  assert decoded_places(lengths, 10, 1) == 8 * 3 + 4 * 7
  assert decoded_places(lengths, 10, 9) == 8 * 3 + 4 * 4 + 2 * 2 + 1
  assert decoded_places(lengths, 20, 0) == 8 * 10


@pytest.mark.parametrize("greedy_rows", [False, True])
def test_waves_draw_the_same_tokens(model, greedy_rows):
  """Groups of prompts are decoded one after another, and greedy rows after all samples. The cache
  has the size of one group.
  """
  prompts = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), notes())
  prompts = prompts.replace(example_id=np.arange(6, dtype=np.int32))
  whole = draw(*model, prompts, greedy_rows=greedy_rows)
  assert not whole.has_eos.all() and whole.has_eos.any()
  for waves in (2, 3, 6):
    jax.tree.map(
      np.testing.assert_array_equal,
      draw(*model, prompts, greedy_rows=greedy_rows, waves=waves),
      whole,
    )
  text = draw.lower(*model, prompts, waves=3, greedy_rows=greedy_rows).compile().as_text()
  slots = 4 + T if greedy_rows else T  # the slots of a prompt exist once for all of its samples

  def shape(rows):
    return f"f32[{rows},1,{slots},8]"  # a layer's cache, [B, KV, S, Dh]

  per_prompt = 5 if greedy_rows else 4
  assert shape(2 * per_prompt) in text and shape(6 * per_prompt) not in text


def test_stages_cover_every_token_once():
  """One loop up to 63 tokens, four loops from 128 up. They decode tokens 1 .. T - 1 in order; token
  0 comes from the prefill.
  """
  for length, count in {1: 1, 32: 1, 63: 1, 64: 2, 100: 3, 128: 4, 511: 4, 4096: 4}.items():
    found = stages(length)
    assert len(found) == count and found[-1][1] == length
    assert [t for start, end in found for t in range(start, end)] == list(range(1, length))
    assert stages(length, growing=False) == [(1, length)]


WIDE = ARCH.replace(
  num_layers=3,
  sliding_window=3,
  sliding_layers=(0, 2),
  attn_softcap=20.0,
  qkv_bias=True,
  qk_norm=True,
)


NO_GATE = ARCH.replace(gated_mlp=False, mlp_bias=True)


@pytest.mark.parametrize(
  "arch, greedy_rows",
  [
    pytest.param(NO_GATE, False, id="no gate, biases"),
    pytest.param(WIDE, True, id="sliding, biases, norms, greedy rows"),
    # each of the two models, and rows with and without greedy ones, are in the cases above
    pytest.param(NO_GATE, True, id="no gate, biases, greedy rows", marks=pytest.mark.long),
    pytest.param(WIDE, False, id="sliding, biases, norms", marks=pytest.mark.long),
  ],
)
def test_layers_apart_and_a_growing_cache_draw_the_same_tokens(arch, greedy_rows, monkeypatch):
  """Against stacked layers and a cache of full length from the start, as on a TPU. The loops of the
  four stages have caches of 6, 8, 10 and 12 slots, and no stacked cache. Without greedy rows, each
  has 4 slots fewer, because samples share those of the prompt. Rows end in most stages.
  """
  drawn, texts = {}, {}
  for name, platform, shortest in (
    ("stacked", "tpu", 1),
    ("apart", "cpu", 64),
    ("in stages", "cpu", 2),
  ):
    monkeypatch.setattr("r2m_jax.models.generate.SHORTEST", shortest)
    graphdef, state = transformer.init(arch, jax.random.key(3), attention=("xla", platform))
    state["lm_head"]["kernel"][...] = state["lm_head"]["kernel"][...] * 15

    def is_bias(path):
      return path_name(path).endswith("bias")

    state = jax.tree_util.tree_map_with_path(
      lambda path, x: 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) if is_bias(path) else x,
      state,
    )
    one = jax.jit(
      lambda state, prompts, eos=(1,), repeat=0, graphdef=graphdef: generate(
        nnx.merge(graphdef, state),
        prompts,
        jax.random.key(5),
        0,
        group_size=8,
        max_new_tokens=T,
        temperature=TAU,
        eos_ids=eos,
        pad_id=0,
        greedy_rows=greedy_rows,
        repetition_stop=repeat,
      ),
      static_argnums=(2, 3),
    )
    texts[name] = one.lower(state, notes()).as_text()
    drawn[name] = [one(state, notes()), one(state, notes(), (1, 3), 2)]
  lengths = drawn["stacked"][0].response_mask.sum(1)
  assert {1, T} <= set(lengths.tolist()) and len(set(lengths.tolist())) > 4
  for name in ("apart", "in stages"):
    jax.tree.map(np.testing.assert_array_equal, drawn[name], drawn["stacked"])
  rows, common = (27, 0) if greedy_rows else (24, 4)  # 3 prompts x 8 samples, 3 greedy

  def shape(slots):
    return f"tensor<{rows}x1x{slots - common}x8xf32>"

  def slots_of(name):
    return [
      slots
      for slots in range(4, 4 + T + 1)
      if "stablehlo.dynamic_update_slice" in texts[name] and f"-> {shape(slots)}" in texts[name]
    ]

  assert (
    set(slots_of("in stages")) >= {6, 8, 10, 12}
    and 12 in slots_of("apart")
    and 8 not in slots_of("apart")
  )
  assert f"-> tensor<{arch.num_layers}x{rows}x1x{12 - common}x8xf32>" in texts["stacked"]


def test_steps_prompts_and_samples_differ(model):
  prompts = notes()
  tokens = np.asarray(draw(*model, prompts).tokens)
  assert (tokens != np.asarray(draw(*model, prompts, 1).tokens)).any()
  same_text = jax.tree.map(np.array, prompts)
  same_text.tokens[:], same_text.mask[:] = prompts.tokens[1], prompts.mask[1]
  rows = np.asarray(draw(*model, same_text).tokens)
  assert (
    len(np.unique(rows, axis=0)) > 4
  )  # 12 draws from one distribution; there would be 3 or 4 if a key ignored sample or prompt


def test_sample_keys_are_distinct_and_depend_on_nothing_else():
  key, ids = jax.random.key(5), jnp.array([7, 11, 13])

  def data(step, ids, size):
    return np.asarray(jax.random.key_data(sample_keys(key, step, ids, jnp.zeros_like(ids), size)))

  keys = np.concatenate([data(step, ids, 4) for step in (0, 1)])
  assert keys.shape[0] == 24 and len(np.unique(keys, axis=0)) == 24
  np.testing.assert_array_equal(data(1, ids[1:2], 2), keys[12 + 4 : 12 + 6])


@pytest.mark.parametrize("waves", [1, 2])
def test_a_prompt_that_comes_again_in_a_step_has_further_samples(model, waves):
  prompts, K = notes(), 4
  once = np.asarray(draw(*model, prompts, group_size=K).tokens)[:, -T:]
  again = jax.tree.map(lambda x: x[np.array([0, 1, 2, 0, 1, 0])], prompts)
  rows = np.asarray(draw(*model, again, group_size=K, waves=waves).tokens)[:, -T:]
  np.testing.assert_array_equal(rows[: 3 * K], once)  # those that come first do not change
  first, second, third = (rows[p * K : (p + 1) * K] for p in (0, 3, 5))
  for one, other in ((first, second), (first, third), (second, third)):
    assert (one != other).any(-1).sum() > K / 2  # a short response may come twice by chance


def check_masks(out, eos_ids, pad_id):
  """Checks every row: the mask ends with the first ending token, and padding follows. Returns
  (lengths, last tokens).
  """
  tokens, mask = np.asarray(out.tokens)[:, -T:], np.asarray(out.response_mask)
  np.testing.assert_array_equal(np.asarray(out.token_mask)[:, -T:], mask)
  lasts = []
  for row in range(len(tokens)):
    ends = [t for t in range(T) if tokens[row, t] in eos_ids]
    length = int(mask[row].sum())
    np.testing.assert_array_equal(mask[row], np.arange(T) < length)
    assert bool(out.has_eos[row]) == (bool(ends) and ends[0] < length)
    assert length == (ends[0] + 1 if out.has_eos[row] else T)
    assert (tokens[row, length:] == pad_id).all()
    lasts.append(int(tokens[row, length - 1]))
  return mask.sum(1), lasts


def test_responses_end_with_any_of_the_eos_ids_and_hold_nothing_after(model):
  prompts = notes()
  out = draw(*model, prompts)
  lengths, lasts = check_masks(out, (1, 3), 0)
  assert {1, 3} <= set(lasts) and len(set(lengths)) > 2  # both ids occur, and several lengths
  np.testing.assert_array_equal(out.tokens[:, :4], np.repeat(prompts.tokens, 4, 0))
  np.testing.assert_array_equal(out.token_mask[:, :4], np.repeat(prompts.mask, 4, 0))


def test_padding_may_be_an_eos_id(model):
  pad_id = 1
  apart, same = draw(*model, notes()), draw(*model, notes(), pad_id=pad_id)
  mask = np.asarray(apart.response_mask)
  np.testing.assert_array_equal(same.response_mask, mask)
  np.testing.assert_array_equal(same.has_eos, apart.has_eos)
  np.testing.assert_array_equal(
    np.asarray(same.tokens)[:, -T:][mask], np.asarray(apart.tokens)[:, -T:][mask]
  )
  check_masks(same, (1, 3), pad_id)
  assert not mask.all()


def test_greedy_is_the_argmax_of_full_forward_passes(model):
  """Decoding with a cache, from left-padded prompts, against one pass over the finished
  sequences.
  """
  out = draw(*model, notes(), temperature=0.0, eos_ids=(VOCAB,))
  assert not out.has_eos.any() and out.response_mask.all()
  _, best = read(*model, out.tokens, out.token_mask, T)
  np.testing.assert_array_equal(out.tokens[:, -T:], best)
  assert len(np.unique(best)) > 3


def test_left_padding_changes_neither_samples_nor_log_probabilities(model):
  near, far = draw(*model, notes()), draw(*model, notes(extra_padding=3))
  np.testing.assert_array_equal(far.tokens[:, 3:], near.tokens)
  np.testing.assert_array_equal(far.response_mask, near.response_mask)
  mask = np.asarray(near.response_mask)
  logprobs = [np.asarray(read(*model, x.tokens, x.token_mask, T)[0])[mask] for x in (near, far)]
  np.testing.assert_allclose(*logprobs, atol=1e-5)


@pytest.mark.parametrize(
  "truncation", [Truncation(), Truncation(top_k=40), Truncation(top_p=0.7)], ids=str
)
def test_a_large_vocabulary_drawn_in_two_parts_has_the_same_distribution(truncation):
  """30,000 draws from 2,112 entries. Entries rarer than one in 2,000 are counted together, by
  group.
  """
  vocab, draws = 2112, 30_000
  assert vocab >= GROUPED and vocab % 64 == 0
  logits = 2 * np.random.default_rng(0).standard_normal(vocab).astype(np.float32)
  p = np.exp(
    np.where(kept(jnp.asarray(logits / TAU), truncation), logits / TAU, -np.inf).astype(np.float64)
  )
  p /= p.sum()
  draw = jax.jit(
    lambda key: sample_token(
      jax.random.split(key, 1000), jnp.tile(logits / TAU, (1000, 1)), truncation
    ),
    compiler_options={"xla_backend_optimization_level": 2},  # sorts are slow at the tests' level 0
  )
  tokens = np.concatenate([draw(jax.random.key(i)) for i in range(draws // 1000)])
  assert (p[tokens] > 0).all()
  bins = np.where(p > 5e-4, np.arange(vocab), vocab + np.arange(vocab) % 64)

  def sums(x):
    return np.bincount(bins, x, vocab + 64)

  counts = sums(np.bincount(tokens, minlength=vocab))
  statistic, bound = chi_square(counts, draws * sums(p))
  assert statistic < bound
  skewed = p * (1 + 0.2 * np.sin(np.arange(vocab)))  # differences that the test would detect
  statistic, bound = chi_square(counts, draws * sums(skewed / skewed.sum()))
  assert statistic > bound


@pytest.mark.parametrize(
  "others", [{}, {"greedy_rows": True}, {"waves": 3}, {"group_size": 1}], ids=str
)
@pytest.mark.parametrize(
  "arch",
  [
    ARCH,
    ARCH.replace(num_heads=4, num_kv_heads=2, sliding_window=3, sliding_layers=(0,), qk_norm=True),
  ],
  ids=["full", "sliding"],
)
def test_the_kernel_of_slots_draws_the_same_tokens(arch, others):
  """As on a GPU: all rows of a prompt share its cache, or each has a copy if there are greedy
  rows.
  """
  graphdef, state = transformer.init(arch, jax.random.key(3))
  state["embed"]["embedding"][...] = state["embed"]["embedding"][...] * 50
  state["lm_head"]["kernel"][...] = state["lm_head"]["kernel"][...] * 5
  model = nnx.merge(graphdef, state)
  model.decodes_in_slots = True
  in_slots, _ = nnx.split(model)
  prompts = notes(extra_padding=2)
  want = draw(graphdef, state, prompts, **others)
  jax.tree.map(np.testing.assert_array_equal, draw(in_slots, state, prompts, **others), want)

  def count(graphdef):
    return str(draw.trace(graphdef, state, prompts, **others).jaxpr).count("pallas_call[")

  assert count(in_slots) == arch.num_layers and count(graphdef) == 0
  assert want.response_mask.sum() > 2 * len(want.tokens)


def test_sample_token_in_float64_draws_as_in_float32():
  keys = jax.random.split(jax.random.key(0), 64)
  logits = np.random.default_rng(0).normal(size=(64, VOCAB)).astype(np.float32)
  low = sample_token(keys, jnp.asarray(logits))
  with jax.enable_x64(True):
    wide = sample_token(keys, jnp.asarray(logits, jnp.float64))
  np.testing.assert_array_equal(wide, low)
  assert low.dtype == wide.dtype == jnp.int32 and len(np.unique(low)) == VOCAB


class Countdown:
  """A model whose next token is always the last one minus 1. It records its calls and the attention
  mask of each.
  """

  decodes_apart = False

  def __init__(self):
    self.calls = []

  def init_cache(self, batch, length):
    empty = jnp.zeros((1, batch, 1, length, 1))
    return transformer.Cache(k=empty, v=empty, mask=jnp.zeros((batch, length), bool))

  def __call__(self, tokens, mask, *, cache, cache_index):
    jax.debug.callback(lambda *call: self.calls.append(call), cache_index, mask, ordered=True)
    hidden = jax.nn.one_hot(tokens - 1, 16)
    return transformer.Output(hidden=hidden, feedback=hidden, cache=cache)

  def logits(self, hidden, temperature):
    return hidden / temperature


COUNTDOWN = Countdown()


@functools.partial(jax.jit, static_argnums=1)
def countdown_draw(prompts, length):
  settings = dict(group_size=2, max_new_tokens=length, temperature=0, eos_ids=(0,), pad_id=7)
  return generate(COUNTDOWN, prompts, jax.random.key(0), 0, **settings)


def count_down(starts, length=4):
  """Two greedy responses to each prompt (9, start), and the calls that they took: (cache slot,
  mask).
  """
  tokens = np.stack([np.full(3, 9), starts], 1).astype(np.int32)
  COUNTDOWN.calls.clear()
  out = countdown_draw(
    Prompts(tokens=tokens, mask=np.ones(tokens.shape, bool), example_id=np.arange(3)), length
  )
  jax.effects_barrier()
  return out, [(int(slot), np.asarray(mask)) for slot, mask in COUNTDOWN.calls]


def test_countdown_by_hand():
  out, calls = count_down([1, 3, 9])
  response = [[0, 7, 7, 7]] * 2 + [[2, 1, 0, 7]] * 2 + [[8, 7, 6, 5]] * 2
  np.testing.assert_array_equal(
    out.tokens, np.concatenate([np.repeat([[9, 1], [9, 3], [9, 9]], 2, 0), response], 1)
  )
  np.testing.assert_array_equal(out.response_mask.sum(1), [1, 1, 3, 3, 4, 4])
  np.testing.assert_array_equal(out.has_eos, [True] * 4 + [False] * 2)  # the last two were cut off
  slots, masks = zip(*calls)
  assert slots == (0, 2, 3, 4)  # prompts in one call, then T - 1 tokens
  assert masks[0].shape == (3, 2)  # each prompt is read once, not once per sample
  live = [mask[:, 0].tolist() for mask in masks[1:]]  # ended rows write no tokens
  assert live == [[False] * 2 + [True] * 4] * 2 + [[False] * 4 + [True] * 2]


def test_the_loop_stops_when_all_rows_have_ended():
  out, calls = count_down([1, 3, 2])
  assert len(calls) == 1 + 2 and out.has_eos.all()
  out, calls = count_down([1, 1, 1])
  assert len(calls) == 1 and out.has_eos.all() and out.response_mask.sum() == 6


def test_an_ending_at_the_very_last_token_counts():
  out, calls = count_down([4, 4, 4])
  assert len(calls) == 1 + 3 and out.has_eos.all() and out.response_mask.all()
  np.testing.assert_array_equal(out.tokens, [[9, 4, 3, 2, 1, 0]] * 6)


def test_one_token_is_a_length():
  out, calls = count_down([5, 1, 5], length=1)
  assert len(calls) == 1 and out.has_eos.tolist() == [False, False, True, True, False, False]
  np.testing.assert_array_equal(out.tokens[:, 2:], [[4], [4], [0], [0], [4], [4]])


def test_greedy_rows_follow_the_samples(model):
  """Adds P rows, equal to sampling at temperature 0. The samples before them do not change."""
  prompts = notes()
  plain, both = draw(*model, prompts), draw(*model, prompts, greedy_rows=True)
  greedy = draw(*model, prompts, group_size=1, temperature=0)
  for name in ("tokens", "token_mask", "response_mask", "has_eos"):
    np.testing.assert_array_equal(getattr(both, name)[:12], getattr(plain, name), err_msg=name)
    np.testing.assert_array_equal(getattr(both, name)[12:], getattr(greedy, name), err_msg=name)


@pytest.mark.parametrize("length", [1, 2])
def test_a_loop_is_cut_off_and_is_no_end(model, length):
  """Against a loop over each row of the unrestricted run: it finds the first column at which N
  tokens repeat the N tokens before them.
  """
  free = draw(*model, notes(), group_size=16)
  cut = draw(*model, notes(), group_size=16, repetition_stop=length)
  rows, lengths = np.asarray(free.tokens)[:, -T:], np.asarray(free.response_mask).sum(1)
  stopped = 0
  for i, (row, n) in enumerate(zip(rows, lengths)):
    ends = [
      t + 1
      for t in range(2 * length - 1, n)
      if list(row[t + 1 - length : t + 1]) == list(row[t + 1 - 2 * length : t + 1 - length])
    ]
    want = min(ends, default=n)
    assert cut.response_mask[i].sum() == want
    np.testing.assert_array_equal(np.asarray(cut.tokens)[i, -T:][:want], row[:want])
    assert bool(cut.has_eos[i]) == (row[want - 1] in (1, 3))
    stopped += want < n
  assert stopped > 0

"""The decoder. Oracles: a slow NumPy decoder, the decoder itself without cache or padding, and the
decoder with fewer layers.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig, RopeScaling
from r2m_jax.parallel import sharding

pytestmark = pytest.mark.numerics

ARCH = ArchConfig(
  vocab_size=37, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48
)
# All features that ARCH lacks, so that the two programs together reach every branch.
RICH = ARCH.replace(
  norm_offset=1.0,
  activation="gelu_tanh",
  tie_embeddings=True,
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  qk_norm=True,
  post_norms=True,
  embed_scale=5.0,
  attn_softcap=1.5,
  final_softcap=2.0,
  query_scale=0.3,
  sliding_window=4,
  sliding_layers=(0, 2),
  rotary_fraction=0.5,
  rope_theta=100.0,
  rope_local_theta=20.0,
  rope_scaling=RopeScaling("llama3", 8.0, original_length=16),
)
NEOX = ARCH.replace(
  norm="layer", activation="gelu", gated_mlp=False, parallel_residual=True, num_kv_heads=4
)
ARCHS = {"plain": ARCH, "rich": RICH, "neox": NEOX}
LENGTH = 11


@pytest.fixture(scope="module")
def models():
  """name -> (graphdef, state, jitted forward pass) with no parameter at its initial value.

  Under `in_float64`: the same numbers in float64.
  """
  made = {}

  def low(name):
    graphdef, state = transformer.init(ARCHS[name], jax.random.key(0))
    rng = np.random.default_rng(1)
    state = jax.tree.map(
      lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), state
    )
    return graphdef, state, forward(graphdef)

  def get(name):
    wide = jax.config.jax_enable_x64
    if (name, wide) not in made:
      if wide:
        with jax.enable_x64(False):
          _, state, _ = get(name)
        graphdef, _ = transformer.abstract(ARCHS[name], **small.FLOAT64)
        made[name, wide] = graphdef, small.widened(state), forward(graphdef)
      else:
        made[name, wide] = low(name)
    return made[name, wide]

  return get


def in_float64(test):
  """For changes that must not affect a number. Float32 rounding depends on the processor."""

  @functools.wraps(test)
  def wide(*args, **kwargs):
    with jax.enable_x64(True):
      test(*args, **kwargs)

  return wide


ROUNDING = dict(rtol=0, atol=1e-12)  # logits are below 100


def forward(graphdef, **kwargs):
  """jit (state, tokens, mask) -> (logits, feedback)."""

  @jax.jit
  def run(state, tokens, mask):
    model = nnx.merge(graphdef, state)
    out = model(tokens, mask, **kwargs)
    return model.logits(out.hidden), out.feedback

  return run


def batch(rows=3, length=LENGTH, seed=0):
  return np.random.default_rng(seed).integers(0, 37, (rows, length)).astype(np.int32), np.ones(
    (rows, length), bool
  )


def named(state):
  """{path: array}."""
  return {sharding.path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}


def oracle(arch, state, tokens):
  """Logits [L, V] and the residual stream after each layer [N, L, D] of one unpadded row, by
  loops in float64.
  """
  p = {name: np.asarray(x, np.float64) for name, x in named(state).items()}
  erf = np.vectorize(math.erf)
  act = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
  }[arch.activation]

  def norm(x, name, layer=None, kind=None):
    def get(leaf):
      return p[f"{name}/{leaf}"] if layer is None else p[f"{name}/{leaf}"][layer]

    if (kind or arch.norm) == "layer":
      return (x - x.mean()) / np.sqrt(x.var() + arch.norm_eps) * get("scale") + get("bias")
    return x / np.sqrt((x**2).mean() + arch.norm_eps) * (get("scale") + arch.norm_offset)

  def linear(x, name, layer):
    bias = p.get(f"{name}/bias")
    return x @ p[f"{name}/kernel"][layer] + (0 if bias is None else bias[layer])

  def rotated(x, position, layer):
    local = layer in arch.sliding_layers and arch.rope_local_theta is not None
    half, y = arch.rotary_dim // 2, x.copy()
    for i in range(half):
      freq = (arch.rope_local_theta if local else arch.rope_theta) ** (-2 * i / arch.rotary_dim)
      s = arch.rope_scaling
      if s is not None and not local:
        wavelength = 2 * math.pi / freq
        if wavelength > s.original_length / s.low_freq_factor:
          freq /= s.factor
        elif wavelength > s.original_length / s.high_freq_factor:
          smooth = (s.original_length / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
          )
          freq = (1 - smooth) * freq / s.factor + smooth * freq
      c, d = math.cos(position * freq), math.sin(position * freq)
      y[i], y[half + i] = x[i] * c - x[half + i] * d, x[half + i] * c + x[i] * d
    return y

  def attention(xs, layer):
    def heads(name):
      return [linear(x, f"layers/attn/{name}", layer).reshape(-1, arch.head_dim) for x in xs]

    q, k, v = heads("q"), heads("k"), heads("v")
    if arch.qk_norm:
      q = [np.array([norm(h, "layers/attn/q_norm", layer, "rms") for h in heads]) for heads in q]
      k = [np.array([norm(h, "layers/attn/k_norm", layer, "rms") for h in heads]) for heads in k]
    out = []
    for t in range(len(xs)):
      first = max(0, t - arch.sliding_window + 1) if layer in arch.sliding_layers else 0
      mixed = []
      for h in range(arch.num_heads):
        g = h // (arch.num_heads // arch.num_kv_heads)
        scores = [
          rotated(q[t][h], t, layer) @ rotated(k[s][g], s, layer) for s in range(first, t + 1)
        ]
        scores = np.array(scores) * arch.query_scale
        if arch.attn_softcap:
          scores = arch.attn_softcap * np.tanh(scores / arch.attn_softcap)
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed.append(sum(w * v[first + i][g] for i, w in enumerate(weights)))
      out.append(linear(np.concatenate(mixed), "layers/attn/o", layer))
    return out

  def mlp(x, layer):
    up = linear(x, "layers/mlp/up", layer)
    inner = act(linear(x, "layers/mlp/gate", layer)) * up if arch.gated_mlp else act(up)
    return linear(inner, "layers/mlp/down", layer)

  xs, after = [p["embed/embedding"][t] * arch.embed_scale for t in tokens], []
  for n in range(arch.num_layers):
    ys = attention([norm(x, "layers/attn_norm", n) for x in xs], n)
    if arch.post_norms:
      ys = [norm(y, "layers/attn_post_norm", n) for y in ys]
    read = xs if arch.parallel_residual else [x + y for x, y in zip(xs, ys)]
    zs = [mlp(norm(x, "layers/mlp_norm", n), n) for x in read]
    if arch.post_norms:
      zs = [norm(z, "layers/mlp_post_norm", n) for z in zs]
    xs = [x + y + z for x, y, z in zip(xs, ys, zs)]
    after.append(np.stack(xs))
  head = p["embed/embedding"].T if arch.tie_embeddings else p["lm_head/kernel"]
  logits = np.stack([norm(x, "final_norm") for x in xs]) @ head
  return arch.final_softcap * np.tanh(
    logits / arch.final_softcap
  ) if arch.final_softcap else logits, np.stack(after)


@pytest.mark.parametrize("name", ARCHS)
def test_equals_numpy_oracle(name, models):
  """In float64; and in float32 as closely as float64 with parameters rounded to float32."""
  tokens, mask = batch()
  with jax.enable_x64(True):
    _, wide, run = models(name)
    logits, moved = (
      np.asarray(run(state, tokens, mask)[0]) for state in (wide, small.rounded(wide))
    )
  reference = np.stack([oracle(ARCHS[name], wide, row)[0] for row in tokens])
  np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-13 * np.abs(reference).max())
  _, state, run = models(name)
  low = np.asarray(run(state, tokens, mask)[0], np.float64)
  small.as_good_in_float32({"logits": low}, {"logits": moved}, {"logits": reference})


@pytest.mark.parametrize("name", ["plain", "rich"])
@in_float64
def test_padding_changes_nothing(name, models):
  _, state, run = models(name)
  tokens, mask = batch()
  whole, _ = run(state, tokens, mask)
  for pad in (1, 4):  # on the left, with random tokens; the last `pad` tokens are dropped
    left = np.concatenate([batch(seed=9)[0][:, :pad], tokens[:, :-pad]], 1)
    logits, _ = run(state, left, np.arange(LENGTH)[None] >= np.full((3, 1), pad))
    np.testing.assert_allclose(logits[:, pad:], whole[:, :-pad], **ROUNDING)
  right = np.where(np.arange(LENGTH) < 7, tokens, batch(seed=9)[0])
  logits, _ = run(state, right, np.arange(LENGTH)[None] < np.full((3, 1), 7))
  np.testing.assert_allclose(logits[:, :7], whole[:, :7], **ROUNDING)
  # a gap counts as no token in positions and windows
  holed = np.insert(tokens[:, :-2], [4, 4], batch(seed=9)[0][:, :2], 1)
  keep = np.tile(~np.isin(np.arange(LENGTH), [4, 5]), (3, 1))
  logits, _ = run(state, holed, keep)
  np.testing.assert_allclose(logits[:, keep[0]], whole[:, :-2], **ROUNDING)


def test_rows_of_padding_give_no_nan(models):
  graphdef, state, run = models("rich")
  tokens, mask = batch()
  mask[1] = False
  logits, _ = run(state, tokens, mask)
  assert np.isfinite(logits).all()

  def loss(state):
    return jnp.where(mask[..., None], nnx.merge(graphdef, state)(tokens, mask).hidden, 0).sum()

  assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(state)))


@pytest.mark.parametrize("name", ["plain", "rich"])
@in_float64
def test_cache_in_a_while_loop_equals_full_pass(name, models):
  graphdef, state, run = models(name)
  tokens, mask = batch()
  mask[0, :4], mask[2, :1] = False, False
  mask[1, 9:] = False  # a row that ended early
  prefill, slots = 6, LENGTH + 3

  @jax.jit
  def decode(state, tokens, mask, cache):
    model = nnx.merge(graphdef, state)
    out = model(tokens[:, :prefill], mask[:, :prefill], cache=cache, cache_index=0)
    hidden = jnp.zeros((*tokens.shape, ARCH.hidden_size)).at[:, :prefill].set(out.hidden)

    def step(carry):
      t, hidden, cache = carry

      def at(x):
        return jax.lax.dynamic_slice_in_dim(x, t, 1, 1)

      out = model(at(tokens), at(mask), cache=cache, cache_index=t)
      return t + 1, jax.lax.dynamic_update_slice_in_dim(hidden, out.hidden, t, 1), out.cache

    _, hidden, cache = jax.lax.while_loop(
      lambda carry: carry[0] < LENGTH, step, (prefill, hidden, out.cache)
    )
    return model.logits(hidden), cache

  empty = nnx.merge(graphdef, state).init_cache(3, slots)
  assert empty.k.shape == empty.v.shape == (3, 3, 2, slots, 8) and not empty.mask.any()
  full, _ = run(state, tokens, mask)
  cached, cache = decode(state, tokens, mask, empty)
  np.testing.assert_allclose(np.asarray(cached)[mask], np.asarray(full)[mask], **ROUNDING)
  np.testing.assert_array_equal(cache.mask, np.pad(mask, ((0, 0), (0, 3))))
  stale = cache.replace(
    mask=jnp.ones_like(cache.mask)
  )  # a used cache needs no clearing: later slots are never read
  again, _ = decode(state, tokens, mask, stale)
  np.testing.assert_array_equal(np.asarray(again)[mask], np.asarray(cached)[mask])


@in_float64
def test_several_tokens_go_into_a_traced_slot(models):
  graphdef, state, run = models("rich")
  tokens, mask = batch()
  mask[0, :4] = False

  @jax.jit
  def chunks(state, index):
    model = nnx.merge(graphdef, state)
    out = model(tokens[:, :5], mask[:, :5], cache=model.init_cache(3, LENGTH), cache_index=index)
    rest = model(tokens[:, 5:], mask[:, 5:], cache=out.cache, cache_index=index + 5)
    return model.logits(jnp.concatenate([out.hidden, rest.hidden], 1))

  full, _ = run(state, tokens, mask)
  np.testing.assert_allclose(np.asarray(chunks(state, 0))[mask], np.asarray(full)[mask], **ROUNDING)


@in_float64
def test_feedback_is_the_residual_stream(models):
  graphdef, state, run = models("plain")
  tokens, mask = batch()
  layers = {0: 0, 2: 2, -2: 1}  # as requested -> counted from the front

  @jax.jit
  def taps(state):
    model = nnx.merge(graphdef, state)
    assert (out := model(tokens, mask)).feedback is out.hidden and out.cache is None
    outs = [model(tokens, mask, feedback_layer=layer) for layer in layers]
    return jnp.stack([o.feedback for o in outs]), model.logits(outs[0].hidden)

  feedback, logits = taps(state)
  reference = np.stack([oracle(ARCH, state, row)[1] for row in tokens], 1)
  np.testing.assert_allclose(feedback, reference[list(layers.values())], **ROUNDING)
  np.testing.assert_allclose(logits, run(state, tokens, mask)[0], **ROUNDING)
  with pytest.raises(ValueError, match="feedback_layer=3 is not a layer of 3"):
    nnx.merge(graphdef, state)(tokens, mask, feedback_layer=3)


@pytest.mark.parametrize("name", ARCHS)
def test_float64_all_the_way(name, models):
  """No array in the program is float32, so tests in float64 are exact; and no array is float64 in a
  float32 program.
  """
  (low, state, _), tokens = models(name), batch()[0]

  def program(graphdef, state):
    model = nnx.merge(graphdef, state)
    out = model(
      tokens, tokens >= 0, cache=model.init_cache(3, LENGTH), cache_index=0, feedback_layer=1
    )
    return model.logits(out.hidden), out

  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), state)
    for dtype in (jnp.float64, None):
      graphdef, shapes = transformer.abstract(ARCHS[name], dtype=dtype, param_dtype=jnp.float64)
      assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(shapes))
      assert "f32" not in str(jax.make_jaxpr(program, static_argnums=0)(graphdef, wide))
    assert "f64" not in str(jax.make_jaxpr(program, static_argnums=0)(low, state))
    model = nnx.merge(graphdef, wide)
    for index in (jnp.int32(2), jnp.int64(2)):  # the cache accepts a slot index of either type
      jax.eval_shape(
        lambda i: model(tokens, tokens >= 0, cache=model.init_cache(3, 20), cache_index=i), index
      )
    logits, _ = program(graphdef, wide)
    reference, _ = oracle(ARCHS[name], wide, tokens[0])
    np.testing.assert_allclose(logits[0], reference, rtol=0, atol=1e-13 * np.abs(reference).max())


def test_bfloat16_stays_close(models):
  _, state, run = models("plain")
  tokens, mask = batch()
  graphdef, _ = transformer.abstract(ARCH, dtype=jnp.bfloat16)
  out = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens, mask))(state)
  assert out.hidden.dtype == jnp.bfloat16
  model = nnx.merge(graphdef, state)
  assert model.init_cache(1, 2).k.dtype == model.unembedding().dtype == jnp.bfloat16
  logits, (full, _) = model.logits(out.hidden), run(state, tokens, mask)
  assert logits.dtype == jnp.float32

  def coarse(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)  # float64 except that parameters are rounded

  off = np.linalg.norm(run(jax.tree.map(coarse, state), tokens, mask)[0] - full)
  assert 0 < off < 0.03 * np.linalg.norm(full) and np.linalg.norm(logits - full) < 4 * off


@in_float64
def test_remat_changes_memory_not_gradients(models):
  state = models("plain")[1]
  tokens, mask = batch()

  def gradient(remat):
    graphdef, _ = transformer.abstract(ARCH, remat=remat, **small.FLOAT64)

    def loss(state):
      return (nnx.merge(graphdef, state)(tokens, mask, feedback_layer=1).hidden ** 2).sum()

    return jax.jit(jax.grad(loss))(state)

  plain = gradient("none")
  for remat in ("full", "dots"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-10), plain, gradient(remat)
    )


@in_float64
def test_a_mesh_gives_the_same(models):
  _, state, run = models("rich")
  tokens, mask = batch(rows=8)
  mesh = sharding.make_mesh((2, 2, 2))
  parts = jax.device_put(state, sharding.shardings(state, mesh))
  rows = jax.device_put((tokens, mask), jax.NamedSharding(mesh, sharding.BATCH))
  logits, _ = run(parts, *rows)
  np.testing.assert_allclose(logits, run(state, tokens, mask)[0], **ROUNDING)


def test_initial_state():
  arch = ARCH.replace(hidden_size=64, intermediate_size=256)
  graphdef, state = transformer.init(arch, jax.random.key(0), param_dtype=jnp.bfloat16)
  shapes = named(state)
  assert {name: x.shape for name, x in shapes.items()} == {
    "embed/embedding": (37, 64),
    "final_norm/scale": (64,),
    "lm_head/kernel": (64, 37),
    "layers/attn/q/kernel": (3, 64, 64),
    "layers/attn/k/kernel": (3, 64, 32),
    "layers/attn/v/kernel": (3, 64, 32),
    "layers/attn/o/kernel": (3, 64, 64),
    "layers/attn_norm/scale": (3, 64),
    "layers/mlp_norm/scale": (3, 64),
    "layers/mlp/gate/kernel": (3, 64, 256),
    "layers/mlp/up/kernel": (3, 64, 256),
    "layers/mlp/down/kernel": (3, 256, 64),
  }
  assert all(x.dtype == jnp.bfloat16 for x in shapes.values())
  std = {name: float(np.std(np.asarray(x, np.float64))) for name, x in shapes.items()}
  assert std["embed/embedding"] == pytest.approx(0.02, rel=0.1) == std["lm_head/kernel"]
  assert std["layers/mlp/up/kernel"] == pytest.approx(64**-0.5, rel=0.05)
  assert std["layers/mlp/down/kernel"] == pytest.approx(
    (256 * 6) ** -0.5, rel=0.05
  )  # 2N = 6 branches
  kernels = shapes["layers/mlp/up/kernel"]
  assert not np.array_equal(kernels[0], kernels[1])
  again = transformer.init(arch, jax.random.key(0), param_dtype=jnp.bfloat16)
  assert again[0] == graphdef and jax.tree.all(jax.tree.map(np.array_equal, again[1], state))


def test_heads():
  tokens, mask = batch()
  tied = nnx.merge(*transformer.init(ARCH.replace(tie_embeddings=True), jax.random.key(0)))
  assert not hasattr(tied, "lm_head")
  np.testing.assert_array_equal(tied.unembedding(), tied.embed.embedding[...].T)
  headless = nnx.merge(*transformer.init(ARCH.replace(lm_head=False), jax.random.key(0)))
  assert not hasattr(headless, "lm_head")
  assert jax.eval_shape(headless, tokens, mask).hidden.shape == (3, LENGTH, 32)
  with pytest.raises(ValueError, match="lm_head=False"):
    headless.unembedding()
  with pytest.raises(ValueError, match="come together"):
    tied(tokens, mask, cache=tied.init_cache(3, LENGTH))
  with pytest.raises(ValueError, match="remat='some' is unknown"):
    transformer.abstract(ARCH, remat="some")


@pytest.mark.parametrize(
  "field, value, fix",
  [
    ("num_kv_heads", 3, "must divide num_heads=4"),
    ("num_layers", 0, "positive integer"),
    ("norm", "batch", "use 'rms' or 'layer'"),
    ("activation", "relu", "use 'silu'"),
    ("rotary_fraction", 0.2, "must be even"),
    ("rotary_fraction", 1.5, "fraction of head_dim"),
    ("sliding_layers", (0,), "also set sliding_window"),
    ("attn_softcap", 0.0, "None for off"),
  ],
)
def test_arch_errors_name_field_value_and_fix(field, value, fix):
  with pytest.raises(ValueError, match=rf"ArchConfig\.{field}=.*{fix}") as error:
    ARCH.replace(**{field: value})
  assert repr(value) in str(error.value)


def test_arch_is_hashable_and_fills_in():
  arch = ArchConfig(hidden_size=64, num_heads=4, sliding_window=8, num_layers=2)
  assert (arch.head_dim, arch.num_kv_heads, arch.intermediate_size, arch.query_scale) == (
    16,
    4,
    256,
    0.25,
  )
  assert arch.sliding_layers == (0, 1) and ARCH.sliding_layers == () and ARCH.sliding_window is None
  assert len({arch, arch.replace(), arch.replace(num_layers=2)}) == 1


def test_replace_recomputes_what_follows():
  arch = ArchConfig(hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=2)
  wide = arch.replace(hidden_size=128, sliding_window=8, num_layers=3)
  assert (wide.head_dim, wide.query_scale, wide.intermediate_size, wide.num_kv_heads) == (
    32,
    32**-0.5,
    512,
    2,
  )
  assert wide.sliding_layers == (0, 1, 2) and wide.replace(sliding_window=None).sliding_layers == ()
  assert arch.replace(query_scale=0.3).replace(hidden_size=128).query_scale == 0.3

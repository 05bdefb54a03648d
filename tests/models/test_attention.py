"""Implementations of attention against the plain one, forward and backward. The kernel is also
compiled for TPUs.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.attention import attend, choose, dot_product
from r2m_jax.models.kernels.slots import Slots, attend_slots, slots_fit
from r2m_jax.models.kernels.splash import Seen, splash_attend
from r2m_jax.parallel.sharding import BATCH, make_mesh, on_mesh

ROOT = pathlib.Path(__file__).parents[2]
ARCH = ArchConfig(
  vocab_size=32,
  hidden_size=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  intermediate_size=32,
  sliding_window=20,
  sliding_layers=(0,),
  attn_softcap=5.0,
)
PLAIN = ARCH.replace(attn_softcap=None)
BOUND = dict(rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  "how, platform, arch, dtype, chosen",
  [
    ("auto", "cpu", PLAIN, "bfloat16", "xla"),
    ("auto", "tpu", PLAIN, "bfloat16", "splash"),
    ("auto", "tpu", ARCH, "float32", "splash"),
    ("auto", "tpu", ARCH, "float64", "xla"),
    ("auto", "gpu", PLAIN, "bfloat16", "cudnn"),
    ("auto", "gpu", PLAIN, "float32", "xla"),
    ("auto", "gpu", ARCH, "bfloat16", "xla"),
    ("auto", "gpu", PLAIN.replace(head_dim=256), "bfloat16", "xla"),
    ("xla", "tpu", PLAIN, "bfloat16", "xla"),
    ("splash", "cpu", ARCH, "float32", "interpreted"),
    ("dot_product", "cpu", PLAIN, "float64", "dot_product"),
    ("dot_product", "gpu", PLAIN, "bfloat16", "cudnn"),
  ],
)
def test_what_is_chosen(how, platform, arch, dtype, chosen):
  assert choose(how, platform, arch, dtype) == chosen


@pytest.mark.parametrize(
  "how, arch, dtype, why",
  [
    (
      "dot_product",
      ARCH,
      "float32",
      "config.attention is 'dot_product': it has no soft cap.*use 'xla'",
    ),
    (
      "splash",
      PLAIN,
      "float64",
      "config.attention is 'splash': the kernel has no float64; use 'xla'",
    ),
    ("flash", PLAIN, "float32", "config.attention is 'flash': choose one of 'auto'"),
  ],
)
def test_what_cannot_be_is_refused_with_the_reason(how, arch, dtype, why):
  with pytest.raises(ValueError, match=why):
    choose(how, "tpu", arch, dtype)


def problem(length, dim, heads=4, kv=2, rows=4):
  """q, k, v, the weights of a loss, and a mask of real keys, with padding on the left, on the
  right, and on both sides.
  """
  rng = np.random.default_rng(0)
  q, k, v, w = (
    jnp.asarray(rng.normal(size=(rows, n, length, dim)), jnp.float32)
    for n in (heads, kv, kv, heads)
  )
  keys = np.ones((rows, length), bool)
  keys[0, :40], keys[1, -30:], keys[2, :7], keys[2, -9:] = False, False, False, False
  return q, k, v, w, jnp.asarray(keys)


def mask_of(keys, window):
  at = np.arange(keys.shape[1])
  near = at[:, None] - at < (window or len(at))
  return jnp.asarray((at[:, None] >= at) & near)[None, None] & keys[:, None, None, :]


def compare(run, mask, q, k, v, w, keys, *, scale, cap, bound=BOUND):
  """Compares outputs and gradients of real tokens. Padding has random numbers, which must not reach
  any other token.
  """

  def loss(f):
    def total(q, k, v):
      out = f(q, k, v)
      return (jnp.where(keys[:, None, :, None], out * w, 0)).sum(), out

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

  (_, want), expected = loss(lambda *x: attend(*x, mask, scale=scale, cap=cap))(q, k, v)
  (_, got), found = loss(run)(q, k, v)
  real = np.asarray(keys)[:, None, :, None]
  np.testing.assert_allclose(np.where(real, got, 0), np.where(real, want, 0), **bound)
  for name, a, b in zip("qkv", found, expected):
    np.testing.assert_allclose(np.where(real, a, 0), np.where(real, b, 0), err_msg=name, **bound)


@pytest.mark.parametrize(
  "length, dim, window, cap",
  [
    (150, 16, None, None),
    (256, 80, None, 3.0),
    (150, 16, 20, None),
    (130, 64, 64, 3.0),
  ],
)
@pytest.mark.numerics
def test_splash_is_attention(length, dim, window, cap):
  q, k, v, w, keys = problem(length, dim)
  seen, scale = Seen(keys, window is not None), dim**-0.5

  def run(*x):
    return splash_attend(*x, seen, scale=scale, cap=cap, window=window, interpret=True)

  compare(run, mask_of(keys, window), q, k, v, w, keys, scale=scale, cap=cap)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("mesh, slides", [((2, 2, 2), True), ((1, 2, 4), False)])
@pytest.mark.numerics
def test_splash_on_a_mesh(mesh, slides):
  """Rows and heads are on their devices, whether key heads are split over the axis tensor or are
  too few. The kind of layer is traced.
  """
  *arrays, keys = problem(150, 16)
  mesh = make_mesh(mesh)
  q, k, v, w = (jax.device_put(x, NamedSharding(mesh, BATCH)) for x in arrays)

  def run(q, k, v):
    seen = Seen(keys, jnp.asarray(slides) | (q[0, 0, 0, 0] > 1e9))
    return splash_attend(q, k, v, seen, scale=0.25, cap=None, window=20, interpret=True)

  compare(
    on_mesh(mesh, run),
    mask_of(keys, 20 if slides else None),
    q,
    k,
    v,
    w,
    keys,
    scale=0.25,
    cap=None,
  )


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.numerics
def test_dot_product_is_attention(window):
  q, k, v, w, keys = problem(50, 16)
  mask = mask_of(keys, window)

  def run(*x):
    return dot_product(*x, mask, scale=0.25, implementation="xla")

  compare(run, mask, q, k, v, w, keys, scale=0.25, cap=None)


@pytest.mark.parametrize("how, arch", [("splash", ARCH), ("dot_product", PLAIN)])
@pytest.mark.numerics
def test_a_model_reads_and_decodes_alike(how, arch):
  """A prompt of 150 tokens is written to the cache, then one more token is decoded. Layers of both
  kinds, a soft cap, rotary positions.
  """
  state = transformer.init(arch, jax.random.key(0))[1]
  tokens = jax.random.randint(jax.random.key(1), (2, 151), 0, 32)
  mask = jnp.arange(151) >= jnp.asarray([40, 0])[:, None]

  def read(attention):
    graphdef = transformer.abstract(arch, attention=(attention, "cpu"))[0]

    @jax.jit
    def run(state):
      model = nnx.merge(graphdef, state)
      first = model(tokens[:, :150], mask[:, :150], cache=model.init_cache(2, 151), cache_index=0)
      return first.hidden, model(
        tokens[:, 150:], mask[:, 150:], cache=first.cache, cache_index=150
      ).hidden

    return run(state)

  real = mask[:, :150, None]
  (got, next_got), (want, next_want) = read(how), read("xla")
  np.testing.assert_allclose(
    jnp.where(real, got, 0), jnp.where(real, want, 0), rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(next_got, next_want, rtol=1e-4, atol=1e-4)


PROGRAM = """
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from r2m_jax.parallel import sharding
from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig

mesh = sharding.make_mesh((1, 2, 2), topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
arch = ArchConfig(
  vocab_size=1024, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=80, intermediate_size=512,
  sliding_window=100, sliding_layers=(0,), attn_softcap=30.0,
)
kwargs = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full")
platform = mesh.devices.flat[0].platform
graphdef, state = transformer.abstract(arch, attention=("auto", platform), **kwargs)
place = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
state = jax.tree.map(place, state, sharding.shardings(state, mesh))
rows = lambda dtype: jax.ShapeDtypeStruct((4, 300), dtype, sharding=NamedSharding(mesh, sharding.BATCH))
loss = lambda state, tokens, mask: (nnx.merge(graphdef, state)(tokens, mask).hidden.astype(jnp.float32) ** 2).sum()
traced = jax.jit(sharding.on_mesh(mesh, jax.grad(loss))).trace(state, rows(jnp.int32), rows(jnp.bool_))
text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
print("platform", platform, "kernels", text.count("tpu_custom_call"))
"""


def test_the_tpu_compiler_takes_the_kernel():
  """Forward and backward passes of both kinds of layer with heads of width 80, on a 2 x 2 slice,
  without a TPU.
  """
  pytest.importorskip("libtpu")
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  platform, kernels = done.stdout.split()[1::2]
  assert platform == "tpu" and int(kernels) >= 6  # for each kind 1 forward, 2 backward


def test_where_slots_fit():
  assert slots_fit("cudnn", PLAIN) and slots_fit("cudnn", PLAIN.replace(head_dim=128))
  assert not slots_fit("cudnn", PLAIN.replace(head_dim=80)) and not slots_fit("xla", PLAIN)


def slots_problem(heads, kv, dim, slots, common, dtype):
  """Four rows; each pair of rows shares a prompt of `common` slots. Returns (q, k, v, cache,
  prompt) and each row's whole cache.
  """
  rng = np.random.default_rng(0)

  def make(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  q, k, v = make(4, heads, 1, dim), make(4, kv, 1, dim), make(4, kv, 1, dim)
  cache = make(4, kv, slots - common, dim), make(4, kv, slots - common, dim)
  prompt = (make(2, kv, common, dim), make(2, kv, common, dim)) if common else ()
  whole = (
    [jnp.concatenate([jnp.repeat(x, 2, 0), y], 2) for x, y in zip(prompt, cache)]
    if prompt
    else cache
  )
  return (q, k, v, cache, prompt), whole


@pytest.mark.parametrize(
  "dtype, close", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(
  "heads, kv, dim, slots, common, own",
  [
    (14, 2, 16, 150, 0, 99),
    (14, 2, 16, 150, 0, 0),
    (4, 4, 32, 128, 64, 64),
    (32, 1, 16, 200, 70, 199),
    (3, 3, 16, 40, 33, 35),
  ],
)
@pytest.mark.numerics
def test_slots_give_what_the_whole_cache_gives(heads, kv, dim, slots, common, own, dtype, close):
  """Blocks of 64 that the cache does not fill, rows that start late, and 1 to 32 queries per key
  head.
  """
  given, (keys, values) = slots_problem(heads, kv, dim, slots, common, dtype)
  q, k, v, cache, _ = given
  first = jnp.asarray([0, min(own, 3), min(own, 65), min(own, common)], jnp.int32)
  run = jax.jit(
    lambda first, own, *given: attend_slots(*given, Slots(first, own), scale=0.3, interpret=True)
  )
  found, after = run(first, jnp.int32(own), *given)
  for x, new, old in zip(after, (k, v), cache):
    np.testing.assert_array_equal(x, old.at[:, :, own - common].set(new[:, :, 0]))
  keys, values = keys.at[:, :, own].set(k[:, :, 0]), values.at[:, :, own].set(v[:, :, 0])
  at = jnp.arange(slots)
  mask = (at >= first[:, None]) & (at <= own)

  def wide(x):
    return x.astype(jnp.float32)

  want = attend(wide(q), wide(keys), wide(values), mask[:, None, None], scale=0.3, cap=None)
  np.testing.assert_allclose(wide(found), want, rtol=close, atol=close)


@pytest.mark.parametrize("shape", [None, (2, 1, 1), (1, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("length, cap", [(1, None), (3, 5.0)])
@pytest.mark.numerics
def test_a_prompt_in_common_is_attended_to_as_copies_are(shape, length, cap):
  """Four rows, of which each pair shares a prompt, against the prompt copied into the cache of each
  row. Rows start late.
  """
  if shape is not None and jax.device_count() < 8:
    pytest.skip("needs eight devices")
  (_, _, _, cache, prompt), whole = slots_problem(4, 2, 16, 100, 40, jnp.float32)
  q = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, length, 16)), jnp.float32)
  first, last = jnp.asarray([0, 3, 39, 40]), 77 + jnp.arange(length)
  at = jnp.arange(100)
  mask = ((at >= first[:, None, None]) & (at <= last[:, None]))[:, None]
  settings = dict(scale=0.3, cap=cap)
  want = attend(q, *whole, mask, **settings)

  def run(q, cache, prompt, mask):
    return attend(q, *cache, mask, prompt=prompt, **settings)

  mesh = None if shape is None else make_mesh(shape)
  found = jax.jit(run if mesh is None else on_mesh(mesh, run))(q, cache, prompt, mask)
  np.testing.assert_allclose(found, want, rtol=2e-6, atol=2e-6)
  assert (
    abs(found - run(q, cache, [x[::-1] for x in prompt], mask)).max() > 0.01
  )  # each row has its own prompt


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2), (1, 1, 8)])
@pytest.mark.numerics
def test_slots_on_a_mesh(shape):
  """Rows and heads are split over devices. Heads are not split if their number is not divisible."""
  given, _ = slots_problem(4, 2, 16, 100, 40, jnp.float32)
  slots = Slots(jnp.asarray([0, 3, 39, 40], jnp.int32), jnp.int32(77))

  def run(slots, *given):
    return attend_slots(*given, slots, scale=0.3, interpret=True)

  want = jax.jit(run)(slots, *given)
  mesh = make_mesh(shape)
  placed = jax.device_put((slots, *given), NamedSharding(mesh, P()))
  found = jax.jit(on_mesh(mesh, run))(*placed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, want)

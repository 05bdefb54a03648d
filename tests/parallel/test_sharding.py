"""Mesh shapes, the layout of every parameter, and the arrays of the compiled step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r2m_jax.goldtask import task as goldtask
from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.reward import RewardHead
from r2m_jax.parallel.sharding import (
  LARGE,
  lay_rows,
  make_mesh,
  mesh_shape,
  on_mesh,
  path_name,
  shardings,
  spec_for,
)

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.mark.parametrize(
  "sizes, devices, shape",
  [
    ((1, 1, 1), 1, (1, 1, 1)),
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((2, -1, 2), 8, (2, 2, 2)),
    ((4, 2, -1), 8, (4, 2, 1)),
    ((1, 1, 1), 8, (1, 1, 1)),
    ((2, 1, 3), 8, (2, 1, 3)),
    ((2, 2, 2), 8, (2, 2, 2)),
    ((-1, 8, 1), 8, (1, 8, 1)),
  ],
)
def test_mesh_shape(sizes, devices, shape):
  assert mesh_shape(sizes, devices) == shape


@pytest.mark.parametrize(
  "sizes, devices, words",
  [
    ((-1, 3, 1), 8, "does not fit 8 device"),
    ((16, 1, 1), 8, "does not fit 8 device"),
    ((4, 4, 1), 8, "does not fit 8"),
    ((-1, 16, 1), 8, "does not fit 8"),
    ((-1, -1, 1), 8, "at most one of them -1"),
    ((0, 1, 1), 8, "three sizes"),
    ((-2, 1, 1), 8, "three sizes"),
    ((8, 1), 8, "three sizes"),
    ((2, 2, 2, 1), 8, "three sizes"),
  ],
)
def test_mesh_shape_refuses(sizes, devices, words):
  with pytest.raises(ValueError, match=words) as refusal:
    mesh_shape(sizes, devices)
  assert f"config.mesh is {sizes}" in str(refusal.value) and "such as (-1, 1, 1)" in str(
    refusal.value
  )


@needs_eight
def test_make_mesh_takes_the_first_devices_that_it_needs():
  mesh = make_mesh((2, 1, 2))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2} and mesh.axis_names == (
    "data",
    "fsdp",
    "tensor",
  )
  assert set(mesh.devices.flat) == set(jax.devices()[:4])
  assert make_mesh((-1, 2, 1)).shape["data"] == jax.device_count() // 2


WHOLE = P()
LAYERS_IN = P(None, "fsdp", "tensor")  # [N, in, out] where the output side is split
LAYERS_OUT = P(None, "tensor", "fsdp")
EXPECTED = {
  "embed/embedding": P("tensor", "fsdp"),
  "lm_head/kernel": P("fsdp", "tensor"),
  "final_norm/scale": WHOLE,
  "final_norm/bias": WHOLE,
  "layers/attn_norm/scale": WHOLE,
  "layers/attn_norm/bias": WHOLE,
  "layers/mlp_norm/scale": WHOLE,
  "layers/mlp_norm/bias": WHOLE,
  "layers/attn/q/kernel": LAYERS_IN,
  "layers/attn/k/kernel": LAYERS_IN,
  "layers/attn/v/kernel": LAYERS_IN,
  "layers/attn/o/kernel": LAYERS_OUT,
  "layers/attn/q/bias": WHOLE,
  "layers/attn/k/bias": WHOLE,
  "layers/attn/v/bias": WHOLE,
  "layers/attn/o/bias": WHOLE,
  "layers/attn/q_norm/scale": WHOLE,
  "layers/attn/k_norm/scale": WHOLE,
  "layers/mlp/gate/kernel": LAYERS_IN,
  "layers/mlp/up/kernel": LAYERS_IN,
  "layers/mlp/down/kernel": LAYERS_OUT,
  "layers/mlp/gate/bias": WHOLE,
  "layers/mlp/up/bias": WHOLE,
  "layers/mlp/down/bias": WHOLE,
}
EXPECTED_HEAD = {
  "wq/kernel": P("fsdp", "tensor"),
  "wk/kernel": P("fsdp", "tensor"),
  "wv/kernel": P("fsdp", "tensor"),
  "wo/kernel": P("tensor", "fsdp"),
  "phi/kernel": WHOLE,
  "phi/bias": WHOLE,
}


def specs(tree, mesh):
  found, _ = jax.tree_util.tree_flatten_with_path(shardings(tree, mesh))
  assert all(layout.mesh == mesh for _, layout in found)
  return {path_name(path): layout.spec for path, layout in found}


@needs_eight
def test_every_parameter_has_the_layout_of_the_table():
  """With every optional part enabled. A new parameter must be added here."""
  arch = ArchConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    norm="layer",
    qk_norm=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
  )
  mesh = make_mesh((2, 2, 2))
  assert specs(transformer.abstract(arch)[1], mesh) == EXPECTED
  head = nnx.eval_shape(lambda: nnx.state(RewardHead(16, 16, 8, rngs=nnx.Rngs(0))))
  assert specs(head, mesh) == EXPECTED_HEAD
  assert specs({"backbone": head, "phi": head}, mesh) == {
    f"{part}/{name}": spec for part in ("backbone", "phi") for name, spec in EXPECTED_HEAD.items()
  }


@needs_eight
def test_an_axis_that_does_not_divide_is_left_whole():
  mesh = make_mesh((2, 2, 2))
  assert spec_for("embed/embedding", (51, 16), mesh) == P(None, "fsdp")
  assert spec_for("embed/embedding", (50, 15), mesh) == P("tensor", None)
  assert spec_for("layers/attn/q/kernel", (3, 15, 7), mesh) == P(None, None, None)
  for shape in [(51, 16), (50, 15), (51, 15)]:  # and JAX accepts it
    array = {"embed": {"embedding": np.zeros(shape, np.float32)}}
    jax.device_put(array, shardings(array, mesh))


@needs_eight
def test_a_large_parameter_that_no_rule_matches_is_refused_with_path_and_shape():
  mesh = make_mesh((2, 2, 2))
  tree = {
    "layers": {"experts": {"router": jax.ShapeDtypeStruct((1024, LARGE // 1024), jnp.float32)}}
  }
  with pytest.raises(
    ValueError, match=r"layers/experts/router of shape \(1024, 1024\).*sharding.RULES"
  ):
    shardings(tree, mesh)
  assert spec_for("layers/experts/router", (1024, 1023), mesh) == WHOLE
  assert (
    spec_for("layers/experts/router", (1024, 1024), make_mesh((1, 1, 1))) == WHOLE
  )  # no axis to split over


def test_path_name_leaves_out_nnx_wrapping():
  paths = []
  state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
  jax.tree_util.tree_map_with_path(
    lambda path, x: paths.append(path_name(path)), {"a": [state, 0.0]}
  )
  assert sorted(paths) == ["a/0/bias", "a/0/kernel", "a/1"]


@needs_eight
def test_lay_rows_splits_rows_over_data_and_fsdp():
  mesh = make_mesh((2, 2, 2))
  out = jax.jit(on_mesh(mesh, lay_rows))(
    jax.device_put(jnp.zeros((8, 3)), NamedSharding(mesh, P()))
  )
  assert {shard.data.shape for shard in out.addressable_shards} == {(2, 3)}
  assert len({str(shard.index) for shard in out.addressable_shards}) == 4  # copies along tensor


def shapes_in(text):
  """Dimensions of every array in a compiled program, each with its line."""
  for line in text.split("\n"):
    if found := re.match(r"\s*(ROOT )?%?[\w.-]+ = (\(?.*?) [\w-]+\(", line):
      yield from (
        (tuple(map(int, dims.split(","))), line) for dims in re.findall(r"\[([\d,]+)\]", found[2])
      )


@needs_eight
def test_the_compiled_step_keeps_caches_states_and_weights_split():
  """On 2 x 2 x 2 devices, each device has a quarter of the rows and half of the heads, and gathers
  one layer at a time.

  Sizes are chosen so that a shape identifies an array: N 3 layers, D 48, Dh 12, L 3 + 10 tokens, F
  80.
  """
  N, D, F, DIM, T, KV, V = 3, 48, 80, 12, 10, 2, goldtask.VOCAB_SIZE
  cfg = small.config(
    remat="full",
    rollout__max_new_tokens=T,
    ppo__accumulation=2,
    logits_chunk=V * T // 4,
    policy__arch__num_layers=N,
    policy__arch__hidden_size=D,
    policy__arch__intermediate_size=F,
    policy__arch__num_heads=4,
    r2m__attention_dim=40,
  )
  built, state = small.start(cfg, (2, 2, 2))
  prompts = small.prompts(cfg, 0)
  L, rows = prompts.tokens.shape[1] + T, cfg.rollout.prompts * cfg.rollout.group_size
  text = small.step_of(cfg, built, state).lower(state, prompts).compile().as_text()
  shapes = list(shapes_in(text))
  caches = {
    (rows // 4, KV // 2, T, DIM),
    (cfg.rollout.prompts // 4, KV // 2, L - T, DIM),
  }  # of responses, of prompts
  assert caches | {(rows // 4, L, D), (V // 2, D // 2)} <= {shape for shape, _ in shapes}
  for shape, line in shapes:
    others = int(np.prod(shape)) // (L * D)
    if shape[-2:] == (L, D):  # hidden states; the backward pass saves N of them
      assert others <= (N if shape[0] == N else 1) * rows // 4, line
    if shape[-2:] in {(L, DIM), (T, DIM)}:  # queries, keys, values, and the cache of responses
      assert int(np.prod(shape[:-2])) <= max(N * rows // 4 * KV // 2, rows // 4 * 4 // 2), line
    if shape[-2:] == (
      L - T,
      DIM,
    ):  # the same for prompts, whose keys and values are shared by rows
      assert int(np.prod(shape[:-2])) <= cfg.rollout.prompts // 4 * max(N * KV // 2, 4 // 2), line
    if {D, F} <= set(
      shape
    ):  # one whole layer may exist, split only over tensor, but not all layers
      assert False, line
    if {D, F // 2} <= set(shape):
      assert int(np.prod(shape)) <= D * F // 2, line
  gathers = [(shape, line) for shape, line in shapes if " all-gather(" in line]
  assert any({D, F // 2} == set(shape) for shape, _ in gathers)
  assert not [
    line
    for shape, line in gathers
    if shape[0] == N or (len(shape) == 3 and shape[-1] in (D, F, F // 2))
  ]

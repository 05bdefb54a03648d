"""The planner: FLOP counts against the matrix products in the program, collectives against explicit
loops, and whole plans.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import workload
from configs import tldr_pythia_2_8b, ultrafeedback_llama3_8b, ultrafeedback_qwen2_5_3b
from r2m_jax.config import ConfigError, check_config
from r2m_jax.parallel import sharding
from r2m_jax.parallel.chips import GIB, GPUS, TPUS, parse_topology, slices_of
from r2m_jax.plan import hlo, memory, programs, report
from r2m_jax.plan import plan as planning
from r2m_jax.plan.lengths import Work, expected
from r2m_jax.plan.sizes import ARCHS, sizes_of
from r2m_jax.plan.work import ROLLOUT, Layout, phases_of
from r2m_jax.run import build
from r2m_jax.step import make_learn_at, make_rollout

ROOT = pathlib.Path(__file__).parents[2]
PAPER = {
  "qwen": ultrafeedback_qwen2_5_3b,
  "llama": ultrafeedback_llama3_8b,
  "pythia": tldr_pythia_2_8b,
}


# ---- FLOPs ----


def products(jaxpr, while_trips: int) -> float:
  """FLOPs of every matrix product in a jaxpr. The body of a scan counts once per iteration, that of
  a while loop `while_trips` times.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      contracted = eqn.params["dimension_numbers"][0][0]
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
      continue
    times = eqn.params["length"] if name == "scan" else while_trips if name == "while" else 1
    inner = [products(j, while_trips) for value in eqn.params.values() for j in jaxprs_in(value)]
    total += (max(inner) if name == "cond" else sum(inner)) * times if inner else 0
  return total


def jaxprs_in(value):
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  return [j for x in value for j in jaxprs_in(x)] if isinstance(value, (tuple, list)) else []


def counted_and_real(config, share: float = 1.0) -> dict[str, tuple[float, float]]:
  """{program: (FLOPs by the count, FLOPs of the products in its jaxpr)}, learning for a `share` of
  its positions.
  """
  sizes = sizes_of(config)
  mesh = sharding.make_mesh((1, 1, 1))
  built = build.build(config, mesh, arch=sizes.arch, reward_arch=sizes.reward_arch)
  state = programs.abstract_state(config, built)
  prompts, judged = programs.arguments(config, sizes, built)
  rollout = jax.make_jaxpr(make_rollout(built.defs, config, mesh, (1,), 0))(state, prompts)
  learn = jax.make_jaxpr(make_learn_at(share, built.defs, config))(state, *judged)
  phases = phases_of(config, sizes, Layout(1, 1, 1), "cpu", Work(share))

  def count(inside):
    return sum(phase.flops for phase in phases if (phase.name in ROLLOUT) == inside)

  trips = config.rollout.max_new_tokens - 1
  return {
    "rollout": (count(True), products(rollout.jaxpr, trips)),
    "learn": (count(False), products(learn.jaxpr, 1)),
  }


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(rollout__group_size=8, ppo__minibatches=2),
    dict(variant="vanilla"),
    dict(remat="full"),
    dict(remat="dots"),
    dict(ppo__accumulation=2, rollout__waves=2),
    dict(remat="full", logits_chunk=64),
    dict(kl__estimator="k2"),
    dict(kl__estimator="k2", logits_chunk=64),
    dict(variant="own_states", r2m__num_heads=2),
    dict(algorithm="remax"),
    dict(algorithm="ppo"),
    dict(policy__arch__gated_mlp=False, policy__arch__num_kv_heads=1),
    dict(ppo__minibatches=2, ppo__epochs=3),
  ],
  ids=str,
)
def test_counted_flops_are_the_programs_products(changes):
  for program, (counted, real) in counted_and_real(small.config(**changes)).items():
    assert counted == pytest.approx(real, rel=0.02), program


@pytest.mark.parametrize("changes", [{}, dict(remat="full"), dict(algorithm="ppo")], ids=str)
def test_counted_flops_of_packed_programs(changes):
  whole, packed = (counted_and_real(small.config(**changes), share) for share in (1.0, 0.5))
  counted, real = packed["learn"]
  assert counted == pytest.approx(real, rel=0.02)
  assert counted < 0.8 * whole["learn"][0]


def test_the_work_of_a_plan_follows_its_lengths():
  """Against the rules of the step on random lengths. For equal lengths the share is exact."""
  config = small.config(rollout__halvings=1, packing=(0.3, 0.6, 1.0))
  sizes = sizes_of(config)
  assert expected(config, sizes, 1, 1, 2) == Work()
  config.plan.lengths = (0.5,)
  work = expected(config, sizes, 1, 1, 2)
  longest = round(0.5 * sizes.response_length)
  need = (sizes.prompt_length + 2 * longest) / (sizes.prompt_length + 2 * sizes.response_length)
  assert work.share == min(share for share in config.packing if share >= need)
  assert (work.longest, work.alive) == (longest / sizes.response_length, 1.0)
  config.plan.lengths = (0.1, 1.0)
  work = expected(config, sizes, 1, 1, 2)
  assert work.longest > 0.9 and 0.5 < work.alive < 1.0
  full = phases_of(config, sizes, Layout(1, 1, 1), "cpu", Work())
  less = phases_of(config, sizes, Layout(1, 1, 1), "cpu")
  assert sum(phase.flops for phase in less) < sum(phase.flops for phase in full)


# ---- collectives ----


def collectives(f, *args):
  """`hlo.collective_bytes` of f, compiled for this process's eight CPU devices."""
  return hlo.collective_bytes(jax.jit(f).lower(*args).compile().as_text())


def on_eight(shape, *spec):
  mesh = sharding.make_mesh((1, 8, 1))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))), mesh


def test_collectives_by_hand():
  """An array of 64 x 16 float32 is 4,096 bytes; each of eight chips sends 7/8 of it, and twice that
  for a sum.
  """
  x, mesh = on_eight((64, 16), "fsdp")
  whole = NamedSharding(mesh, P())

  def gather(x):
    return jax.lax.with_sharding_constraint(jnp.sin(x), whole)

  found = collectives(gather, x)
  assert found["all-gather"] == 4096 * 7 / 8 and sum(found.values()) == found["all-gather"]
  total = collectives(lambda x: jax.lax.with_sharding_constraint(x.sum(0), whole), x)
  assert total["all-reduce"] == 2 * 16 * 4 * 7 / 8


def test_collectives_in_loops_count_as_often_as_they_run():
  x, mesh = on_eight((64, 16), "fsdp")
  split, whole = x.sharding, NamedSharding(mesh, P())
  lay = jax.lax.with_sharding_constraint

  def once(x):
    return lay(lay(jnp.sin(x), whole) * 2, split)

  def scanned(x):
    return jax.lax.scan(lambda x, _: (once(x), None), x, length=5)[0]

  def nested(x):
    return jax.lax.scan(lambda x, _: (scanned(x), None), x, length=3)[0]

  def decoded(x):  # may stop early: the limit counts
    return jax.lax.while_loop(
      lambda c: (c[0] < 7) & (c[1][0, 0] < 9), lambda c: (c[0] + 1, once(c[1])), (0, x)
    )[1]

  one = 4096 * 7 / 8
  for f, times in ((once, 1), (scanned, 5), (nested, 15), (decoded, 7)):
    assert collectives(f, x)["all-gather"] == times * one, f.__name__


# lines in the format of the TPU's compiler
TPU_HLO = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%piece.1 (p: bf16[1,128,64]) -> bf16[1,2048,64] {
  %p = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[1,2048,64]{2,1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=16] {'a'}
}

%piece.2 (p: bf16[1,128,64]) -> bf16[1,2048,64] {
  %p.2 = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.2 = bf16[1,2048,64]{2,1,0:T(8,128)} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=16] {'a'}
}

%piece.3 (p: bf16[1,128,64]) -> bf16[1,2048,64] {
  %p.3 = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.3 = bf16[1,2048,64]{2,1,0:T(8,128)} all-gather(%p.3), channel_id=7, replica_groups=mesh['a'=16] {'a'}
}

%unrolled (u: (u32[], bf16[1,128,64])) -> (u32[], bf16[1,128,64]) {
  %u = (u32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%u), index=0
  %y = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%u), index=1
  %next = u32[]{:T(128)} add(%j, %two)
  %f.3 = bf16[1,2048,64]{2,1,0:T(8,128)(2,1)} fusion(%y), kind=kOutput, calls=%piece.3
  %s.3 = (bf16[1,128,64]{2,1,0}, bf16[1,128,64]{2,1,0}) collective-permute-start(%y), channel_id=12
  %d.3 = bf16[1,128,64]{2,1,0} collective-permute-done(%s.3)
  ROOT %t.3 = (u32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) tuple(%next, %d.3)
}

%before_four (u: (u32[], bf16[1,128,64])) -> pred[] {
  %u.2 = (u32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %four = u32[]{:T(128)} constant(4)
  %j.2 = u32[]{:T(128)} get-tuple-element(%u.2), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%j.2, %four), direction=LT
}

%all-reduce-scatter.3 (q: f32[32,64]) -> f32[8,64] {
  %q = f32[32,64]{1,0:T(8,128)} parameter(0)
  ROOT %r = f32[32,64]{1,0:T(8,128)} all-reduce(%q), channel_id=9, replica_groups=[4,4]<=[16], to_apply=%add
}

%body (s: (s32[], bf16[1,128,64])) -> (s32[], bf16[1,128,64]) {
  %s = (s32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %f.1 = bf16[1,2048,64]{2,1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%piece.1
  %none = u32[]{:T(128)} constant(0)
  %u.3 = (u32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) tuple(%none, %x)
  %while.2 = (u32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) while(%u.3), condition=%before_four, body=%unrolled
  %f.2 = bf16[1,2048,64]{2,1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%piece.2
  ROOT %t = (s32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) tuple(%i, %x)
}

%cond (s: (s32[], bf16[1,128,64])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(36)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (x: bf16[1,128,64], q: f32[32,64]) -> f32[8,64] {
  %x.3 = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q.3 = f32[32,64]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %x.3)
  %while.1 = (s32[]{:T(128)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}) while(%start), condition=%cond, body=%body
  %send = (f32[32,64]{1,0}, f32[32,64]{1,0}) collective-permute-start(%q.3), channel_id=11, source_target_pairs={{0,1}}
  ROOT %out = f32[8,64]{1,0:T(8,128)} fusion(%q.3), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_collectives_as_the_tpu_compiler_writes_them():
  """The pieces of one channel count once, even if one is in a loop. There are 36 layers, a loop to
  4 in steps of two, a scattered sum that is found by its fusion's name, and a start that counts as
  its larger half.
  """
  found = hlo.collective_bytes(TPU_HLO)
  assert found["all-gather"] == 36 * 2048 * 64 * 2 * 15 / 16
  assert found["reduce-scatter"] == 32 * 64 * 4 * 3 / 4
  assert found["collective-permute"] == 32 * 64 * 4 + 36 * 2 * 128 * 64 * 2
  assert found["all-reduce"] == found["all-to-all"] == 0


def test_a_loop_whose_length_cannot_be_read_is_an_error():
  with pytest.raises(ValueError, match="length of a loop"):
    hlo.collective_bytes(TPU_HLO.replace("constant(36)", "parameter(1)"))


# ---- configs, chips, meshes ----


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize(
  "words", ["", "rloo", "grpo", "grpo,vanilla", "r2m_untrained", "rloo,noise", "iterative_head"]
)
def test_paper_configs_pass(name, words):
  config = PAPER[name].get_config(words)
  check_config(config)
  assert config.algorithm == ("grpo" if "grpo" in words else "rloo")
  expected = [word for word in words.split(",") if word not in ("", "rloo", "grpo")]
  assert config.variant == (expected[0] if expected else "r2m")


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_refuse_unknown_words(name):
  with pytest.raises(
    ValueError, match="'gpro' is unknown; use rloo, grpo, or a variant: vanilla, r2m"
  ):
    PAPER[name].get_config("gpro")


def test_paper_settings():
  """Table of settings, as the paper gives them."""
  rows = {
    "qwen": (64, 8, 100, 512, 6e-6, 1e-6, 0.7),
    "llama": (64, 8, 100, 512, 1e-6, 1e-6, 0.6),
    "pythia": (2048, 4, 122, 50, 3e-6, 5e-7, 0.6),
  }
  for name, (n, K, steps, length, lr, head_lr, floor) in rows.items():
    c = PAPER[name].get_config()
    assert (c.rollout.prompts, c.rollout.group_size, c.steps, c.rollout.max_new_tokens) == (
      n,
      K,
      steps,
      length,
    )
    assert (c.policy.lr, c.r2m.lr, c.r2m.omega_min) == (lr, head_lr, floor)
    assert (c.rollout.temperature, c.rollout.top_k, c.rollout.top_p, c.ppo.epochs) == (
      0.7,
      0,
      1.0,
      2,
    )
    assert (c.r2m.alpha, c.r2m.attention_dim, c.kl.beta, c.ppo.clip_eps) == (0.3, 2048, 0.05, 0.2)
  assert (
    PAPER["qwen"].get_config().data.max_chosen_length
    == PAPER["llama"].get_config().data.max_chosen_length
    == 512
  )


def parameters(arch) -> int:
  from r2m_jax.models import transformer

  return sum(math.prod(x.shape) for x in jax.tree.leaves(transformer.abstract(arch)[1]))


def test_shapes_have_the_published_numbers_of_parameters():
  published = {
    "qwen2.5-0.5b": 0.494e9,
    "qwen2.5-3b": 3.086e9,
    "llama3-8b": 8.030e9,
    "llama3.1-8b": 8.030e9,
    "pythia-2.8b": 2.775e9,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3.880e9,
    "gemma3-12b": 11.766e9,
    "olmo2-7b": 7_298_617_344,
    "olmo3-7b": 7_298_011_136,
    "smollm3-3b": 3_075_098_624,
    "phi4-mini": 3_836_021_760,
  }
  published |= {
    f"skywork-v2-{name}": count
    for name, count in published.items()
    if name.startswith(("qwen3", "llama3.2", "llama3.1"))
  }
  assert set(published) == set(ARCHS)
  for name, count in published.items():
    exact = isinstance(count, int)
    found = parameters(ARCHS[name])
    assert found == count if exact else found == pytest.approx(count, rel=1e-3), name


@pytest.mark.parametrize(
  "name, count",
  [
    ("v4:2x2x2", 8),
    ("v5e:4x8", 32),
    ("v5p:2x2x4", 16),
    ("v6e:16x16", 256),
    ("gpu:h100x8", 8),
    ("cpu:1", 1),
  ],
)
def test_topologies(name, count):
  assert parse_topology(name).count == count


@pytest.mark.parametrize(
  "name", ["v5e", "v5e:4x4x4", "v7x:2x2", "gpu:b200x8", "gpu:h100", "cpu:0", "v5p:4x4"]
)
def test_unknown_topologies_are_refused(name):
  with pytest.raises(
    ConfigError, match=f"config.plan.topology is '{name}': choose such as v4:2x2x4, .*auto"
  ):
    planning.topology_of(name)


def test_slices_grow():
  for chip in TPUS:
    counts = [topology.count for topology in slices_of(chip)]
    assert counts == sorted(set(counts)) and counts[0] == 4 and counts[-1] == 256
  assert all(chip.flops > 1e14 and chip.memory > 10 * GIB for chip in (*TPUS, *GPUS))


def test_state_bytes_are_those_of_the_shards():
  """The count from names and specs against the bytes on each of eight devices."""
  config = small.config(mesh=(1, 4, 2), policy__arch__hidden_size=64)
  sizes = sizes_of(config)
  built, state = small.start(config, mesh=(1, 4, 2))
  device = jax.devices()[0]
  held = sum(
    s.data.nbytes
    for x in jax.tree.leaves(state)
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    for s in x.addressable_shards
    if s.device == device
  )
  counted = sum(memory.state_on(memory.state_shapes(config, sizes), Layout(1, 4, 2)).values())
  assert counted == pytest.approx(held, abs=16)  # step, beta and omega


@pytest.mark.parametrize(
  "changes",
  [
    dict(ppo__accumulation=2),
    dict(rollout__waves=2),
    dict(remat="full"),
    dict(remat="dots"),
    dict(param_dtype="bfloat16"),
  ],
  ids=str,
)
def test_knobs_save_memory(changes):
  config = small.config(remat="none", logits_chunk=0)
  sizes = sizes_of(config)

  def peak(config):
    return {
      p: report.total(kinds)
      for p, kinds in memory.estimate(
        config, sizes, memory.state_shapes(config, sizes), Layout(1, 1, 1), "cpu"
      ).items()
    }

  before = peak(config)
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  after = peak(config)
  assert (
    min(after[p] - before[p] for p in before) < 0 and max(after[p] - before[p] for p in before) <= 0
  )


# ---- whole plans, by the command line ----


def plan(tmp_path, config: str, *settings: str):
  """(finished process, plan.json or None) of task=plan, with a cache of its own."""
  command = [
    sys.executable,
    "-m",
    "r2m_jax.main",
    f"--config={config}",
    f"--workdir={tmp_path / 'run'}",
    "--config.task=plan",
    *(f"--config.{setting}" for setting in settings),
  ]
  # the planner sets the number of devices; XLA compiles at the level of the other tests
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XLA_FLAGS": " ".join(flags)}
  env.pop("JAX_PLATFORMS", None)  # the planner sets the variables that it needs
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
  path = tmp_path / "run/plan.json"
  return done, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


QWEN = "configs/ultrafeedback_qwen2_5_3b.py"


@pytest.mark.parametrize(
  "size, variant, remat, measured",
  [
    ("0.5b", "vanilla", "dots", 17.7),
    ("0.5b", "r2m", "dots", 18.0),
    ("3b", "vanilla", "dots", 71.6),
    ("0.5b", "vanilla", "none", 42.3),
    ("0.5b", "r2m", "none", 42.6),  # before micro-batches shared prompts
  ],
)
def test_memory_counted_for_a_gpu_against_a_real_one(size, variant, remat, measured):
  """Peak GiB of three steps on an H200, measured by `python -m benchmarks.gpu --size=0.5b`; equal
  within 15%.
  """
  config = workload.get_config(size, variant, [f"remat={remat}"])
  sizes = workload.sizes_of(config, workload.POLICIES[size], workload.REWARDS[size])
  shapes, topology = memory.state_shapes(config, sizes), parse_topology("gpu:h200x1")
  counted = planning.counted_peak(config, sizes, shapes, Layout(1, 1, 1), topology) / GIB
  assert abs(counted / measured - 1) < 0.15


def test_gpu_plan_is_counted(tmp_path):
  done, plans = plan(tmp_path, QWEN, "plan.topology=gpu:h100x8")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "counted, not compiled" in done.stdout and "fits" in done.stdout
  assert not plans[0]["compiled"] and plans[0]["fits"] and np.prod(plans[0]["mesh"]) == 8
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["plan.json", "plan.txt"]


def test_smallest_slices_by_the_count(tmp_path):
  """One slice of each generation. By the count, the run does not fit the next smaller slice."""
  done, plans = plan(tmp_path, QWEN, "plan.topology=auto", "plan.compile=False")
  assert done.returncode == 0, done.stdout + done.stderr
  assert [found["topology"].split(":")[0] for found in plans] == [chip.name for chip in TPUS]
  config = PAPER["qwen"].get_config()
  sizes = sizes_of(config)
  shapes = memory.state_shapes(config, sizes)
  for one in plans:
    here = parse_topology(one["topology"])
    assert one["fits"] and not one["compiled"] and np.prod(one["mesh"]) == here.count
    smaller = [t for t in slices_of(here.chip) if t.count < here.count]
    for topology in smaller:
      found = planning.layouts(config, sizes, topology.count)
      least = min(
        planning.counted_peak(config, sizes, shapes, layout, topology) for layout in found
      )
      assert least > here.chip.memory


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_helps(tmp_path):
  done, plans = plan(tmp_path, QWEN, "plan.topology=gpu:a100x1", "ppo.accumulation=1", "remat=none")
  assert done.returncode == 1 and not plans[0]["fits"]
  assert "DOES NOT FIT" in done.stdout and "more than there are" in done.stdout
  helps = [line for line in done.stdout.splitlines() if " saves about " in line]
  saved = [float(line.split(" saves about ")[1].split()[0]) for line in helps]
  assert saved == sorted(saved, reverse=True) and any("ppo.accumulation" in line for line in helps)
  assert any("twice the chips" in line for line in helps)


def test_cpu_plan_is_compiled_and_kept(tmp_path):
  settings = ("plan.topology=cpu:2", "plan.compare=vanilla", "variant=r2m")
  done, plans = plan(tmp_path, "configs/quickstart.py:test", *settings)
  assert done.returncode == 0, done.stdout + done.stderr
  assert plans[0]["compiled"] and "compiled learn for cpu:2" in done.stderr
  assert "PFLOPs of a step" in done.stdout  # the cost of R2M compared with plain RLOO
  again, same = plan(tmp_path, "configs/quickstart.py:test", *settings)
  assert again.returncode == 0 and "compiled" not in again.stderr and same == plans


def test_an_architecture_that_is_not_here_is_refused(tmp_path):
  done, _ = plan(tmp_path, QWEN, "plan.topology=gpu:h100x8", "plan.policy=")
  assert done.returncode == 2 and "downloads nothing" in done.stderr and "qwen2.5-3b" in done.stderr


def test_a_workdir_that_cannot_be_written_is_refused_before_the_plan(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(planning, "make_plan", lambda *_: pytest.fail("planned"))
  monkeypatch.setattr(planning.programs, "prepare_environment", lambda *_: None)
  monkeypatch.setattr(planning.signal, "signal", lambda *_: None)
  config = PAPER["qwen"].get_config()
  config.plan.topology = "gpu:h100x8"
  with pytest.raises(ConfigError, match="--workdir=.*file/run cannot be used: .*Not a directory"):
    planning.run(config, tmp_path / "file/run")


def test_no_tpu_compiler_is_told_in_one_line(monkeypatch):
  monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="compiler is not installed; pip install"):
    programs.devices_of(parse_topology("v5e:2x2"))


@pytest.mark.parametrize(
  "message, temporaries",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
      "(34.26G) exceeds "
      "available HBM (15.75G).",
      34.26,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
      "Exceeded by 4.75G.",
      17.5,
    ),
  ],
)
def test_what_a_refusal_says(message, temporaries):
  assert programs.refused_temporaries(message, 3 * GIB) == pytest.approx(temporaries * GIB)


def have_tpu_compiler() -> bool:
  return programs.importlib.util.find_spec("libtpu") is not None


needs_tpu_compiler = pytest.mark.skipif(
  not have_tpu_compiler(), reason="libtpu is not installed: pip install 'r2m_jax[plan]'"
)

MESHES = """
from r2m_jax.parallel import sharding
from r2m_jax.plan import programs
from r2m_jax.parallel.chips import parse_topology
for name, shape in (("v6e:4x4", (1, 8, 2)), ("v5p:2x2x4", (2, 4, 2)), ("v5e:4x8", (1, 8, 4))):
  mesh = sharding.make_mesh(shape, programs.devices_of(parse_topology(name)))
  assert mesh.devices.shape == shape and mesh.axis_names == sharding.AXES
  assert len(set(mesh.devices.flat)) == mesh.size
"""


@needs_tpu_compiler
def test_a_mesh_may_take_a_part_of_an_axis_of_the_torus():
  own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  env = os.environ | own | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", MESHES], env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]


@needs_tpu_compiler
@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_tpu_plan_of_full_widths(tmp_path, topology):
  """Two layers of the 3B policy and of the 8B reward model, compiled by the TPU's compiler."""
  done, plans = plan(
    tmp_path,
    QWEN,
    f"plan.topology={topology}",
    "plan.layers=2",
    "plan.compare=",
    "rollout.prompts=8",
    "rollout.group_size=2",
    "rollout.max_new_tokens=64",
    "plan.prompt_length=64",
    "ppo.accumulation=1",
    "ppo.epochs=1",
    "logits_chunk=0",
    "mesh=(1, 4, 1)",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  found = plans[0]
  assert found["compiled"] and found["fits"] and np.prod(found["mesh"]) == 4
  assert all(sum(kinds.values()) > 0 for kinds in found["collectives"].values())

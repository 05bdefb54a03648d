"""The planner: counts against the program's own products, collectives against loops written out, plans end to end."""

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
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec as P

from configs import tldr_pythia_2_8b, ultrafeedback_llama3_8b, ultrafeedback_qwen2_5_3b
from r2m_jax import build, sharding
from r2m_jax.config import ConfigError, check_config
from r2m_jax.plan import hlo, knobs, memory, programs, report, run
from r2m_jax.plan.chips import GIB, GPUS, TPUS, parse_topology, slices_of
from r2m_jax.plan.sizes import ARCHS, Sizes, sizes_of
from r2m_jax.plan.work import ROLLOUT, Layout, phases_of
from r2m_jax.step import make_learn, make_rollout
from tests import small

ROOT = pathlib.Path(__file__).parents[1]
PAPER = {"qwen": ultrafeedback_qwen2_5_3b, "llama": ultrafeedback_llama3_8b, "pythia": tldr_pythia_2_8b}


# ---- FLOPs ----


def products(jaxpr, while_trips: int) -> float:
  """FLOPs of every matrix product in a jaxpr: a scan's body as often as it is long, a while's `while_trips` times."""
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


def counted_and_real(config) -> dict[str, tuple[float, float]]:
  """{program: (FLOPs by the count, FLOPs of the products in its jaxpr)}."""
  sizes = sizes_of(config)
  mesh = sharding.make_mesh((1, 1, 1))
  built = build.build(config, mesh, arch=sizes.arch, reward_arch=sizes.reward_arch)
  state = programs.abstract_state(config, built)
  prompts, judged = programs.arguments(sizes, built)
  rollout = jax.make_jaxpr(make_rollout(built.defs, config, mesh, (1,), 0))(state, prompts)
  learn = jax.make_jaxpr(make_learn(built.defs, config, mesh))(state, *judged)
  phases = phases_of(config, sizes, Layout(1, 1, 1), "cpu")
  count = lambda inside: sum(phase.flops for phase in phases if (phase.name in ROLLOUT) == inside)
  trips = config.rollout.max_new_tokens - 1
  return {"rollout": (count(True), products(rollout.jaxpr, trips)), "learn": (count(False), products(learn.jaxpr, 1))}


@pytest.mark.parametrize("changes", [
  {}, dict(variant="vanilla"), dict(remat="full"), dict(ppo__accumulation=2, rollout__waves=2),
  dict(remat="full", logits_chunk=64), dict(kl__estimator="k2"), dict(kl__estimator="k2", logits_chunk=64),
  dict(variant="own_states", r2m__num_heads=2), dict(algorithm="remax"), dict(algorithm="ppo"),
  dict(policy__arch__gated_mlp=False, policy__arch__num_kv_heads=1), dict(ppo__minibatches=2, ppo__epochs=3),
], ids=str)  # fmt: skip
def test_counted_flops_are_the_programs_products(changes):
  for program, (counted, real) in counted_and_real(small.config(**changes)).items():
    assert counted == pytest.approx(real, rel=0.02), program

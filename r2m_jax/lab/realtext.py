"""task = "lab_text": the laboratory on real text. See docs/lab.md, "The second task".

  policy -> gold reward model on all pairs -> a seed: noisy subset, proxy reward model -> RL, arm by arm -> table

Each stage leaves a folder, so that the same command goes on where it stopped.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from r2m_jax import export, finetune, scratch, sharding
from r2m_jax.config import check_batch
from r2m_jax.folders import Policy, load_policy, mesh_of
from r2m_jax.train import claim


def run(config, workdir: Path) -> None:
  """Runs what is not there yet; ends with WORKDIR/table, summary.csv and report.html."""
  workdir, mesh = workdir.absolute(), mesh_of(config)
  check_batch(config, tuple(mesh.shape.values()))
  scratch.require_data(config)
  claim(config, workdir)
  print(f"r2m_jax  lab_text: {mesh.size} {jax.devices()[0].platform} device(s), {config.dtype}; writes {workdir}")
  sft = Path(config.policy.path) if config.policy.path else scratch.make_policy(config, workdir, mesh)[1]
  make_gold(config, workdir, mesh, sft)


# ---- gold ----


def grow(policy: Policy, factor: int) -> tuple:
  """(arch, state) of the policy with `factor` times its layers, which says what the policy says until it is trained.

  After each layer come copies of it whose output projections are zero, so that they add nothing to the residual stream:
  block expansion, Wu et al., LLaMA Pro (arXiv 2401.02415), section 3.2.
  """
  sliding = policy.arch.sliding_layers
  if sliding is not None:
    sliding = tuple(factor * layer + copy for layer in sliding for copy in range(factor))
  arch = policy.arch.replace(num_layers=factor * policy.arch.num_layers, sliding_layers=sliding)

  def expand(path, x):
    name = sharding.path_name(path)
    if not name.startswith("layers/"):
      return x
    x = jnp.repeat(x, factor, 0)
    copies = jnp.arange(len(x)) % factor > 0
    adds = name.startswith(("layers/attn/o/", "layers/mlp/down/"))
    return jnp.where(copies.reshape(-1, *[1] * (x.ndim - 1)), 0, x) if adds else x

  state = jax.tree_util.tree_map_with_path(expand, policy.state)
  return arch, state


def make_gold(config, workdir: Path, mesh, sft: Path) -> Path:
  """The folder of the gold reward model: config.gold.path, or one grown from the policy and fitted to all pairs."""
  out, folder = workdir / "models/gold", workdir / "gold"

  def make(out):
    policy = load_policy(str(sft), config, mesh)
    arch, state = grow(policy, config.gold.depth)
    grown = Policy(policy.folder, arch, policy.graphdef, state, policy.tokenizer)
    settings = scratch.derived(config, "reward", config.scratch.pairs, policy__path=str(workdir / "models/grown"))
    settings.reward.update({name: value for name, value in config.gold.items() if name not in ("path", "depth")})
    export.write_policy(workdir / "models/grown", settings, grown, state, workdir)
    claim(settings, folder)
    finetune.run_reward(settings, folder, mesh, out=out)

  scratch.once(workdir, "gold", out, make)
  return out

"""How to make a run fit: each knob's effect on bytes per chip, by the counted memory
(`memory.estimate`).
"""

from r2m_jax.parallel.chips import GIB
from r2m_jax.plan import memory
from r2m_jax.plan.report import total
from r2m_jax.plan.sizes import Sizes
from r2m_jax.plan.work import Layout


def changed(config, changes: dict):
  """A copy of the config with dotted fields set."""
  copy = config.copy_and_resolve_references()
  with copy.unlocked():
    copy.update_from_flattened_dict(changes)
  return copy


def candidates(config, sizes: Sizes, layout: Layout) -> list[tuple[str, dict]]:
  """(command-line form, {field: value}) of settings that may reduce a run's memory."""
  rows = sizes.prompts * config.rollout.group_size // (layout.shards * config.ppo.minibatches)
  prompts = sizes.prompts // layout.shards
  found = []
  for field, now, most in (
    ("ppo.accumulation", config.ppo.accumulation, rows),
    ("rollout.waves", config.rollout.waves, prompts),
  ):
    larger = [n for n in range(now + 1, most + 1) if most % n == 0]
    found += [(f"--config.{field}={n}", {field: n}) for n in larger[:1] + larger[-1:]]
  if config.remat != "full":
    found.append(("--config.remat=full", {"remat": "full"}))
  if config.param_dtype == "float32":
    found.append(("--config.param_dtype=bfloat16", {"param_dtype": "bfloat16"}))
  if config.policy.moment_dtype == "float32":
    found.append(("--config.policy.moment_dtype=bfloat16", {"policy.moment_dtype": "bfloat16"}))
  chunk = config.logits_chunk or sizes.response_length * sizes.arch.vocab_size
  found.append((f"--config.logits_chunk={chunk // 4}", {"logits_chunk": chunk // 4}))
  return found


def suggestions(config, sizes: Sizes, layout: Layout, platform: str) -> list[tuple[str, float]]:
  """(knob, GiB per chip saved at the peak), the largest saving first; more chips are one of the
  options.
  """
  shapes = memory.state_shapes(config, sizes)

  def kinds(config, shapes, layout):
    return memory.estimate(config, sizes, shapes, layout, platform).values()

  def peak(*args):
    return max(map(total, kinds(*args)))

  now, saved = peak(config, shapes, layout), []
  everything: dict = {}
  for name, changes in candidates(config, sizes, layout):
    everything |= changes  # for one field the last option, which saves most
    other = changed(config, changes)
    own = (
      memory.state_shapes(other, sizes)
      if changes.keys() & {"param_dtype", "policy.moment_dtype"}
      else shapes
    )
    saved.append((name, (now - peak(other, own, layout)) / GIB))
  other = changed(config, everything)
  together = peak(other, memory.state_shapes(other, sizes), layout)
  saved.append(("every setting named here, together,", (now - together) / GIB))
  larger = Layout(layout.data, layout.fsdp * 2, layout.tensor)
  if sizes.prompts % larger.shards:
    larger = Layout(layout.data, layout.fsdp, layout.tensor * 2)
  saved.append((f"twice the chips ({larger.chips})", (now - peak(config, shapes, larger)) / GIB))
  return sorted((x for x in saved if x[1] > 0.005), key=lambda x: -x[1])

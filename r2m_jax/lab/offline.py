"""Stored samples of `vanilla` at growing KL, with everything that a reward may read from them: the
first half of the table in docs/holds.md.

No reward is trained here. `snapshots` runs `vanilla` for many seeds in one program and keeps each
seed's policy when its KL first passes a target. `collect` samples from each of these policies and
stores, for every row, the frozen and the live states. lab/offline_table.py fits and scores.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.read import read_feedback, sampling
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.stages import contrast_pairs, noisy_preferences, preferences, sample
from r2m_jax.lab import grid
from r2m_jax.lab.together import pick
from r2m_jax.models.reward import member_scores, read_rte
from r2m_jax.ops import at_least_f32, combine, masked_mean
from r2m_jax.parallel import hosts
from r2m_jax.parallel.sharding import jit_on
from r2m_jax.run.build import Build, make_first_state
from r2m_jax.run.files import write_atomic
from r2m_jax.run.fit import PARTIAL
from r2m_jax.run.loop import Seen
from r2m_jax.run.run import Run, train
from r2m_jax.types import Sequences

TARGETS = (0.5, 2.0, 4.0, 8.0)  # nats a sequence
STEPS = 160  # maximum steps of RL; a run ends when all its seeds have passed the last target
FRESH, SCORED, HELD_OUT = 10, 11, 12  # streams of prompts, in addition to those of goldtask.stages
FRESH_PROMPTS, FRESH_GROUP = 320, 2  # as many prompts as 20 steps of 16
SCORED_PROMPTS, SCORED_GROUP = 256, 8
KEY_OFFLINE = 2**31 - 12  # of the samples
ROWS = 1024  # rows that are read at a time
CLIP = 4.0  # limit of a token's log-ratio, nats
APART = 16  # distance to the row whose log-ratios `shuffled` uses: another prompt's


def settings(config, seed: int = 0):
  """The config of the runs that are sampled: `vanilla` at the KL weight 0.02."""
  config = grid.with_seed(config, seed)
  config.task, config.variant = "lab", "vanilla"
  config.steps, config.kl.beta = STEPS, 0.02
  config.log.checkpoint_every = 20
  return config


# ---- the policies ----


def policy_path(workdir: Path, seed: int, target: float) -> Path:
  return workdir / "policies" / f"seed_{seed}_kl_{target:g}.npz"


def rows_path(workdir: Path, seed: int, target: float) -> Path:
  return workdir / "rows" / f"seed_{seed}_kl_{target:g}.npz"


def save_arrays(path: Path, arrays: dict) -> None:
  """Writes a compressed npz, atomically."""
  data = io.BytesIO()
  np.savez_compressed(data, **arrays)
  write_atomic(path, data.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as stored:
    return dict(stored)


def snapshots(config, seeds: Sequence[int], targets: Sequence[float], workdir: Path) -> None:
  """Runs `vanilla` for all seeds and saves each seed's policy at each target.

  It is the policy after the first step whose measured KL reaches the target, as for
  `vanilla.stopped_at_kl_X`, so the deciding samples are not drawn from it. A seed that does not
  reach the target within config.steps has no file.
  """
  ended = workdir / "policies" / f"ended_{grid.short(list(seeds), list(targets))}"
  if ended.exists():
    return
  run = grid.run_of("vanilla", config, [(seed, 1.0) for seed in seeds], workdir)
  run = dataclasses.replace(
    run,
    steps=keeping(run, seeds, targets, workdir),
    watch=until_passed(seeds, targets, workdir),
  )
  folder = workdir / PARTIAL / ended.name
  write_atomic(folder / "config.json", config.to_json())
  train(run, folder)
  write_atomic(ended, "")


def keeping(run: Run, seeds, targets, workdir: Path) -> Callable:
  """Wraps `run.steps` so that `measure` also saves each policy that has just passed a target."""

  def steps(state):
    made = run.steps(state)

    def measure(t: int, states, out, batch):
      for i, kl in enumerate(np.asarray(out.metrics["kl"])):
        for target in targets:
          path = policy_path(workdir, seeds[i], target)
          if kl >= target and not path.exists():
            save_policy(path, pick(states.policy, i), step=t + 1, kl=float(kl))
      return made.measure(t, states, out, batch)

    return made._replace(measure=measure)

  return steps


def until_passed(seeds, targets, workdir: Path) -> Callable:
  """A watch that ends the run once every seed has passed the last target."""

  def watch(state, step: int, metrics) -> Seen:
    del state, step, metrics
    passed = [policy_path(workdir, seed, max(targets)).exists() for seed in seeds]
    return Seen(stop="all seeds have passed the last KL" if all(passed) else "")

  return watch


def save_policy(path: Path, policy, **facts) -> None:
  leaves = jax.device_get(jax.tree.leaves(policy))
  save_arrays(path, {f"leaf_{i}": leaf for i, leaf in enumerate(leaves)} | facts)


def load_policy(path: Path, like):
  """(policy with the structure of `like`, {"step", "kl"})."""
  stored = load_arrays(path)
  leaves, structure = jax.tree.flatten(like)
  policy = jax.tree.unflatten(structure, [stored[f"leaf_{i}"] for i in range(len(leaves))])
  return policy, {name: float(stored[name]) for name in ("step", "kl")}


# ---- the rows ----


def make_reader(config, built: Build) -> Callable[..., dict[str, np.ndarray]]:
  """Builds `read(policy, ref, reward, sequences) -> {name: [B, ...]}` on the host:

  rte       f32[B, Dr], the reward token embedding.
  frozen    f32[B], the frozen reward.
  flat      f32[B, Dp], mean over the response's tokens of the reference's last-layer states h.
  attended  f32[B, Dp], sum_s a_s h_s with a = softmax(q.k_s / sqrt(d)), q = rte W_q, k = h W_k,
            W_q and W_k random and fixed: those of the run's first reward head.
  weighted  the same with a = softmax(q.k_s / sqrt(d) + clip(l_s, -4, 4)),
            l_s = log pi(y_s) - log pi_ref(y_s).
  shuffled  the same with the l of another row, of another prompt.
  live      f32[B, Dp], mean over the response's tokens of the policy's own states.
  counts    f32[B, V], how often the response has each word.
  log_ratio f32[B], sum_s l_s.
  """
  reading = sampling(config) | dict(layer=config.r2m.feedback_layer, chunk=0)
  vocab = np.arange(goldtask.VOCAB_SIZE)

  @jit_on(built.mesh)
  def read(policy, ref, reward, head, sequences: Sequences):
    shown = sequences.response_mask
    T = shown.shape[1]
    new = read_feedback(built.defs.open_policy(policy, ref), sequences, **reading)
    old = read_feedback(built.defs.open_ref(ref), sequences, **reading)
    backbone = nnx.merge(built.defs.reward_backbone, reward["backbone"])
    rte = read_rte(backbone, sequences.tokens, sequences.token_mask)
    states, own = (at_least_f32(x.hidden[:, -T:]) for x in (old, new))
    log_ratio = jnp.where(shown, new.logprobs - old.logprobs, 0)
    logits = attention_logits(head, rte, states)

    def attend(live):
      return attended(states, logits + jnp.clip(live, -CLIP, CLIP), shown)

    scores = member_scores(nnx.merge(built.defs.phi, reward["phi"]), rte)
    words = (sequences.tokens[:, -T:, None] == vocab) & shown[..., None]
    return dict(
      rte=rte,
      frozen=combine(scores, config.reward.combine, config.reward.variance_weight),
      flat=masked_mean(states, shown[..., None], 1),
      attended=attend(jnp.zeros_like(log_ratio)),
      weighted=attend(log_ratio),
      shuffled=attend(jnp.roll(log_ratio, APART, 0)),
      live=masked_mean(own, shown[..., None], 1),
      counts=words.sum(1).astype(jnp.float32),
      log_ratio=log_ratio.sum(-1),
    )

  return read


def attention_logits(head, rte: jax.Array, states: jax.Array) -> jax.Array:
  """q.k_s / sqrt(d) of eq. 3 with one head.   rte f32[B, Dr], states f32[B, T, Dp] -> f32[B, T]."""
  wq, wk = head["wq"]["kernel"][...], head["wk"]["kernel"][...]
  return jnp.einsum("bd,btd->bt", rte @ wq, states @ wk) * wk.shape[1] ** -0.5


def attended(states: jax.Array, logits: jax.Array, shown: jax.Array) -> jax.Array:
  """sum_s softmax(logits)_s states_s over the unmasked tokens.   -> f32[B, Dp]."""
  weights = jax.nn.softmax(jnp.where(shown, logits, jnp.finfo(logits.dtype).min))
  return jnp.einsum("bt,btd->bd", weights, states)


def read_all(read: Callable, sequences: Sequences) -> dict[str, np.ndarray]:
  """`read` for any number of rows, `ROWS` at a time; the last part is padded with its first row."""
  count, found = len(sequences.tokens), []
  for start in range(0, count, ROWS):
    part = jax.tree.map(lambda x: np.asarray(x)[start : start + ROWS], sequences)  # noqa: B023
    size = len(part.tokens)
    part = jax.tree.map(lambda x: np.resize(x, (ROWS, *x.shape[1:])), part)
    found.append(pick(hosts.fetch(read(part)), slice(size)))
  return jax.tree.map(lambda *x: np.concatenate(x), *found)


def rows_of(pairs: dict[str, np.ndarray]) -> Sequences:
  """Stored pairs, tokens and mask [N, 2, L], as 2N rows."""
  tokens, mask = (pairs[name].reshape(-1, pairs[name].shape[-1]) for name in ("tokens", "mask"))
  response = mask[:, goldtask.PROMPT_LENGTH :]
  last = tokens[:, goldtask.PROMPT_LENGTH :][np.arange(len(tokens)), response.sum(1) - 1]
  return Sequences(tokens, mask, response, last == goldtask.EOS)


def mismatched(sequences: Sequences) -> Sequences:
  """Each row's prompt with the response of the next row: a response to another prompt, if there is
  one row per prompt.
  """
  prompt = sequences.tokens[:, : goldtask.PROMPT_LENGTH]
  other = jax.tree.map(lambda x: np.roll(np.asarray(x), -1, 0), sequences)
  tokens = np.concatenate([prompt, other.tokens[:, goldtask.PROMPT_LENGTH :]], 1)
  return other.replace(tokens=tokens)


def draw(config, built: Build, policy, stream: int, prompts: int, group: int) -> Sequences:
  """`group` samples of `policy` for each of `prompts` prompts from a separate stream."""
  notes = goldtask.prompts(config.seed, stream, 0, prompts)
  notes = notes.replace(example_id=notes.example_id + stream * 2**24)
  return sample(config, built, policy, notes, group_size=group, purpose=KEY_OFFLINE)


def firsts(sequences: Sequences, group: int) -> Sequences:
  """The first sample of each prompt."""
  return jax.tree.map(lambda x: np.asarray(x)[::group], sequences)


def collect(
  config, built: Build, policies, workdir: Path, target: float, reader, old: dict
) -> None:
  """Reads one seed's rows at one target and stores the results.

  The sets of rows, as SET/NAME in the file:

    old, old_other        the reward model's own pairs, and their prompts with the preferred
                          response to the next prompt
    fresh, fresh_other    320 prompts x 2 samples of the policy, and the first ones mismatched
    scored                256 prompts x 8 samples of the policy: for scoring alone

  Args:
    policies: (the reference, the reward model, the first reward head) of the seed.
    old: the reward model's own pairs, of `noisy_preferences`.
  """
  (ref, reward, head), found = policies, {}
  policy, facts = load_policy(policy_path(workdir, config.seed, target), ref)
  fresh = draw(config, built, policy, FRESH, FRESH_PROMPTS, FRESH_GROUP)
  sets = {
    "old": rows_of(old),
    "old_other": pick(rows_of(contrast_pairs(old, 1)), slice(1, None, 2)),
    "fresh": fresh,
    "fresh_other": mismatched(firsts(fresh, FRESH_GROUP)),
    "scored": draw(config, built, policy, SCORED, SCORED_PROMPTS, SCORED_GROUP),
  }
  for name, sequences in sets.items():
    parts = goldtask.gold(sequences, config.gold.formula)
    rows = read_all(lambda part: reader(policy, ref, reward, head, part), sequences)
    rows |= {"gold": parts.gold, "coverage": parts.coverage, "length": parts.length}
    found |= {f"{name}/{key}": np.asarray(value, np.float32) for key, value in rows.items()}
  found |= {"old/a_wins": old["a_wins"], "phi": np.asarray(reward["phi"]["kernel"][...])[:, 0]}
  save_arrays(rows_path(workdir, config.seed, target), found | facts)


def held_out(config, built: Build, policies, workdir: Path, count: int, reader) -> None:
  """Stores a tuning seed: its old pairs and `count` more with the labeller's noise, all read by the
  first policy. Gold is not stored.
  """
  ref, reward, head = policies
  path = rows_path(workdir, config.seed, 0.0)
  if path.exists():
    return
  more = preferences(
    config, built, ref, HELD_OUT, goldtask.prompts(config.seed, HELD_OUT, 0, count)
  )
  noise = dict(temperature=config.reward.choice_temperature, flip=config.reward.label_flip)
  more["a_wins"] = goldtask.noisy_choice(*more["gold"].T, config.seed + 10**6, **noise)
  found = {"phi": np.asarray(reward["phi"]["kernel"][...])[:, 0]}
  for name, pairs in (("old", noisy_preferences(config, built, ref)), ("held_out", more)):
    rows = read_all(lambda part: reader(ref, ref, reward, head, part), rows_of(pairs))
    found |= {f"{name}/{key}": value for key, value in rows.items()}
    found[f"{name}/a_wins"] = pairs["a_wins"]
  save_arrays(path, found)


def sample_all(config, seeds: Sequence[int], targets: Sequence[float], workdir: Path) -> None:
  """`snapshots` of the seeds together, then `collect` for each unfinished seed that has reached the
  target.
  """
  snapshots(config, seeds, targets, workdir)
  for seed, mine, built, reader, policies in starts(config, seeds, workdir):
    passed = [target for target in targets if policy_path(workdir, seed, target).exists()]
    missing = [target for target in passed if not rows_path(workdir, seed, target).exists()]
    old = noisy_preferences(mine, built, policies[0]) if missing else {}
    for target in missing:
      collect(mine, built, policies, workdir, target, reader, old)
    print(f"rows     seed {seed}, KL {', '.join(f'{kl:g}' for kl in passed)}", flush=True)


def tune_all(config, seeds: Sequence[int], count: int, workdir: Path) -> None:
  """`held_out` of the tuning seeds."""
  for _, mine, built, reader, policies in starts(config, seeds, workdir):
    held_out(mine, built, policies, workdir, count, reader)


def starts(config, seeds: Sequence[int], workdir: Path):
  """(seed, its config, build, reader, (reference, reward model, first reward head)) of each seed."""
  built, policies, rewards, _ = grid.starts_of(config, tuple(seeds), workdir)
  reader = make_reader(config, built)
  first = jax.jit(make_first_state(config, built))
  for seed in seeds:
    reward = rewards[seed]
    state = first(jax.random.key(seed), policies[seed], reward["backbone"], reward["phi"])
    mine = grid.with_seed(config, seed)
    yield seed, mine, built, reader, (policies[seed], reward, state.reward_head)

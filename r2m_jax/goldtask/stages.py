"""The stages before RL on the gold-reward task: the supervised policy, noisy preferences, the proxy
reward model.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.certify import root
from r2m_jax.algorithm.optim import make_optimizer
from r2m_jax.goldtask import task as goldtask
from r2m_jax.models.generate import generate
from r2m_jax.models.reward import member_scores, read_rte
from r2m_jax.ops import combine, response_part
from r2m_jax.parallel import hosts
from r2m_jax.parallel.sharding import jit_on
from r2m_jax.run.build import KEY_INIT, KEY_PAIRS, Build, init_policy, init_reward_model
from r2m_jax.run.fit import Job, do, epochs_of_rows, reward_loss, sft_loss, warm_job
from r2m_jax.run.metrics import Metrics
from r2m_jax.types import Prompts, Sequences

# streams of prompts; stream 0 is for demonstrations, 5 is labels.STREAM_LABELS
STREAM_PAIRS, STREAM_HELDOUT, STREAM_RL, STREAM_TABLE = range(1, 5)
STREAM_PROBE, STREAM_BEST, STREAM_ANALYSE, STREAM_EVALUATION = range(6, 10)
CHUNK = 64  # prompts sampled at a time


@functools.cache
def sampler(policy_def, mesh, *, group_size: int, max_new_tokens: int, temperature: float):
  """Builds the jitted `draw(policy, prompts, key) -> Sequences`; one program for all calls with the
  same settings.
  """

  @jit_on(mesh)
  def draw(policy, prompts, key):
    return generate(
      nnx.merge(policy_def, policy),
      prompts,
      key,
      0,
      group_size=group_size,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      eos_ids=(goldtask.EOS,),
      pad_id=goldtask.PAD,
    )

  return draw


def sample(
  config, built: Build, policy, prompts: Prompts, *, group_size: int, purpose: int
) -> Sequences:
  """Samples on the host, `CHUNK` prompts at a time."""
  key = jax.random.fold_in(jax.random.key(config.seed), purpose)
  rollout = config.rollout
  draw = sampler(
    built.defs.policy,
    built.mesh,
    group_size=group_size,
    max_new_tokens=rollout.max_new_tokens,
    temperature=rollout.temperature,
  )
  count = len(prompts.tokens)
  if count % CHUNK:  # one shape means one compilation: the last chunk is padded with the first rows
    prompts = jax.tree.map(
      lambda x: np.concatenate([x, np.resize(x, (-count % CHUNK, *x.shape[1:]))]), prompts
    )
  chunks = [
    hosts.fetch(draw(policy, jax.tree.map(lambda x: x[i : i + CHUNK], prompts), key))
    for i in range(0, count, CHUNK)
  ]
  return jax.tree.map(lambda *x: np.concatenate(x)[: count * group_size], *chunks)


def sft_job(config, built: Build) -> Job:
  """The fit of the policy, from random weights, on imperfect demonstrations."""
  settings = config.sft
  notes, responses, lengths = goldtask.demonstrations(
    config.seed, settings.examples, config.rollout.max_new_tokens
  )
  tokens = np.concatenate([notes.tokens, responses], 1)
  response_mask = np.arange(responses.shape[1]) < lengths[:, None]
  token_mask = np.concatenate([notes.mask, response_mask], 1)

  def batches():
    for rows in epochs_of_rows(config.seed, len(tokens), settings.batch_size, settings.steps):
      rows = hosts.take(rows, built.rows)
      yield {
        "tokens": tokens[rows],
        "token_mask": token_mask[rows],
        "response_mask": response_mask[rows],
      }

  policy = init_policy(config, built, jax.random.fold_in(jax.random.key(config.seed), KEY_INIT))
  loss = sft_loss(built.defs.policy, chunk=config.logits_chunk)
  tx = make_optimizer(settings, settings.steps)
  return Job("sft", loss, policy, tx, batches(), settings.steps, settings=settings)


def fit_sft(config, built: Build, workdir: Path):
  """Trains the policy; returns its state."""
  return do(sft_job(config, built), built, workdir)


def reward_job(config, built: Build, policy) -> Job:
  """The fit of the proxy reward model {"backbone", "phi"} on noisy preferences over the policy's
  own samples.

  Each head of an ensemble has its own weights of the pairs (the Bayesian bootstrap).
  """
  start = init_reward_model(config, built, policy, jax.random.key(config.seed))
  train = noisy_preferences(config, built, policy)
  return pairs_job("reward", config, built, start, with_contrast(train, config.reward.contrast))


def certificate(config, built: Build, policy, reward) -> dict[str, jax.Array]:
  """The uncertainty of a fitted score head given its own noisy pairs: {"root": f32[Dr, Dr]}, see
  `algorithm.certify.root`.
  """
  pair = ordered(noisy_preferences(config, built, policy), np.arange(config.reward.pairs))
  read = reader(built.defs.reward_backbone, built.mesh)
  sides = [read(reward, pair[name], pair[f"{name}_mask"]) for name in ("chosen", "rejected")]
  chosen, rejected = (hosts.fetch(side).astype(float) for side in sides)
  dx = chosen - rejected
  gaps = dx @ np.asarray(reward["phi"]["kernel"][...], float)[:, 0]
  spread = np.maximum(np.concatenate([chosen, rejected]).std(0), 1e-6)
  return {"root": jnp.asarray(root(dx, gaps, spread, config.certify.tau), jnp.float32)}


def golden_job(config, built: Build, policy, reward) -> Job:
  """Further training of the proxy on golden pairs of the prompts of RL: the paper's "pretrained
  RM".
  """
  settings = config.reward
  steps = -(-settings.pairs // config.rollout.prompts)
  batches = [
    goldtask.prompts(config.seed, STREAM_RL, t, config.rollout.prompts) for t in range(steps)
  ]
  prompts = jax.tree.map(lambda *x: np.concatenate(x)[: settings.pairs], *batches)
  train = preferences(config, built, policy, STREAM_RL, prompts)
  train["a_wins"] = train["gold"][:, 0] >= train["gold"][:, 1]
  return pairs_job("reward_golden", config, built, jax.tree.map(jnp.copy, reward), train)


def fit_reward(config, built: Build, workdir: Path, policy, job: Job | None = None):
  """Runs a job on pairs, `reward_job` by default; returns the standardised reward model
  (`standardise`).
  """
  job = job or reward_job(config, built, policy)
  model, found = standardise(config, built, policy, do(job, built, workdir))
  with Metrics(workdir, job.stage, from_step=job.total) as log:
    log.log(job.total, found)
  print(
    f"{job.stage:<8} held-out accuracy {found['heldout_accuracy']:.3f} on "
    f"{config.reward.heldout_pairs} pairs with "
    f"clean gold labels; gold of the supervised policy {found['gold_of_sft']:.2f}"
  )
  return model


def fit_golden(config, built: Build, workdir: Path, policy, reward):
  """Runs `golden_job`; returns the standardised reward model."""
  return fit_reward(config, built, workdir, policy, golden_job(config, built, policy, reward))


def noisy_preferences(config, built: Build, policy) -> dict[str, np.ndarray]:
  """The proxy's training data: `preferences` with a_wins bool[N], the choices of a noisy
  labeller.
  """
  settings = config.reward
  prompts = goldtask.prompts(config.seed, STREAM_PAIRS, 0, settings.pairs)
  train = preferences(config, built, policy, STREAM_PAIRS, prompts)
  train["a_wins"] = goldtask.noisy_choice(
    *train["gold"].T, config.seed, temperature=settings.choice_temperature, flip=settings.label_flip
  )
  return train


def contrast_pairs(train: dict[str, np.ndarray], shift: int) -> dict[str, np.ndarray]:
  """Each pair's preferred response against the preferred response of the pair `shift` positions
  later, both under the first pair's prompt. The first response wins, because it was written for
  this prompt.

  The pairs have the form of `noisy_preferences`; every prompt is `goldtask.PROMPT_LENGTH` tokens
  long.
  """
  rows = np.arange(len(train["tokens"]))
  better = np.where(train["a_wins"], 0, 1)

  def against_other(name):
    own = train[name][rows, better]
    other = np.roll(own, -shift, 0)
    other[:, : goldtask.PROMPT_LENGTH] = own[:, : goldtask.PROMPT_LENGTH]
    return np.stack([own, other], 1)

  pairs = {name: against_other(name) for name in ("tokens", "mask")}
  return pairs | {"a_wins": np.ones(len(rows), bool)}


def with_contrast(train: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
  """`train` and `count` contrast pairs for each of its pairs, as in RRM (arXiv 2409.13156). Their
  labels are correct without labelling, and they teach the reward model to read the prompt.
  """
  if not count:
    return train
  parts = [train, *(contrast_pairs(train, shift) for shift in range(1, count + 1))]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[1]}


def ordered(train: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
  """Winners and losers of some pairs."""
  winner = np.where(train["a_wins"][rows], 0, 1)

  def pick(name, side):
    return train[name][rows, side]

  return {
    "chosen": pick("tokens", winner),
    "chosen_mask": pick("mask", winner),
    "rejected": pick("tokens", 1 - winner),
    "rejected_mask": pick("mask", 1 - winner),
  }


def pairs_job(stage: str, config, built: Build, start, train: dict[str, np.ndarray]) -> Job:
  """Bradley-Terry on `train`, from the reward model `start`."""
  settings, count = config.reward, len(train["tokens"])
  steps = settings.epochs * (count // settings.batch_size)
  weight = (
    np.random.default_rng([config.seed, 4])
    .exponential(size=(count, settings.ensemble))
    .astype(np.float32)
  )

  def batches():
    for rows in epochs_of_rows(config.seed, count, settings.batch_size, steps):
      rows = hosts.take(rows, built.rows)
      yield ordered(train, rows) | ({"weight": weight[rows]} if settings.ensemble > 1 else {})

  loss = reward_loss(built.defs.reward_backbone, built.defs.phi, sum_to_zero=settings.sum_to_zero)
  tx = make_optimizer(settings, steps)
  return Job(stage, loss, start, tx, batches(), steps, settings=settings)


def standardise(config, built: Build, policy, model) -> tuple[dict, dict[str, float]]:
  """Centres and scales each head of a fitted reward model to mean 0 and standard deviation 1 on
  held-out samples of the same policy, so that arms and seeds start with the same scale.

  Returns the model and {"heldout_accuracy": against clean gold labels, "gold_of_sft": mean gold of
  those samples}.
  """
  settings = config.reward
  heldout = preferences(
    config,
    built,
    policy,
    STREAM_HELDOUT,
    goldtask.prompts(config.seed, STREAM_HELDOUT, 0, settings.heldout_pairs),
  )
  chosen = np.where(heldout["gold"][:, 0] >= heldout["gold"][:, 1], 0, 1)
  members = scorer(built.defs.reward_backbone, built.defs.phi, built.mesh)
  sides = [members(model, heldout["tokens"][:, i], heldout["mask"][:, i]) for i in (0, 1)]
  scores = np.stack(hosts.fetch(sides), 1)  # [N, 2, M]
  scale, phi = 1 / np.maximum(scores.std((0, 1)), 1e-6), model["phi"]
  phi["kernel"][...] *= scale
  phi["bias"][...] = (phi["bias"][...] - scores.mean((0, 1))) * scale
  standard = jnp.asarray((scores - scores.mean((0, 1))) * scale)
  combined = np.asarray(combine(standard, settings.combine, settings.variance_weight))
  rows = np.arange(len(scores))
  gap = combined[rows, chosen] - combined[rows, 1 - chosen]
  accuracy = np.where(gap == 0, 0.5, gap > 0).mean()
  return model, {"heldout_accuracy": float(accuracy), "gold_of_sft": float(heldout["gold"].mean())}


@functools.cache
def scorer(backbone_def, phi_def, mesh):
  """Builds the jitted `members(model, tokens, mask) -> f32[B, M]`: each head's score of each
  row.
  """

  @jit_on(mesh)
  def members(model, tokens, mask):
    rte = read_rte(nnx.merge(backbone_def, model["backbone"]), tokens, mask)
    return member_scores(nnx.merge(phi_def, model["phi"]), rte)

  return members


@functools.cache
def reader(backbone_def, mesh):
  """Builds the jitted `read(model, tokens, mask) -> f32[B, Dr]`: the reward token embeddings."""

  @jit_on(mesh)
  def read(model, tokens, mask):
    return read_rte(nnx.merge(backbone_def, model["backbone"]), tokens, mask)

  return read


def head_job(config, built: Build, policy, reward, head) -> Job:
  """The fit of a warm start: cross-attention and phi, `head`, on the proxy's own preferences with
  the supervised policy's states, at omega's floor.
  """
  settings, train = config.reward, noisy_preferences(config, built, policy)
  steps = config.r2m.warm_epochs * (settings.pairs // settings.batch_size)

  def batches():
    for rows in epochs_of_rows(config.seed, settings.pairs, settings.batch_size, steps):
      pair = ordered(train, rows)
      tokens = np.concatenate([pair["chosen"], pair["rejected"]])
      mask = np.concatenate([pair["chosen_mask"], pair["rejected_mask"]])
      batch = {"tokens": tokens, "token_mask": mask, "reward_tokens": tokens, "reward_mask": mask}
      batch["response_mask"] = response_part(mask, config.rollout.max_new_tokens)
      yield hosts.take(batch, built.rows)

  return warm_job(config, built, policy, reward["backbone"], head, batches(), steps)


def preferences(
  config, built: Build, policy, stream: int, prompts: Prompts
) -> dict[str, np.ndarray]:
  """Two samples for each of N prompts: tokens i32[N, 2, L], mask bool[N, 2, L], gold f64[N, 2]."""
  pairs = len(prompts.tokens)
  prompts = prompts.replace(
    example_id=prompts.example_id + stream * 2**24
  )  # streams do not share sample keys
  sequences = sample(config, built, policy, prompts, group_size=2, purpose=KEY_PAIRS)

  def pair(x):
    return x.reshape(pairs, 2, *x.shape[1:])

  return {
    "tokens": pair(sequences.tokens),
    "mask": pair(sequences.token_mask),
    "gold": pair(goldtask.gold(sequences, config.gold.formula).gold),
  }

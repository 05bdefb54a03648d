"""What comes before RL on the gold-reward task: supervised start, noisy preferences, the proxy reward model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax import hosts
from r2m_jax.build import KEY_INIT, KEY_PAIRS, Build, init_policy, init_reward_model
from r2m_jax.generate import generate
from r2m_jax.lab import goldtask
from r2m_jax.metrics import Metrics
from r2m_jax.models.reward import member_scores, read_rte
from r2m_jax.ops import combine
from r2m_jax.optim import make_optimizer
from r2m_jax.pretrain import fit, fit_warm_head, reward_loss, sft_loss
from r2m_jax.sharding import jit_on, shardings
from r2m_jax.types import Prompts, Sequences

STREAM_PAIRS, STREAM_HELDOUT, STREAM_RL, STREAM_TABLE = range(1, 5)  # of prompts; stream 0 is the demonstrations'
CHUNK = 64  # prompts sampled at a time


@functools.cache
def sampler(policy_def, mesh, *, group_size: int, max_new_tokens: int, temperature: float):
  """Builds the jitted `draw(policy, prompts, key) -> Sequences`; one program for all that sample alike."""

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


def sample(config, built: Build, policy, prompts: Prompts, *, group_size: int, purpose: int) -> Sequences:
  """Samples on the host, `CHUNK` prompts at a time."""
  key = jax.random.fold_in(jax.random.key(config.seed), purpose)
  rollout = config.rollout
  draw = sampler(
    built.defs.policy, built.mesh, group_size=group_size, max_new_tokens=rollout.max_new_tokens,
    temperature=rollout.temperature,
  )  # fmt: skip
  count = len(prompts.tokens)
  if count % CHUNK:  # one shape, one compile: the last chunk is filled up with the first rows
    prompts = jax.tree.map(lambda x: np.concatenate([x, np.resize(x, (-count % CHUNK, *x.shape[1:]))]), prompts)
  chunks = [
    hosts.fetch(draw(policy, jax.tree.map(lambda x: x[i : i + CHUNK], prompts), key))
    for i in range(0, count, CHUNK)
  ]
  return jax.tree.map(lambda *x: np.concatenate(x)[: count * group_size], *chunks)


def fit_sft(config, built: Build, workdir: Path):
  """Trains the policy from nothing on imperfect demonstrations; returns its state."""
  settings = config.sft
  notes, responses, lengths = goldtask.demonstrations(config.seed, settings.examples, config.rollout.max_new_tokens)
  tokens = np.concatenate([notes.tokens, responses], 1)
  response_mask = np.arange(responses.shape[1]) < lengths[:, None]
  token_mask = np.concatenate([notes.mask, response_mask], 1)

  def batches():
    for rows in epochs_of_rows(config.seed, len(tokens), settings.batch_size, settings.steps):
      rows = hosts.take(rows, built.rows)
      yield {"tokens": tokens[rows], "token_mask": token_mask[rows], "response_mask": response_mask[rows]}

  policy = init_policy(config, built, jax.random.fold_in(jax.random.key(config.seed), KEY_INIT))
  return fit(
    sft_loss(built.defs.policy, chunk=config.logits_chunk),
    policy,
    make_optimizer(settings, settings.steps),
    batches(),
    total=settings.steps,
    stage="sft",
    workdir=workdir,
    state_shardings=shardings(policy, built.mesh),
    batch_sharding=built.rows,
  )


def fit_reward(config, built: Build, workdir: Path, policy):
  """Fits the proxy reward model on noisy preferences over the policy's own samples; returns {"backbone", "phi"}.

  An ensemble's heads see each pair with a weight of their own (the Bayesian bootstrap).
  """
  train = noisy_preferences(config, built, policy)
  start = init_reward_model(config, built, policy, jax.random.key(config.seed))
  return fit_pairs(config, built, workdir, policy, start, train, stage="reward")


def fit_golden(config, built: Build, workdir: Path, policy, reward):
  """The proxy, trained on by golden pairs of the same prompts as RL: the paper's "pretrained RM"."""
  settings = config.reward
  steps = -(-settings.pairs // config.rollout.prompts)
  batches = [goldtask.prompts(config.seed, STREAM_RL, t, config.rollout.prompts) for t in range(steps)]
  prompts = jax.tree.map(lambda *x: np.concatenate(x)[: settings.pairs], *batches)
  train = preferences(config, built, policy, STREAM_RL, prompts)
  train["a_wins"] = train["gold"][:, 0] >= train["gold"][:, 1]
  start = jax.tree.map(jnp.copy, reward)
  return fit_pairs(config, built, workdir, policy, start, train, stage="reward_golden")


def noisy_preferences(config, built: Build, policy) -> dict[str, np.ndarray]:
  """What the proxy learns from: see `preferences`, and a_wins bool[N], as a noisy labeller has it."""
  settings = config.reward
  prompts = goldtask.prompts(config.seed, STREAM_PAIRS, 0, settings.pairs)
  train = preferences(config, built, policy, STREAM_PAIRS, prompts)
  train["a_wins"] = goldtask.noisy_choice(
    *train["gold"].T, config.seed, temperature=settings.choice_temperature, flip=settings.label_flip
  )
  return train


def ordered(train: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
  """Winners and losers of some pairs."""
  winner = np.where(train["a_wins"][rows], 0, 1)
  pick = lambda name, side: train[name][rows, side]
  return {
    "chosen": pick("tokens", winner), "chosen_mask": pick("mask", winner),
    "rejected": pick("tokens", 1 - winner), "rejected_mask": pick("mask", 1 - winner),
  }  # fmt: skip


def fit_pairs(config, built: Build, workdir: Path, policy, start, train: dict[str, np.ndarray], *, stage: str):
  """Bradley-Terry on `train`, from the reward model `start`, which is used up.

  Each head is then centred and scaled to mean 0 and standard deviation 1 on held-out samples of the same policy, so
  that arms and seeds start on one scale. Logs the accuracy against clean gold labels.
  """
  settings, count = config.reward, len(train["tokens"])
  heldout = preferences(
    config, built, policy, STREAM_HELDOUT, goldtask.prompts(config.seed, STREAM_HELDOUT, 0, settings.heldout_pairs)
  )
  chosen = np.where(heldout["gold"][:, 0] >= heldout["gold"][:, 1], 0, 1)
  steps = settings.epochs * (count // settings.batch_size)
  weight = np.random.default_rng([config.seed, 4]).exponential(size=(count, settings.ensemble)).astype(np.float32)

  def batches():
    for rows in epochs_of_rows(config.seed, count, settings.batch_size, steps):
      rows = hosts.take(rows, built.rows)
      yield ordered(train, rows) | ({"weight": weight[rows]} if settings.ensemble > 1 else {})

  model = fit(
    reward_loss(built.defs.reward_backbone, built.defs.phi, sum_to_zero=settings.sum_to_zero),
    start,
    make_optimizer(settings, steps),
    batches(),
    total=steps,
    stage=stage,
    workdir=workdir,
    state_shardings=shardings(start, built.mesh),
    batch_sharding=built.rows,
  )

  @jit_on(built.mesh)
  def members(model, tokens, mask):
    rte = read_rte(nnx.merge(built.defs.reward_backbone, model["backbone"]), tokens, mask)
    return member_scores(nnx.merge(built.defs.phi, model["phi"]), rte)

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
  with Metrics(workdir, stage, from_step=steps) as log:
    log.log(steps, {"heldout_accuracy": accuracy, "gold_of_sft": heldout["gold"].mean()})
  print(
    f"{stage:<8} held-out accuracy {accuracy:.3f} on {len(scores)} pairs with clean gold labels; "
    f"gold of the supervised policy {heldout['gold'].mean():.2f}"
  )
  return model


def fit_head(config, built: Build, workdir: Path, policy, reward, head):
  """A warm start: cross-attention and phi, `head`, fitted on the proxy's own preferences with the supervised policy's
  states, at omega's floor. It is used up."""
  settings, train = config.reward, noisy_preferences(config, built, policy)
  steps = config.r2m.warm_epochs * (settings.pairs // settings.batch_size)

  def batches():
    for rows in epochs_of_rows(config.seed, settings.pairs, settings.batch_size, steps):
      pair = ordered(train, rows)
      tokens = np.concatenate([pair["chosen"], pair["rejected"]])
      mask = np.concatenate([pair["chosen_mask"], pair["rejected_mask"]])
      batch = {"tokens": tokens, "token_mask": mask, "reward_tokens": tokens, "reward_mask": mask}
      yield hosts.take(batch, built.rows)

  return fit_warm_head(
    config, built, workdir, head, batches(), steps, frozen={"policy": policy, "backbone": reward["backbone"]}
  )


def preferences(config, built: Build, policy, stream: int, prompts: Prompts) -> dict[str, np.ndarray]:
  """Two samples for each of N prompts: tokens i32[N, 2, L], mask bool[N, 2, L], gold f64[N, 2]."""
  pairs = len(prompts.tokens)
  prompts = prompts.replace(example_id=prompts.example_id + stream * 2**24)  # streams do not share sample keys
  sequences = sample(config, built, policy, prompts, group_size=2, purpose=KEY_PAIRS)
  pair = lambda x: x.reshape(pairs, 2, *x.shape[1:])
  return {
    "tokens": pair(sequences.tokens),
    "mask": pair(sequences.token_mask),
    "gold": pair(goldtask.gold(sequences).gold),
  }


def epochs_of_rows(seed: int, count: int, batch_size: int, steps: int):
  """Row indices of `steps` batches: every row once an epoch, in new orders; what does not fill a batch is left."""
  rng, order = np.random.default_rng([seed, 3]), np.empty(0, int)
  for _ in range(steps):
    if len(order) < batch_size:
      order = rng.permutation(count)
    rows, order = order[:batch_size], order[batch_size:]
    yield rows

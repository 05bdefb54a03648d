"""What comes before RL on the gold-reward task: supervised start, noisy preferences, the proxy reward model."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from r2m_jax.build import KEY_INIT, KEY_PAIRS, Build, init_policy, init_reward_model
from r2m_jax.generate import generate
from r2m_jax.lab import goldtask
from r2m_jax.metrics import Metrics
from r2m_jax.models.reward import read_rte
from r2m_jax.models.reward import score as phi_score
from r2m_jax.optim import make_optimizer
from r2m_jax.pretrain import fit, reward_loss, sft_loss
from r2m_jax.sharding import constrain_batch, shardings
from r2m_jax.types import Prompts, Sequences

STREAM_PAIRS, STREAM_HELDOUT, STREAM_RL, STREAM_TABLE = range(1, 5)  # of prompts; stream 0 is the demonstrations'
CHUNK = 64  # prompts sampled at a time


def sample(config, built: Build, policy, prompts: Prompts, *, group_size: int, purpose: int) -> Sequences:
  """Samples on the host, `CHUNK` prompts at a time, in one compiled program."""
  key = jax.random.fold_in(jax.random.key(config.seed), purpose)

  @jax.jit
  def draw(policy, prompts):
    return generate(
      nnx.merge(built.defs.policy, policy),
      prompts,
      key,
      0,
      group_size=group_size,
      max_new_tokens=config.rollout.max_new_tokens,
      temperature=config.rollout.temperature,
      eos_ids=(goldtask.EOS,),
      pad_id=goldtask.PAD,
      constrain=constrain_batch(built.mesh),
    )

  count = len(prompts.tokens)
  if count % CHUNK:  # one shape, one compile: the last chunk is filled up with the first rows
    prompts = jax.tree.map(lambda x: np.concatenate([x, np.resize(x, (-count % CHUNK, *x.shape[1:]))]), prompts)
  chunks = [
    jax.device_get(draw(policy, jax.tree.map(lambda x: x[i : i + CHUNK], prompts))) for i in range(0, count, CHUNK)
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
  """Fits the proxy reward model on noisy preferences over the policy's own samples.

  It is then centred and scaled to mean 0 and standard deviation 1 on held-out samples of the same policy, so that
  arms and seeds start on one scale. Returns {"backbone", "phi"}; logs its accuracy against clean gold labels.
  """
  settings = config.reward
  train = preferences(config, built, policy, STREAM_PAIRS, settings.pairs)
  heldout = preferences(config, built, policy, STREAM_HELDOUT, settings.heldout_pairs)
  chosen = np.where(heldout["gold"][:, 0] >= heldout["gold"][:, 1], 0, 1)
  a_first = goldtask.noisy_choice(
    *train["gold"].T, config.seed, temperature=settings.choice_temperature, flip=settings.label_flip
  )
  tokens, mask, winner = train["tokens"], train["mask"], np.where(a_first, 0, 1)

  steps = settings.epochs * (settings.pairs // settings.batch_size)

  def batches():
    for rows in epochs_of_rows(config.seed, settings.pairs, settings.batch_size, steps):
      w, l = winner[rows], 1 - winner[rows]
      yield {
        "chosen": tokens[rows, w], "chosen_mask": mask[rows, w],
        "rejected": tokens[rows, l], "rejected_mask": mask[rows, l],
      }  # fmt: skip

  start = init_reward_model(config, built, policy, jax.random.key(config.seed))
  model = fit(
    reward_loss(built.defs.reward_backbone, built.defs.phi),
    start,
    make_optimizer(settings, steps),
    batches(),
    total=steps,
    stage="reward",
    workdir=workdir,
    state_shardings=shardings(start, built.mesh),
    batch_sharding=built.rows,
  )

  @jax.jit
  def score_of(model, tokens, mask):
    rte = read_rte(nnx.merge(built.defs.reward_backbone, model["backbone"]), tokens, mask)
    return phi_score(nnx.merge(built.defs.phi, model["phi"]), rte)

  scores = np.stack([score_of(model, heldout["tokens"][:, i], heldout["mask"][:, i]) for i in (0, 1)], 1)
  rows = np.arange(len(scores))
  gap = scores[rows, chosen] - scores[rows, 1 - chosen]
  accuracy = np.where(gap == 0, 0.5, gap > 0).mean()
  scale = 1 / max(scores.std(), 1e-6)
  phi = model["phi"]
  phi["kernel"][...] *= scale
  phi["bias"][...] = (phi["bias"][...] - scores.mean()) * scale
  with Metrics(workdir, "reward", from_step=steps) as log:
    log.log(steps, {"heldout_accuracy": accuracy, "gold_of_sft": heldout["gold"].mean()})
  print(
    f"reward   held-out accuracy {accuracy:.3f} on {len(scores)} pairs with clean gold labels; "
    f"gold of the supervised policy {heldout['gold'].mean():.2f}"
  )
  return model


def preferences(config, built: Build, policy, stream: int, pairs: int) -> dict[str, np.ndarray]:
  """Two samples for each of `pairs` prompts: tokens i32[N, 2, L], mask bool[N, 2, L], gold f64[N, 2]."""
  prompts = goldtask.prompts(config.seed, stream, 0, pairs)
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

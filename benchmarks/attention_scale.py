"""The cost of untrained attention on held-out pairs, by r2m.attention_scale, and how far the
reward's gaps are from log-odds.

  python -m benchmarks.attention_scale [--seeds=100,101,102,103]

The pairs are labelled like the proxy's training pairs, with the labeller's noise; no gold is read,
and the proxy has not seen these pairs. The states are the supervised policy's, and omega is at its
floor. configs/fair.py uses the scale at which the accuracy above chance falls as in table 3 of the
paper, from 72.3% to between 68.3% and 69.2%: by 14% to 18%. Its temperature maximises the
likelihood of sigmoid(gap / temperature), given the share of flipped labels.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from scipy.optimize import minimize_scalar
from scipy.special import expit

from benchmarks import machine
from r2m_jax.algorithm.read import read_feedback, sampling
from r2m_jax.configs import quickstart
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.stages import STREAM_EVALUATION, preferences
from r2m_jax.lab.grid import starts_of, with_seed
from r2m_jax.models.reward import read_rte
from r2m_jax.run.build import make_first_state
from r2m_jax.types import Sequences

SEEDS = flags.DEFINE_list("seeds", "100,101,102,103", "in no table")
PAIRS = flags.DEFINE_integer("pairs", 4096, "for each seed", 1)
WORKDIR = flags.DEFINE_string("workdir", "", 'folder for fitted models; "": they are not kept')
SCALES = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
CHUNK = 512  # pairs read at a time


def make_parts(config, built):
  """Builds `parts(state, tokens, mask) -> (own, attended)`, f32[B] each: the score head's scores of
  the reward model's embedding and of untrained attention over the policy's states.
  """
  reading = sampling(config) | dict(layer=config.r2m.feedback_layer, chunk=0)

  @jax.jit
  def parts(state, tokens, mask):
    response = mask[:, goldtask.PROMPT_LENGTH :]
    rows = Sequences(tokens, mask, response, response[:, 0])
    policy = built.defs.open_policy(state.policy, state.ref)
    hidden = read_feedback(policy, rows, **reading).hidden
    rte = read_rte(nnx.merge(built.defs.reward_backbone, state.reward_backbone), tokens, mask)
    head = nnx.merge(built.defs.reward_head, state.reward_head)
    return head.score(rte), head.score(head.cross_attend(rte, hidden, mask))

  return parts


def gaps_of(config, built, state, policy, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Chosen minus rejected on held-out noisy pairs, f64[N] each: for the reward model's own
  embedding and for untrained attention.
  """
  one = with_seed(config, seed)
  notes = goldtask.prompts(seed, STREAM_EVALUATION, 0, PAIRS.value)
  pairs = preferences(one, built, policy, STREAM_EVALUATION, notes)
  settings = config.reward
  first = goldtask.noisy_choice(
    *pairs["gold"].T, seed + 1, temperature=settings.choice_temperature, flip=settings.label_flip
  )
  parts = make_parts(config, built)
  tokens, mask = (pairs[name].reshape(-1, pairs[name].shape[-1]) for name in ("tokens", "mask"))
  found = [
    jax.device_get(parts(state, tokens[i : i + CHUNK], mask[i : i + CHUNK]))
    for i in range(0, len(tokens), CHUNK)
  ]
  sides = np.concatenate(found, 1).reshape(2, -1, 2).astype(float)  # part, pair, side
  return tuple(np.where(first, 1, -1) * (sides[..., 0] - sides[..., 1]))


def temperature_of(gaps: np.ndarray, flip: float) -> float:
  """The temperature T with the highest likelihood of the labels, of which a share `flip` is
  flipped: P(label) = flip + (1 - 2 flip) sigmoid(gap / T).
  """

  def loss(log_temperature):
    right = expit(gaps / np.exp(log_temperature))
    return -np.log(flip + (1 - 2 * flip) * right).mean()

  return float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


def main(_):
  machine.set_up()
  config, seeds = quickstart.get_config(), tuple(map(int, SEEDS.value))
  config.variant, omega = "r2m", config.r2m.omega_min
  folder = Path(WORKDIR.value or tempfile.mkdtemp())
  built, policies, rewards, _ = starts_of(config, seeds, folder)
  start = jax.jit(make_first_state(config, built))
  gaps = []
  for seed in seeds:
    reward = rewards[seed]
    state = start(jax.random.key(seed), policies[seed], reward["backbone"], reward["phi"])
    gaps.append(gaps_of(config, built, state, policies[seed], seed))
  print(f"{len(seeds)} seeds, {PAIRS.value} held-out pairs each, labelled with noise")
  print(f"{'scale':>5}  accuracy by seed, %        mean   change  above 50%")
  base = None
  for scale in SCALES:
    fused = [omega * own + (1 - omega) * scale * read for own, read in gaps]
    accuracy = np.array([100 * (gap > 0).mean() for gap in fused])
    base = accuracy.mean() if base is None else base
    shown, change = " ".join(f"{x:5.1f}" for x in accuracy), accuracy.mean() - base
    share = change / (base - 50)
    print(f"{scale:5.1f}  {shown}   {accuracy.mean():6.2f}  {change:+6.2f}  {share:+6.0%}")
  found = [temperature_of(own, config.reward.label_flip) for own, _ in gaps]
  print(f"temperature {np.exp(np.mean(np.log(found))):.2f}: {' '.join(f'{x:.2f}' for x in found)}")


if __name__ == "__main__":
  app.run(main)

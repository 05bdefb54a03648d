"""Summarisation with Pythia-2.8B on TL;DR, as in R2M (arXiv 2601.22664).

  python -m r2m_jax.main --config=configs/tldr_pythia_2_8b.py --workdir=runs/tldr  # RLOO + R2M
  python -m r2m_jax.main --config=configs/tldr_pythia_2_8b.py:rloo,vanilla --workdir=runs/plain  # plain RLOO
  python -m r2m_jax.main --config=configs/tldr_pythia_2_8b.py:grpo --workdir=runs/grpo  # GRPO + R2M

A million trajectories in 122 steps. README lists the slices on which it fits; --config.task=plan
plans any other. We have not run this config. The paper's win rates: SFT 42.3, RLOO 75.3, RLOO + R2M
81.6, GRPO 75.2, GRPO + R2M 81.0.

The paper uses Pythia-2.8B, fitted to TL;DR, for both models, and names no weights. We assume the
public ones of this kind.
"""

from r2m_jax.configs import paper


def get_config(words: str = ""):
  config = paper.shared(words)
  config.data.name = "hf:trl-lib/tldr"
  config.data.max_chosen_length = 0  # the filter is for UltraFeedback
  config.steps = 122
  config.rollout.prompts = 2048
  config.rollout.group_size = 4
  config.rollout.max_new_tokens = 50
  config.ppo.accumulation = 32
  config.rollout.waves = 8
  config.sft.batch_size = config.reward.batch_size = 2048
  config.policy.path = "cleanrl/EleutherAI_pythia-2.8b-deduped__sft__tldr"
  config.plan.policy = "pythia-2.8b"
  config.reward.path = "cleanrl/EleutherAI_pythia-2.8b-deduped__reward__tldr"
  config.plan.reward = "pythia-2.8b"
  config.policy.lr = 3e-6
  config.r2m.lr = 5e-7
  config.r2m.omega_min = 0.6
  return config

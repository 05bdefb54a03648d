"""Summarisation with Pythia-2.8B on TL;DR, as in R2M (arXiv 2601.22664)."""

from configs import paper


def get_config(words: str = ""):
  config = paper.get_config(words)
  config.data.name = "hf:trl-lib/tldr"
  config.data.max_chosen_length = 0
  config.steps = 122  # 1,000k trajectories
  config.rollout.prompts, config.rollout.group_size, config.rollout.max_new_tokens = 2048, 4, 50
  config.sft.batch_size = config.reward.batch_size = 2048
  config.policy.path, config.plan.policy = "cleanrl/EleutherAI_pythia-2.8b-deduped__sft__tldr", "pythia-2.8b"
  config.reward.path, config.plan.reward = "cleanrl/EleutherAI_pythia-2.8b-deduped__reward__tldr", "pythia-2.8b"
  config.policy.lr = 3e-6
  config.r2m.lr = 5e-7
  config.r2m.omega_min = 0.6
  config.ppo.accumulation, config.rollout.waves = 32, 8
  return config

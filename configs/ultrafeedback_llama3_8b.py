"""Dialogue with Meta-Llama-3-8B-Instruct and Skywork's 8B reward model, as in R2M (arXiv 2601.22664)."""

from configs import paper


def get_config(words: str = ""):
  config = paper.dialogue(words)
  config.policy.path, config.plan.policy = "meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"
  config.policy.lr = 1e-6
  config.r2m.omega_min = 0.6
  config.ppo.accumulation, config.rollout.waves = 8, 1
  return config

"""Dialogue with Qwen2.5-3B-Instruct and Skywork's 8B reward model, as in R2M (arXiv 2601.22664).

  python -m r2m_jax.main --config=configs/ultrafeedback_qwen2_5_3b.py --workdir=runs/qwen            # RLOO + R2M
  python -m r2m_jax.main --config=configs/ultrafeedback_qwen2_5_3b.py:grpo,vanilla --workdir=runs/plain

Add --config.task=plan --config.plan.topology=auto first: which slices it fits (README has them).
"""

from configs import paper


def get_config(words: str = ""):
  config = paper.dialogue(words)
  config.policy.path, config.plan.policy = "Qwen/Qwen2.5-3B-Instruct", "qwen2.5-3b"
  config.policy.lr = 6e-6
  config.r2m.omega_min = 0.7
  config.ppo.accumulation, config.rollout.waves = 8, 1
  return config

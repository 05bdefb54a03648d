"""Dialogue with Qwen2.5-3B-Instruct, as in R2M (arXiv 2601.22664).

The reward model is Skywork's with 8B parameters.

  python -m r2m_jax.main --config=configs/ultrafeedback_qwen2_5_3b.py --workdir=runs/qwen  # RLOO + R2M
  python -m r2m_jax.main --config=configs/ultrafeedback_qwen2_5_3b.py:rloo,vanilla --workdir=runs/plain  # plain RLOO
  python -m r2m_jax.main --config=configs/ultrafeedback_qwen2_5_3b.py:grpo --workdir=runs/grpo  # GRPO + R2M

51,200 trajectories in 100 steps. README lists the slices on which it fits; --config.task=plan plans
any other. We have not run this config. The paper's AlpacaEval 2 results (LC / WR): SFT 15.5 / 15.8,
RLOO 21.9 / 26.0, RLOO + R2M 24.8 / 31.2, GRPO 22.7 / 25.6, GRPO + R2M 25.8 / 30.9.
"""

from r2m_jax.configs import paper


def get_config(words: str = ""):
  config = paper.dialogue(words)
  config.policy.path = "Qwen/Qwen2.5-3B-Instruct"
  config.plan.policy = "qwen2.5-3b"
  config.policy.lr = 6e-6
  config.r2m.omega_min = 0.7
  return config

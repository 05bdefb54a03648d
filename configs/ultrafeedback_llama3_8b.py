"""Dialogue with Meta-Llama-3-8B-Instruct, as in R2M (arXiv 2601.22664).

The reward model is Skywork's with 8B parameters.

  python -m r2m_jax.main --config=configs/ultrafeedback_llama3_8b.py --workdir=runs/llama  # RLOO + R2M
  python -m r2m_jax.main --config=configs/ultrafeedback_llama3_8b.py:rloo,vanilla --workdir=runs/plain  # plain RLOO
  python -m r2m_jax.main --config=configs/ultrafeedback_llama3_8b.py:grpo --workdir=runs/grpo  # GRPO + R2M

51,200 trajectories in 100 steps. README lists the slices on which it fits; --config.task=plan plans
any other. We have not run this config. The paper's AlpacaEval 2 results (LC / WR): SFT 22.9 / 22.6,
RLOO 28.4 / 30.2, RLOO + R2M 34.5 / 38.2, GRPO 29.5 / 32.6, GRPO + R2M 35.6 / 39.4; under RLOO:
r2m_untrained 24.4 / 27.4, noise 25.4 / 26.4, no_bt 31.5 / 35.7, no_gre 32.3 / 36.2, pretrained_rm
30.5 / 32.2, iterative_head 31.0 / 31.8.
"""

from r2m_jax.configs import paper


def get_config(words: str = ""):
  config = paper.dialogue(words)
  config.policy.path = "meta-llama/Meta-Llama-3-8B-Instruct"
  config.plan.policy = "llama3-8b"
  config.policy.lr = 1e-6
  config.r2m.omega_min = 0.6
  return config

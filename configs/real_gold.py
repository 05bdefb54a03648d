"""The laboratory's second task, on real text: does RL on a small, noisy reward model lose what a larger one judges by?

  python -m r2m_jax.main --config=configs/real_gold.py --config.data.root=DATA --workdir=runs/real_gold
  python -m r2m_jax.main --config=configs/real_gold.py --config.data.root=DATA --workdir=runs/real_gold \\
    --config.policy.path=runs/real_small/models/sft         # with a finished policy

Protocol: docs/lab.md, "The second task". DATA is that of configs/real_small.py. The same command goes on where it
stopped; a seed or an arm that is finished is not run again.
"""

from configs import real_small


def get_config(size: str = ""):
  if size not in ("", "test"):
    raise ValueError(f"size {size!r} is unknown; use configs/real_gold.py or configs/real_gold.py:test")
  config = real_small.get_config(size)
  config.task = "lab_text"
  # harmless-base teaches which of two replies is less harmful; its replies are not imitated and its prompts not sampled
  config.scratch.pairs = real_small.files("preferences", (*real_small.PREFERENCES, "hh_harmless_base"), "train")
  config.data.buckets = (96, 160, 256)
  config.gold.depth, config.gold.budget, config.gold.batch_size = 2, 1200.0, 8
  config.gold.lr, config.gold.warmup_steps = 3e-4, 20
  return config

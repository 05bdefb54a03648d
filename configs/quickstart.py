"""Over-optimisation in minutes on a laptop, against a gold reward.

The arms are vanilla RLOO, its `scaled` control and RLOO + R2M.

  python -m r2m_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m r2m_jax.main --config=configs/quickstart.py:test --workdir=/tmp/smallest   # the same job in seconds

Expect the gold reward to rise, peak and fall in every arm while the proxy continues to rise. The
report shows means over three seeds with 95% intervals. `--config.task=lab` runs seeds 0 to 4 of
each arm in one program, and configs/lab.py is the whole laboratory.
"""

from r2m_jax.configs import default


def get_config(size: str = ""):
  if size not in ("", "test"):
    raise ValueError(f"size {size!r} is unknown; use quickstart or quickstart:test")
  config = default.get_config()
  config.variant = ""
  config.seeds = 3
  config.steps = 100
  config.kl.beta = 0.02
  config.remat = "none"  # as for the published curves
  config.policy.arch.intermediate_size = 128
  if size == "test":
    config.seeds = 1
    config.steps = 4
    config.rollout.prompts = 8
    config.rollout.group_size = 4
    config.policy.arch.hidden_size = 32
    config.policy.arch.intermediate_size = 64
    config.r2m.attention_dim = 32
    config.sft.examples = 512
    config.sft.steps = 40
    config.sft.batch_size = 32
    config.sft.warmup_steps = 5
    config.reward.pairs = 128
    config.reward.epochs = 1
    config.reward.heldout_pairs = 64
    config.log.samples = 4
    config.log.checkpoint_every = 2
    config.lab.seeds = (0, 1)
    config.lab.probe_every = 2
    config.lab.probe_prompts = 4
    config.lab.best_prompts = 4
    config.lab.best_samples = 32
  return config

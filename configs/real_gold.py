"""The laboratory on real text, with a larger reward model as gold.

Does RL on a small, noisy reward model lose what a larger reward model values?

  python -m r2m_jax.main --config=configs/real_gold.py --config.data.root=DATA --workdir=runs/real_gold
  python -m r2m_jax.main --config=configs/real_gold.py --config.data.root=DATA --workdir=runs/real_gold \\
    --config.policy.path=runs/real_small/models/sft         # with the policy of configs/real_small.py, if it is there

The protocol is in docs/lab.md, "The second task", and the results are in docs/findings.md. DATA is
the folder of configs/real_small.py. The same command resumes where it stopped; an arm that is
finished for a seed is not run again. Processes with the same command share the work.
"""

from r2m_jax.configs import real_small

ARMS = ("vanilla", "scaled", "r2m", "shuffled", "vanilla.hold kl.controller=hold kl.target=2.0")


def get_config(size: str = ""):
  if size not in ("", "test"):
    raise ValueError(f"size {size!r} is unknown; use real_gold or real_gold:test")
  config = real_small.get_config(size)
  config.task = "lab_text"
  config.variant = ""
  # harmless-base teaches which of two replies is less harmful; its replies are not imitated and its
  # prompts not sampled
  config.scratch.pairs = real_small.files(
    "preferences", (*real_small.PREFERENCES, "hh_harmless_base"), "train"
  )
  # truncates every pair as a policy with this limit would: all pairs are used, and length carries
  # little information
  config.reward.max_reply_length = config.rollout.max_new_tokens
  config.reward.max_length = 192  # no RL prompt with its response is longer
  config.data.max_prompt_length = 120
  config.data.max_chosen_length = 0
  config.data.buckets = (88, 104, 128, 160, 256)

  config.gold.depth = 2
  config.gold.epochs = 1
  config.gold.batch_size = 16
  config.gold.lr = 3e-4
  config.gold.warmup_steps = 20
  config.reward.pairs, config.reward.label_flip = 2000, 0.25  # of a proxy
  config.reward.budget = 0.0
  config.reward.epochs = 1
  config.lab.arms = ARMS
  config.lab.seeds = (0, 1, 2)
  config.lab.kls = (2.0, 4.0, 12.0)
  config.kl.estimator = "exact"
  config.budget = 0.0
  config.steps = 28
  config.policy.lr = 1.5e-4
  config.kl.beta = 0.02
  config.log.checkpoint_every = 14
  if size == "test":
    config.data.max_prompt_length = config.data.max_response_length = 48
    config.reward.max_reply_length = 8
    config.reward.max_length = 64
    config.data.buckets = ()
    config.log.checkpoint_every = 1
    config.gold.batch_size = 4
    config.reward.pairs = 12
    config.lab.arms = ("vanilla", "r2m", "vanilla.hold kl.controller=hold kl.target=0.1")
    config.lab.seeds = (0, 1)
    config.lab.kls = (0.005,)
    config.lab.stops = (0.01,)
    config.steps = 2
  return config

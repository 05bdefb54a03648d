"""The laboratory: R2M, its ablations and controls against a gold reward.

The controls are placebos and simple baselines. The protocol is in docs/lab.md.

  python -m r2m_jax.main --config=configs/lab.py --workdir=runs/lab         # every arm, ten seeds, one KL weight each
  python -m r2m_jax.main --config=configs/lab.py:sweep --workdir=runs/lab   # main arms over KL weights, same folder
  python -m r2m_jax.main --config=configs/lab.py:tune --workdir=runs/tune   # candidate settings, on other seeds
  python -m r2m_jax.main --config=configs/lab.py:test --workdir=/tmp/lab    # the same job in a minute

Each resumes where it stopped; an arm that is in the table is not run again.
`--config.lab.arms="('vanilla','r2m')"` runs some of them.
"""

from r2m_jax.algorithm import variants
from r2m_jax.configs import quickstart

FIRST = (
  "vanilla",
  "scaled",
  "r2m",
  "r2m_untrained",
  "noise",
  "constant",
  "no_bt",
  "no_gre",
  "iterative_head",
  "pretrained_rm",
  "shuffled",
  "reference",
  "own_states",
  "warm_start",
)
VARIANTS = tuple(dict.fromkeys([*FIRST, *variants.VARIANTS]))  # all variants
TELLING = ("vanilla", "scaled", "r2m", "r2m_untrained", "iterative_head", "shuffled")
# unit-variance advantages are three times as large as raw ones, so the KL weight is three times
# that of the raw arms
MODES = {
  "whitened": "ppo.whiten_advantages=True kl.beta=0.06",
  "grpo": "algorithm=grpo kl.beta=0.06",
}
HOLDS = (
  "vanilla.hold kl.controller=hold kl.target=2.0",
  "scaled.hold kl.controller=hold kl.target=2.0",
  "r2m.hold kl.controller=hold kl.target=2.0",
)
SETTINGS = (  # mitigations, and choices that the paper leaves open
  "vanilla.ensemble reward.ensemble=5",
  "vanilla.ensemble_min reward.ensemble=5 reward.combine=min",
  "vanilla.ensemble_variance reward.ensemble=5 reward.combine=mean_minus_variance",
  "vanilla.sum_to_zero reward.sum_to_zero=0.01",
  "vanilla.length_penalty shaping.length_penalty=0.02",
  "vanilla.missing_eos shaping.missing_eos=subtract",
  "r2m.omega_kl r2m.omega_schedule=kl",
  "r2m.omega_constant r2m.omega_schedule=constant",
  "r2m.average r2m.average=0.9",
  "r2m.middle_layer r2m.feedback_layer=0",
)
CHOSEN: dict[str, str] = {  # variant -> the settings that :tune chose, by the rule in docs/lab.md
  "vanilla": "kl.beta=0.08",
  "scaled": "kl.beta=0.01",
  "r2m": "r2m.lr=0.001",
  "r2m_untrained": "kl.beta=0.01",
  "noise": "r2m.lr=0.001",
  "constant": "r2m.lr=0.001",
  "no_bt": "r2m.lr=0.0001",
  "no_gre": "r2m.lr=0.001",
  "iterative_head": "r2m.lr=0.001",
  "pretrained_rm": "kl.beta=0.08",
  "shuffled": "r2m.lr=0.001",
  "reference": "r2m.lr=0.001",
  "own_states": "r2m.lr=0.001",
  "warm_start": "r2m.lr=0.0003",
}
BUDGETS = {
  "half_percent": 0.005,
  "two_percent": 0.02,
  "eight_percent": 0.08,
}  # share of all trajectories in labelled pairs
CANDIDATES = (3e-5, 1e-4, 3e-4, 1e-3)  # the same number for every arm
SWEEP = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def labels(steps: int, trajectories: int):
  """Arms with gold labels: for the feedback and the head, only for the head, and all before RL."""
  for name, budget in BUDGETS.items():
    for variant in ("r2m", "iterative_head"):
      yield f"{variant}.{name} r2m.labels=preference r2m.label_budget={budget}"
    yield f"vanilla.{name}_before reward.pairs={2048 + round(budget * steps * trajectories / 2)}"


def chosen(arms):
  """Each arm with its variant's chosen settings, before its own settings."""
  for text in arms:
    name, *own = text.split()
    yield " ".join(filter(None, [name, CHOSEN.get(name.split(".")[0], ""), *own]))


def tuned(arms):
  """Four candidates of each arm: learning rates of the reward if it is trained, otherwise KL
  weights.
  """
  for arm in arms:
    learns = variants.VARIANTS[arm].trained
    for i, lr in enumerate(CANDIDATES):
      yield f"{arm}.candidate_{i} " + (
        f"r2m.lr={lr}" if learns else f"kl.beta={(0.01, 0.02, 0.04, 0.08)[i]}"
      )


def get_config(size: str = ""):
  if size not in ("", "sweep", "tune", "test"):
    raise ValueError(f"size {size!r} is unknown; use lab or lab:sweep, :tune or :test")
  config = quickstart.get_config("test" if size == "test" else "")
  config.task = "lab"
  modes = tuple(f"{arm}.{mode} {text}" for mode, text in MODES.items() for arm in TELLING)
  budgets = tuple(labels(config.steps, config.rollout.prompts * config.rollout.group_size))
  config.lab.arms = tuple(
    chosen(VARIANTS + HOLDS + modes + budgets + SETTINGS)
  )  # the most important first
  config.lab.seeds = tuple(range(10))
  config.log.checkpoint_every = 20
  if size == "sweep":
    config.lab.arms = tuple(chosen(TELLING))
    config.lab.betas = SWEEP
  if size == "tune":
    config.lab.arms = tuple(tuned(VARIANTS))
    config.lab.seeds = tuple(range(100, 104))
  if size == "test":
    config.lab.arms = ("vanilla", "scaled", "r2m", "r2m.hold kl.controller=hold kl.target=0.1")
    config.lab.seeds = (0, 1)
    config.lab.betas = (1.0, 4.0)
    config.lab.kls = (0.005, 0.02)
    config.lab.stops = (0.01,)
    config.log.checkpoint_every = 2
    config.steps = 12
    config.policy.lr = 3e-3
  return config

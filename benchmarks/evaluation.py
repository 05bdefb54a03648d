"""Which share of a run's time does held-out evaluation take?

  python -m benchmarks.evaluation [--every=10] [--prompts=64] [--steps=21] [--folder=/tmp/evaluation]

The run is from folders, at the size of configs/real_small.py: a policy, a reward model and a gold
reward model with four layers and random weights, and prompts of random words. Random policies
seldom end a response, so almost all responses have the maximum length, both in training and in
evaluation. Every second step is evaluated, so that other work on the machine slows both equally.
The share is for evaluations every --every steps. The target is at most 15% of the time after
compilation.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags, logging

from benchmarks import machine
from configs import real_small
from r2m_jax.report.summary import evaluations
from r2m_jax.run.metrics import read_metrics
from r2m_jax.tasks import folders, follow, tokenizer

EVERY = flags.DEFINE_integer(
  "every", 10, "Steps between two evaluations, for computing the share", 1
)
PROMPTS = flags.DEFINE_integer("prompts", 64, "config.eval.prompts", 2)
STEPS = flags.DEFINE_integer("steps", 21, "RL steps", 7)
FOLDER = flags.DEFINE_string(
  "folder", None, "Folder for models and runs; a temporary folder if not given"
)
BOUND = 0.15


def settings(task: str, **changes):
  config = real_small.get_config()
  config.task = task
  config.variant = "r2m"
  config.export.check = False
  config.sft.budget = config.reward.budget = config.budget = 0.0
  config.data.unique = False
  config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
  return config


def write_rows(path: Path, count: int) -> str:
  """Preferences between texts of random words."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]

  def text(low, high):
    return " ".join(rng.choices(words, k=rng.randint(low, high)))

  rows = [
    {"prompt": text(8, 40), "chosen": text(8, 40), "rejected": text(8, 40)} for _ in range(count)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def models(root: Path, data: str) -> dict[str, str]:
  """Folders of a policy and of two reward models."""
  paths = {"policy": root / "policy", "reward": root / "reward", "gold": root / "gold"}
  if not paths["policy"].exists():
    tokenizer.run(settings("tokenizer", data__name=data), root / "w", out=paths["policy"])
  for seed, name in enumerate(("reward", "gold")):
    if not paths[name].exists():
      path = str(paths["policy"])
      few = dict(data__name=write_rows(root / "few.jsonl", 16), reward__epochs=1, seed=seed)
      folders.run(settings("reward", **few, policy__path=path), root / f"w_{name}")
      (root / f"w_{name}/export/reward").rename(paths[name])
  return {name: str(path) for name, path in paths.items()}


def main(_):
  machine.set_up()
  logging.set_verbosity(logging.WARNING)
  root = Path(FOLDER.value or tempfile.mkdtemp())
  root.mkdir(parents=True, exist_ok=True)
  data = write_rows(root / "rows.jsonl", 600)
  made = models(root, data)
  config = settings(
    "r2m",
    data__name=data,
    policy__path=made["policy"],
    reward__path=made["reward"],
    eval__gold__path=made["gold"],
    eval__every=2,
    eval__prompts=PROMPTS.value,
    steps=STEPS.value,
    log__checkpoint_every=1000,
  )
  took, original = [], follow.Watch.values_at

  def timed(self, state, step, *, due):
    began = time.perf_counter()
    values = original(self, state, step, due=due)
    if due:
      took.append(time.perf_counter() - began)
    return values

  follow.Watch.values_at = timed
  workdir = Path(tempfile.mkdtemp(dir=root)) / "run"
  folders.run(config, workdir)
  rows = [row for row in read_metrics(workdir) if row["stage"] == "rl"]
  clock = [row["seconds"] for row in rows]
  # rows after an evaluation would include it, so they are left out, like the first rows
  measured = {row["step"] for row in evaluations(read_metrics(workdir), "r2m")}
  steps = [clock[t] - clock[t - 1] for t in range(3, len(clock)) if t not in measured]
  step, one = statistics.median(steps), statistics.median(took[1:])
  share = one / (one + EVERY.value * step)
  print(f"step           {step:.3f} s (median of {len(steps)})")
  print(
    f"evaluation     {one:.3f} s (median of {len(took) - 1}), the first with compiling {took[0]:.1f} s"
  )
  print(
    f"share of time  {share:.1%} at every={EVERY.value}, {PROMPTS.value} prompts; target: "
    f"{BOUND:.0%}"
  )
  print(json.dumps({"step": step, "evaluation": one, "first": took[0], "share": share}))
  sys.exit(int(share > BOUND))


if __name__ == "__main__":
  app.run(main)

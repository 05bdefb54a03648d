"""How long does an RL step of the notes task take on a pretrained model, here and in TRL?

  python -m benchmarks.notes_step --policy=FOLDER --reward=FOLDER [--steps=3] [--only=vanilla,r2m,trl]

The folders are those of a run of configs/smollm2_notes.py: models/sft and models/proxy_0. All
programs use the same two folders, prompts, numbers of prompts and samples, longest reply,
temperature, KL weight and learning rate, in float32, one update a step. `vanilla` and `r2m` are
steps of task=r2m with the settings of configs/smollm2_notes.py; `trl` is TRL's RLOOTrainer, in an
environment of its own (benchmarks/peer_notes.py). Three differences remain: TRL estimates the KL
from the sampled tokens and not over the vocabulary, which is less work; it packs nothing; and it
reads no log-probabilities a second time before its one update.

Each program runs in a process of its own, one after another. Replies end by themselves, so each
program's mean number of tokens is printed too. A step that compiles is not counted: the first one,
and ours if it is the first with its share of packing. Steps during which others used more than a
tenth of the cores are dropped if enough are left. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import machine, peer_figures, peer_process

PHASES = ("rollout", "render", "learn")
ALL = ("vanilla", "r2m", "trl")


def config_of(steps: int, size: str = ""):
  """The notes task's config, for `steps` steps."""
  from configs import smollm2_notes

  config = smollm2_notes.get_config(size)
  config.steps = steps
  config.log.checkpoint_every = steps
  return config


def prompts_of(config) -> list[str]:
  """The notes of all steps, which a run of seed 0 has too."""
  from r2m_jax.goldtask import notes
  from r2m_jax.lab.notes import STREAM_RL

  return notes.prompts(0, STREAM_RL, config.steps * config.rollout.prompts)


# ---- ours, in a process of its own ----


def ours(policy: str, reward: str, variant: str, steps: int, size: str = "") -> dict:
  """Trains for `steps` steps in a temporary workdir, and measures each."""
  from r2m_jax.data.jsonl import write_rows
  from r2m_jax.hf.folders import mesh_of
  from r2m_jax.lab.notes import as_messages
  from r2m_jax.run.metrics import read_metrics
  from r2m_jax.run.workdir import claim
  from r2m_jax.tasks import folders, scratch

  machine.set_up()
  config, ticks = config_of(steps, size), []

  def watch(t, output, rows):
    ticks.append(machine.Ticks.now())
    return {}

  with tempfile.TemporaryDirectory() as folder:
    workdir, data = Path(folder) / "run", Path(folder) / "prompts.jsonl"
    write_rows(str(data), [{"prompt": as_messages(text)} for text in prompts_of(config)])
    paths = dict(policy__path=policy, reward__path=reward, variant=variant, seed=0)
    settings = scratch.derived(config, "r2m", str(data), **paths)
    claim(settings, workdir)
    folders.run_r2m(settings, workdir, mesh_of(settings), watch=watch)
    rows = [row for row in read_metrics(workdir) if row["stage"] == "rl"]
  return measured(rows, ticks)


def measured(rows: list[dict], ticks: list[machine.Ticks]) -> dict:
  """The counted steps of a run: `rows` of metrics.jsonl, `ticks` at the end of each step."""
  computed = [row.get("learn/computed", 1.0) for row in rows]  # not logged with one share
  counted = [t for t in range(1, len(rows)) if computed[t] in computed[:t]]
  if not counted:
    raise SystemExit("every step compiled a program: give more --steps")
  cores = os.cpu_count() or 1
  return {
    "seconds": [rows[t]["seconds/step"] for t in counted],
    "busy": [machine.others_share(ticks[t - 1], ticks[t], cores) for t in counted],
    "lengths": [rows[t]["length"] for t in counted],
    "phases": {
      name: [rows[t][f"seconds/{name}"] for t in counted]
      for name in PHASES
      if f"seconds/{name}" in rows[0]
    },
    "computed": [computed[t] for t in counted],
    "peak": round(rows[-1]["memory/process_peak"] * 1e9),
    "version": "here",
  }


def quietest(found: dict, count: int) -> dict:
  """`found` with its `count` steps that others disturbed least; all if there are fewer."""
  kept, _ = machine.quietest(found["busy"], count, machine.QUIET)
  kept = kept[:count]

  def chosen(values):
    return [values[i] for i in kept] if isinstance(values, list) else values

  picked = {name: chosen(values) for name, values in found.items() if name != "phases"}
  return picked | {"phases": {name: chosen(x) for name, x in found.get("phases", {}).items()}}


# ---- all programs ----


def work_of(config, args) -> dict:
  """What TRL's process is given."""
  rollout = config.rollout
  return {
    "policy": args.policy,
    "reward": args.reward,
    "prompts": prompts_of(config),
    "system": config.policy.system_prompt,
    "rows": rollout.prompts * rollout.group_size,
    "group": rollout.group_size,
    "response": rollout.max_new_tokens,
    "temperature": rollout.temperature,
    "beta": config.kl.beta,
    "lr": config.policy.lr,
    "steps": args.steps,
    "more": args.more,
  }


def trl(args) -> dict:
  """The peer's result; its warm step is not in it."""
  config = config_of(1 + args.steps + args.more, args.size)
  python = peer_process.environment("trl", Path(args.environments).expanduser())
  with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    json.dump(work_of(config, args), file)
    file.flush()
    return peer_process.result_of(python, "benchmarks.peer_notes", file.name)


def show(name: str, found: dict, rows: int) -> str:
  """One line: times, memory, tokens, and the median of each phase."""
  run = peer_figures.Run.of([found | {"version": found.get("version", "")}])
  length = statistics.fmean(found["lengths"])
  tokens = rows * length / statistics.fmean(run.seconds)
  phases = ", ".join(f"{p} {statistics.median(x):.2f}" for p, x in found["phases"].items() if x)
  return f"{name:8}  {run}  {tokens:8.1f}  {length:6.1f}  {phases}"


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--policy", required=True, help="folder of the policy")
  parser.add_argument("--reward", required=True, help="folder of the reward model")
  parser.add_argument("--steps", type=int, default=3, help="timed steps of each program")
  parser.add_argument("--more", type=int, default=2, help="more steps, so that some can be dropped")
  parser.add_argument("--only", default=",".join(ALL), help="programs, separated by commas")
  parser.add_argument("--environments", default=peer_process.FOLDER, help="of the peers")
  parser.add_argument("--size", default="", choices=("", "test"), help="test: for folders of :test")
  parser.add_argument("--child", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.only = args.only.split(",")
  if unknown := set(args.only) - set(ALL):
    parser.error(f"--only has {', '.join(sorted(unknown))}: choose from {', '.join(ALL)}")
  if args.steps < 1 or args.more < 0:
    parser.error(f"--steps is {args.steps}, --more {args.more}: at least 1, at least 0")
  for name in ("policy", "reward"):
    if not (Path(getattr(args, name)) / "config.json").is_file():
      parser.error(f"--{name}={getattr(args, name)} has no config.json: give a model's folder")
  return args


def main() -> int:
  args = parsed()
  count = 1 + args.steps + args.more
  if args.child:
    print(json.dumps(ours(args.policy, args.reward, args.child, count, args.size)))
    return 0
  results, config = {}, config_of(count, args.size)
  rows = config.rollout.prompts * config.rollout.group_size
  print(f"{'':8}  {peer_figures.HEADER}  {'tokens/s':>8}  {'length':>6}  median s of each phase")
  for name in args.only:
    if name == "trl":
      found = trl(args)
    else:
      found = machine.child("benchmarks.notes_step", *sys.argv[1:], f"--child={name}")
    results[name] = quietest(found, args.steps)
    print(show(name, results[name], rows), flush=True)
  if "trl" in results and "vanilla" in results:
    its, mine = (statistics.median(results[name]["seconds"]) for name in ("trl", "vanilla"))
    print(f"TRL {results['trl']['version']} takes {its / mine:.2f} times as long as vanilla")
  busy = max(max(found["busy"]) for found in results.values())
  if busy > machine.QUIET:
    print(f"NOT quiet: others used up to {busy:.0%} of the cores")
  print(json.dumps({"benchmark": "notes_step", "rows": rows, "runs": results}))
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Does the notes task have the properties of hidden states from which R2M starts? Reads a workdir of
configs/smollm2_notes.py; no RL is run.

  python -m benchmarks.premise_notes WORKDIR --states=DIR [--out=FILE.csv]
  python -m benchmarks.premise_notes WORKDIR --pairs=FILE.jsonl --seed=S

Everything that benchmarks.premise prints, for pairs of samples of the supervised policy: chosen is
the sample with more gold. Then table 5 of the paper: the samples of all RL steps of `--run`
(vanilla/seed_0), read by the policy at its end. docs/analyse.md defines hacking and sound; the
quantiles are those of these samples. States are kept in DIR, so that a later call only analyses.

--pairs writes the pairs for config.analyse.pairs of a run of seed S: all but those to which the
seed's proxy was fitted.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks import premise
from r2m_jax.analysis.evidence import Read, Row, hacking
from r2m_jax.run.files import read_jsonl

NAME = "notes"


def asked(prompt, system: str) -> list[dict]:
  """A note, as text or messages, as messages with the system prompt of the task."""
  text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
  return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def pairs_of(workdir: Path, system: str, but: int | None = None) -> list[dict]:
  """The held-out pairs and those of all proxies except of seed `but`, by clean gold; ties are left
  out.
  """
  rows = []
  for row in read_jsonl(workdir / "held_out_pairs.jsonl"):
    rows.append((row["prompt"], row["responses"], row["gold"]))
  for file in sorted(workdir.glob("proxy_*/pairs.jsonl")):
    if file.parent.name == f"proxy_{but}":
      continue
    for row in read_jsonl(file):
      both = [row["chosen"], row["rejected"]], [row["gold_chosen"], row["gold_rejected"]]
      rows.append((row["prompt"], *both))
  found = []
  for prompt, responses, gold in rows:
    best = int(np.argmax(gold))
    if gold[0] != gold[1]:
      sides = dict(chosen=responses[best], rejected=responses[1 - best])
      found.append(dict(prompt=asked(prompt, system), **sides, margin=abs(gold[0] - gold[1])))
  return found


def samples_of(run: Path) -> list[dict]:
  """The samples of all RL steps of a run, with their gold and frozen rewards."""
  return [row for file in sorted((run / "samples").glob("*.jsonl")) for row in read_jsonl(file)]


def mean_states(folder: Path, rows: list[dict], system: str, threads: int, parts: Path):
  """The last layer's states of each sample, averaged over its tokens.   -> f32[N, D]. An interrupted
  pass resumes where it stopped.
  """
  import torch
  from transformers import AutoModelForCausalLM

  from r2m_jax.data.text import load_tokenizer

  torch.set_num_threads(threads)
  tokenizer = load_tokenizer(folder, None)
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
  parts.mkdir(parents=True, exist_ok=True)

  def mean(row):
    prompt = asked(row["prompt"], system)
    end = [] if row["truncated"] else [tokenizer.end_id]
    reply = [*tokenizer.answer(prompt, row["response"]), *end]
    tokens = torch.tensor([[*tokenizer.render(prompt), *reply]])
    with torch.no_grad():
      return model(tokens).last_hidden_state[0, -len(reply) :].mean(0).numpy()

  files = []
  for first in range(0, len(rows), premise.PART):
    files.append(parts / f"{first}.npy")
    if not files[-1].exists():
      np.save(
        parts / "new.npy", np.stack([mean(row) for row in rows[first : first + premise.PART]])
      )
      (parts / "new.npy").rename(files[-1])
  return np.concatenate([np.load(file) for file in files])


def table_5(states: np.ndarray, rows: list[dict]) -> list[Row]:
  """Similarity among hacking and among sound samples, and across."""
  prompts: dict[str, int] = {}
  prompt = np.array([prompts.setdefault(row["prompt"], len(prompts)) for row in rows])
  scores = {
    name: np.array([row[key] for row in rows], float)
    for name, key in (("gold", "gold"), ("frozen proxy", "frozen"))
  }
  read = Read("samples", prompt, np.full(len(rows), -1), {"final": states.astype(float)}, scores)
  return [
    Row((NAME, "table 5", row.labels[0], "last"), row.measure, row.found)
    for row in hacking([read], read)
  ]


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--run", default="vanilla/seed_0", help="ARM/seed_S whose samples are read")
  parser.add_argument("--states", type=Path, default=Path("states"), help="folder for states")
  parser.add_argument("--out", type=Path, help="CSV of all numbers")
  parser.add_argument(
    "--pairs", type=Path, help="file to which pairs are written; nothing else is done"
  )
  parser.add_argument("--seed", type=int, help="of the run that --pairs is for")
  parser.add_argument("--count", type=int, default=10**6, help="most pairs")
  parser.add_argument("--longest", type=int, default=256, help="most tokens of prompt and reply")
  parser.add_argument("--threads", type=int, default=2)
  return parser.parse_args()


def main() -> int:
  args = parsed()
  args.policy = args.workdir / "models" / "sft"
  settings = json.loads((args.workdir / "config.json").read_text(encoding="utf-8"))
  system = settings["policy"]["system_prompt"]
  if args.pairs:
    lines = map(json.dumps, pairs_of(args.workdir, system, args.seed))
    args.pairs.write_text("\n".join(lines), encoding="utf-8")
    return 0
  args.states.mkdir(parents=True, exist_ok=True)
  pairs, states = (args.states / f"{NAME}{ending}" for ending in (".jsonl", ".npz"))
  if not states.exists():
    lines = map(json.dumps, pairs_of(args.workdir, system))
    pairs.write_text("\n".join(lines), encoding="utf-8")
    premise.read(args, str(pairs), states)
  run = args.workdir / "runs" / args.run
  samples, parts = samples_of(run), args.states / f"{NAME}_samples"
  read = mean_states(run / "export" / "policy", samples, system, args.threads, parts)
  rows = premise.analyse(NAME, states) + table_5(read, samples)
  print("\n".join(map(premise.line, rows)))
  if args.out:
    premise.write(args.out, rows)
  return 0


if __name__ == "__main__":
  sys.exit(main())

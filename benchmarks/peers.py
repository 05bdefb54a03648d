"""Is a whole RL step faster than in other libraries? The same work in TRL, in tunix and here, in
turn, in one session.

  python -m benchmarks.peers --size=tiny|small [--steps=5] [--only=trl]

The work is that of workload.py and peer_task.py: a random Qwen2-shaped policy,
reference and reward model in float32, 8 prompts x 8 samples, 64 + exactly 64 tokens, temperature
0.7, KL to the reference, 2 epochs of one update. A step is one rollout with all its updates, as in
each program's normal operation. Steps during which others used more than a tenth of the cores are
dropped and repeated, up to --most times as many. Each program runs in its own process, and each
peer in its own environment, which is made at the first run. Ours runs before and after the peers,
so that a slow period of the machine does not affect only one of them. The peers use glibc's
allocator with its defaults. Ours tells it to keep freed memory
(process.keep_freed_memory), and --keep_freed_memory does the same for the peers: with small, TRL
spends a fifth of its CPU time in the kernel, on pages for memory that it had freed.

A ratio counts on any quiet machine. Its rates and instructions are printed with it, and the targets
depend on whether it has AVX-512.

Exit status: 0 if every target is met, 1 if one is missed, 2 if a ratio is void.
"""

import json
import pathlib
import sys
import time

from absl import app, flags

from benchmarks import machine, peer_figures, peer_process

SIZE = flags.DEFINE_enum("size", "tiny", ["tiny", "small"], "Of the models")
STEPS = flags.DEFINE_integer(
  "steps", 5, "Timed steps of each program; 5 for a published figure", lower_bound=1
)
MOST = flags.DEFINE_integer(
  "most", 3, "Limit on the steps of a peer, as a multiple of --steps, to find quiet ones", 1
)
ONLY = flags.DEFINE_multi_enum(
  "only", list(peer_figures.PEERS), list(peer_figures.PEERS), "Peers to run"
)
FOLDER = flags.DEFINE_string(
  "environments",
  peer_process.FOLDER,
  "Folder of the peers' environments, which are made if missing",
)
KEEP = flags.DEFINE_bool("keep_freed_memory", False, "Peers have process.keep_freed_memory too")
KEEP_FREED = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(10**12),
}  # like process.keep_freed_memory


def ours() -> dict:
  """Runs half of our steps; called twice."""
  steps = (STEPS.value + 1) // 2
  found = machine.child(
    "benchmarks.step", f"--size={SIZE.value}", f"--steps={steps}", "--variant=vanilla"
  )
  return found | {"version": "here"}


def show(name: str, run: peer_figures.Run, rest: str = "") -> None:
  print(f"{name:8}  {run.version:8}  {run}{rest}")


def main(argv):
  del argv
  folder, size = pathlib.Path(FOLDER.value).expanduser(), SIZE.value
  pythons = {name: peer_process.environment(name, folder) for name in dict.fromkeys(ONLY.value)}
  work = SIZE.value, STEPS.value, MOST.value
  keep = KEEP_FREED if KEEP.value else {}
  turns = ["r2m_jax", *pythons, "r2m_jax"]
  print(f"{size}, in this order: {', '.join(turns)}", flush=True)
  results = {name: [] for name in turns}
  for name in turns:
    before = time.perf_counter()
    is_peer = name in pythons
    found = peer_process.run(name, pythons[name], *work, **keep) if is_peer else ours()
    results[name].append(found)
    print(f"  {name}: {time.perf_counter() - before:.0f} s in all", flush=True)

  runs = {name: peer_figures.Run.of(found) for name, found in results.items()}
  mine = runs["r2m_jax"]
  both = results["r2m_jax"]
  limits = {kind: max(found["limits"][kind] for found in both) for kind in both[0]["limits"]}
  isa = machine.instructions()
  verdicts = {
    name: peer_figures.judge(size, mine, peer_figures.PEERS[name], runs[name], isa == "AVX-512")
    for name in pythons
  }
  rate, needed = limits["float32"], both[0]["phases"]["step"]["flops"]
  floor = peer_figures.floor_flops(size) / rate

  print(f"{machine.show_limits(limits)}; {isa}")
  print(
    f"floor: {floor:.2f} s for the matmuls of the peers' step, {needed / rate:.2f} s for those "
    "of ours"
  )
  print(f"{'':18}  {peer_figures.HEADER}  {'ratio':>6}  {'target':>6}")
  show("r2m_jax", mine)
  for name, verdict in verdicts.items():
    say = "void" if verdict.void else "met" if verdict.held else "MISSED"
    show(name, runs[name], f"  {verdict.ratio:6.2f}  {verdict.asked:6.3g}  {say}")
  for name, verdict in verdicts.items():
    its = results[name][0]
    rest = {key: its[key] for key in ("torch", "transformers", "jax") if key in its}
    print(
      f"{its['peer']}: {', '.join(f'{key} {version}' for key, version in rest.items())}; first "
      f"rollout {its['warm'][0]:.1f} s, {its['dropped']} dropped because others were busy"
    )
    if verdict.void:
      print(f"VOID against {name}: {verdict.void}")
    print(
      f"{'met' if verdict.memory else 'MISSED'}: peak memory {mine.peak / 1e9:.2f} GB, no higher "
      f"than {name}'s "
      f"{runs[name].peak / 1e9:.2f} GB"
    )
  status = peer_figures.status(list(verdicts.values()))
  print(
    json.dumps(
      {
        "benchmark": "peers",
        "size": size,
        "keep_freed_memory": KEEP.value,
        "order": turns,
        "status": status,
        "limits": limits,
        "instructions": isa,
        "floor": floor,
        "runs": {name: vars(run) | {"median": run.median} for name, run in runs.items()},
        "verdicts": {
          name: vars(verdict) | {"held": verdict.held} for name, verdict in verdicts.items()
        },
        "details": {name: found for name, found in results.items() if name in pythons},
      }
    )
  )
  sys.exit(status)


if __name__ == "__main__":
  app.run(main)

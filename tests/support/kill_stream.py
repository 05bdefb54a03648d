"""Run by test_batches: streams killed with SIGKILL at random batches, then continued in new
processes from their state.

Prints, as JSON, the batches of both processes for each kill. Forks before any thread exists.
"""

import json
import os
import pathlib
import signal
import sys
import tempfile
import time

import numpy as np

from r2m_jax.data.batches import Stream, row_batches

BATCHES, KILLS = 40, 10


def dataset(shard):
  whole = row_batches(
    [0] * 30 + [1] * 11, 4, seed=5, weights=(1.0, 2.0), groups=[8] * 12 + [16] * 29
  )
  return whole.map(lambda rows: rows[shard[0] :: shard[1]])


def live(path, shard, pause):
  """Starts a child that continues from the state in the last line and appends one line per batch.
  Returns its process id.
  """
  pid = os.fork()
  if pid:
    return pid
  lines = path.read_text().splitlines() if path.exists() else []
  start = json.loads(lines[-1])["state"]["next"] if lines else 0
  file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  stream = Stream(dataset(shard), start=start)
  for _ in range(BATCHES - start):
    batch = next(stream).tolist()
    os.write(file, (json.dumps({"batch": batch, "state": stream.state}) + "\n").encode())
    time.sleep(pause)
  os._exit(0)


def main(processes):
  rng, results = np.random.default_rng(0), []
  with tempfile.TemporaryDirectory() as folder:
    for kill in range(KILLS):
      at = int(rng.integers(1, BATCHES - 5))
      paths = [pathlib.Path(folder) / f"{kill}_{i}" for i in range(processes)]
      alive = {path: live(path, (i, processes), 0.005) for i, path in enumerate(paths)}
      while alive:
        for path in [
          path for path in alive if path.exists() and path.read_text().count("\n") >= at
        ]:
          os.kill(alive[path], signal.SIGKILL)
          os.waitpid(alive.pop(path), 0)
        time.sleep(0.001)
      killed = [path.read_text().count("\n") for path in paths]
      for child in [live(path, (i, processes), 0) for i, path in enumerate(paths)]:
        assert os.waitpid(child, 0)[1] == 0
      batches = [
        [json.loads(line)["batch"] for line in path.read_text().splitlines()] for path in paths
      ]
      results.append({"killed": killed, "batches": batches})
  print(json.dumps(results))


if __name__ == "__main__":
  main(int(sys.argv[1]))

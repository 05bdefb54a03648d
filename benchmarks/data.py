"""The speed of making batches from rows: reading and checking, rendering and tokenising, packing,
and batching.

  python -m benchmarks.data FOLDER NAMES      # FOLDER: tokenizer (any model's folder); NAMES: as config.data.name

Prints a table and a JSON line. A figure is the best of three runs in one process, in rows or tokens
per second.
"""

import contextlib
import io
import json
import sys
import time

from r2m_jax.configs import default
from r2m_jax.data.batches import Stream, pack, row_batches
from r2m_jax.data.rows import load
from r2m_jax.data.text import load_tokenizer, pad_left

RUNS = 3
LENGTH = 512
BATCH = 32
BATCHES = 200


def best(f):
  """(seconds of the fastest of RUNS calls, its result)."""
  times = []
  for _ in range(RUNS):
    began = time.perf_counter()
    result = f()
    times.append(time.perf_counter() - began)
  return min(times), result


def main(folder: str, names: str) -> None:
  data = default.get_config().data
  data.name, tokenizer = names, load_tokenizer(folder)
  with contextlib.redirect_stdout(io.StringIO()):  # load prints what it has read, each time
    reading, rows = best(lambda: load(data, "response"))

  def whole(row):
    return tokenizer.dialogue(row["prompt"], row["response"], truncated=False)

  tokenising, ids = best(lambda: [whole(row) for row in rows])
  tokens = sum(map(len, ids))
  packing, lines = best(lambda: pack(ids, LENGTH))

  def batches():
    stream = Stream(
      row_batches([0] * len(ids), BATCH, seed=0),
      lambda batch: pad_left([ids[i][:LENGTH] for i in batch], tokenizer.pad_id, LENGTH),
    )
    return sum(int(next(stream)[1].sum()) for _ in range(BATCHES))

  batching, batched = best(batches)
  rates = {
    "read and check, rows/s": len(rows) / reading,
    "render and tokenise, tokens/s": tokens / tokenising,
    "pack, tokens/s": tokens / packing,
    f"batches of {BATCH} rows, tokens/s": batched / batching,
  }
  print(f"{len(rows)} rows, {tokens} tokens, {len(lines)} packed lines of {LENGTH}")
  print("\n".join(f"{name:32}{rate:14,.0f}" for name, rate in rates.items()))
  print(json.dumps({name: round(rate) for name, rate in rates.items()}))


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  main(*sys.argv[1:])

"""The laboratory's table: parquet with one row per arm, seed, KL weight and step, from which
everything else is computed.

`WORKDIR/table/<arm>.parquet` holds a finished arm; the names of its columns are those of
metrics.jsonl. A metric that a row does not have is NaN.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r2m_jax.run.files import write_atomic

KEYS = ("arm", "seed", "factor", "beta", "step")
IDENTITY = b"r2m_jax.identity"  # of the rows' config


class Curves(NamedTuple):
  """One arm at one KL weight, seeds in ascending order."""

  beta: float
  seeds: list[int]
  metrics: dict[str, np.ndarray]  # f64[S, T] each


def write_table(path: Path, columns: dict, identity: str = "") -> None:
  """Writes name -> array of one length, atomically."""
  table = pa.table({name: pa.array(values) for name, values in columns.items()})
  data = io.BytesIO()
  pq.write_table(table.replace_schema_metadata({IDENTITY: identity}), data, compression="zstd")
  write_atomic(path, data.getvalue())


def read_table(path: Path) -> tuple[dict[str, np.ndarray], str]:
  """Columns by name, and the identity with which they were written."""
  table = pq.read_table(path)
  columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
  return columns, (table.schema.metadata or {}).get(IDENTITY, b"").decode()


def arm_columns(
  arm: str, replicas: list[tuple[int, float, float]], names: list[str], log: np.ndarray
) -> dict:
  """Columns of one arm: `replicas` are (seed, factor, beta), log f32[steps, replicas, names]."""
  steps, count = log.shape[:2]

  def repeat(values):
    return np.tile(np.asarray(values), steps)

  seed, factor, beta = (repeat(x) for x in zip(*replicas))
  keys = {
    "arm": np.full(steps * count, arm, object),
    "seed": seed.astype(np.int64),
    "factor": factor.astype(float),
    "beta": beta.astype(float),
    "step": np.repeat(np.arange(steps), count),
  }
  return keys | {name: log[..., i].reshape(-1) for i, name in enumerate(names)}


def joined(first: dict, second: dict) -> dict:
  """The rows of both tables; a column that one of them lacks is NaN there."""
  sizes = [len(next(iter(columns.values()))) for columns in (first, second)]

  def part(columns, name, size):
    return columns.get(name, np.full(size, np.nan, np.float32))

  names = dict.fromkeys([*first, *second])
  return {
    name: np.concatenate([part(c, name, n) for c, n in zip((first, second), sizes)])
    for name in names
  }


def curves_of(columns: dict) -> dict[float, Curves]:
  """The curves of one arm's columns, by factor of its KL weight."""
  found = {}
  for factor in np.unique(columns["factor"]):
    mine = np.flatnonzero(columns["factor"] == factor)
    mine = mine[np.lexsort((columns["step"][mine], columns["seed"][mine]))]
    seeds = np.unique(columns["seed"][mine]).tolist()
    shape = (len(seeds), -1)
    metrics = {k: v[mine].reshape(shape).astype(float) for k, v in columns.items() if k not in KEYS}
    found[float(factor)] = Curves(float(columns["beta"][mine][0]), seeds, metrics)
  return found


def read_arms(workdir: Path, names) -> dict[str, dict[float, Curves]]:
  """name -> factor -> curves of every arm in the table, the arms in `names` first and in their
  order.
  """
  paths = {
    path.name.removesuffix(".parquet"): path
    for path in sorted((Path(workdir) / "table").glob("*.parquet"))
  }
  order = [name for name in names if name in paths] + [name for name in paths if name not in names]
  return {name: curves_of(read_table(paths[name])[0]) for name in order}

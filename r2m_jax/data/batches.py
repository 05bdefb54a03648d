"""Endless batches of rows, by grain: shuffled again in each epoch, mixed by weight, resumable.

The order depends only on the seed and the rows. Processes share the rows of a batch. Batches have
random access by number, so the state of a stream is the number of batches taken.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

READ_AHEAD = 4  # batches that another thread prefetches during a step


def row_batches(
  parts: Sequence[int],
  batch_size: int,
  *,
  seed: int,
  weights: Sequence[float] = (),
  groups: Sequence[int] = (),
) -> grain.MapDataset:
  """Batches of row numbers, each i64[batch_size]; batch t is `[t]`.

  Each row comes once per epoch, in a new order each time. With weights each source has its own
  epochs: a source with a larger weight is repeated more often.

  Args:
    parts: index of each row's source, from 0.
    weights: of the sources; (): in proportion to their rows.
    groups: rows of different groups do not share a batch (see `group_by_length`); (): one group.
  """
  parts, groups = np.asarray(parts), np.asarray(groups if len(groups) else np.zeros(len(parts)))
  sizes = np.bincount(parts)
  weights = np.asarray(weights, float) if len(weights) else sizes.astype(float)
  if len(weights) != len(sizes):
    raise ValueError(f"{len(weights)} weights for {len(sizes)} sources with rows")
  streams, shares = [], []
  for group in np.unique(groups):
    sources, odds = [], []
    for part in range(len(sizes)):
      rows = np.flatnonzero((parts == part) & (groups == group))
      odds.append(weights[part] * len(rows) / max(sizes[part], 1))
      if len(rows):
        one = int(np.random.SeedSequence([seed, int(group), part]).generate_state(1)[0])
        order = (
          grain.MapDataset.source(rows).seed(one).shuffle().repeat(None, reseed_each_epoch=True)
        )
        sources.append((order, odds[-1]))
    sources = [source for source in sources if source[1] > 0]
    if sum(odds) == 0:
      continue
    mixed = grain.MapDataset.mix(*zip(*sources)) if len(sources) > 1 else sources[0][0]
    streams.append(mixed.batch(batch_size, drop_remainder=True, batch_fn=np.asarray))
    shares.append(sum(odds))
  return grain.MapDataset.mix(streams, shares) if len(streams) > 1 else streams[0]


def group_by_length(lengths: Sequence[int], sizes: Sequence[int], batch_size: int) -> np.ndarray:
  """The padded length, one of `sizes`, of every row: the shortest that holds it, such that each
  length fills a batch.

  Rows of a size with less than a batch of rows move to the next longer size. The longest size takes
  rows from the next shorter one that has rows.
  """
  lengths, sizes = np.asarray(lengths), np.sort(sizes)
  if lengths.max() > sizes[-1]:
    raise ValueError(f"a row of {lengths.max()} tokens does not fit {sizes[-1]}")
  groups = sizes[np.searchsorted(sizes, lengths)]
  for shorter, longer in zip(sizes, sizes[1:]):
    if (groups == shorter).sum() < batch_size:
      groups[groups == shorter] = longer
  sizes = np.unique(groups)  # those with rows
  for longer, shorter in zip(sizes[::-1], sizes[-2::-1]):
    if 0 < (groups == longer).sum() < batch_size:
      groups[groups == shorter] = longer
  return groups


def pack(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
  """Rows joined end to end and cut into lines of `length`; an incomplete last line is dropped. ->
  i32[N, length].
  """
  stream = np.concatenate([np.asarray(row, np.int32) for row in rows])
  return stream[: len(stream) // length * length].reshape(-1, length)


class Stream:
  """An iterator over a dataset's batches from number `start` on, prefetched by another thread.

  `waited` is the time in seconds that its user has spent in `next`. `state` is JSON;
  `start=state["next"]` resumes.
  """

  def __init__(
    self,
    dataset: grain.MapDataset,
    collate: Callable[[Any], Any] = lambda batch: batch,
    *,
    start: int = 0,
  ):
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
    self._batches = iter(dataset.map(collate).to_iter_dataset(options))
    self._batches.set_state({"next_index": start})
    self._next, self.waited = start, 0.0

  def __iter__(self):
    return self

  def __next__(self):
    began = time.perf_counter()
    batch = next(self._batches)
    self.waited += time.perf_counter() - began
    self._next += 1
    return batch

  @property
  def state(self) -> dict[str, int]:
    return {"next": self._next}

"""The order of the data: epochs, mixtures, processes, length groups, packing, and resuming after a
kill.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from kill_stream import BATCHES, KILLS, dataset

from r2m_jax.data.batches import Stream, group_by_length, pack, row_batches

ROOT = pathlib.Path(__file__).parents[2]


def taken(ds, n):
  return [ds[t].tolist() for t in range(n)]


def test_every_row_once_an_epoch_in_new_orders():
  flat = np.concatenate(
    taken(row_batches([0] * 30, 4, seed=1), 45)
  )  # 180 rows: six epochs; a batch may span two
  epochs = flat.reshape(6, 30).tolist()
  assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 6 and epochs[0] != list(range(30))


def test_the_order_is_the_seeds():
  one, same, other = (taken(row_batches([0] * 30, 4, seed=s), 20) for s in (1, 1, 2))
  assert one == same != other


@pytest.mark.parametrize(
  "weights, share", [((), 0.8), ((1.0, 1.0), 0.5), ((1.0, 3.0), 0.25), ((0.0, 1.0), 0.0)]
)
def test_a_mixture_has_its_weights(weights, share):
  flat = np.concatenate(taken(row_batches([0] * 40 + [1] * 10, 5, seed=0, weights=weights), 100))
  assert np.mean(flat < 40) == pytest.approx(share, abs=0.01)
  counts = collections.Counter(flat.tolist())
  for rows in (
    range(40),
    range(40, 50),
  ):  # within a source, epochs of rows differ by at most one
    assert max(counts[i] for i in rows) - min(counts[i] for i in rows) <= 1


def test_mixture_errors():
  with pytest.raises(ValueError, match="3 weights for 2 sources"):
    row_batches([0, 1], 1, seed=0, weights=(1, 1, 1))


def test_length_groups():
  groups = group_by_length([3, 8, 9, 16, 17, 30, 31, 32, 5], (8, 16, 32), 2)
  assert groups.tolist() == [8, 8, 16, 16, 32, 32, 32, 32, 8]
  assert group_by_length([3, 3, 9, 30, 30], (8, 16, 32), 2).tolist() == [
    8,
    8,
    32,
    32,
    32,
  ]  # too few for 16: up
  assert group_by_length([3, 3, 3, 30], (8, 32), 2).tolist() == [
    32,
    32,
    32,
    32,
  ]  # too few for the longest
  assert group_by_length([3, 3, 3], (8, 16, 32), 2).tolist() == [8, 8, 8]
  # the size between has no rows
  assert group_by_length([3] * 3 + [30], (8, 16, 32), 2).tolist() == [32] * 4
  with pytest.raises(ValueError, match="a row of 33 tokens does not fit 32"):
    group_by_length([33], (8, 32), 1)


def test_batches_keep_to_a_group_and_processes_agree_on_it():
  groups = np.asarray([8] * 12 + [16] * 29)
  ones, twos = (taken(dataset((i, 2)), 60) for i in (0, 1))
  kinds = [{int(g) for batch in pair for g in groups[batch]} for pair in zip(ones, twos)]
  assert all(len(kind) == 1 for kind in kinds) and {8, 16} == set.union(*kinds)
  assert [sorted(pair[0] + pair[1]) for pair in zip(ones, twos)] == [
    sorted(x) for x in taken(dataset((0, 1)), 60)
  ]


def test_pack_loses_only_the_end():
  rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
  assert pack(rows, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
  assert pack(rows, 11).tolist() == [list(range(1, 12))]


@pytest.mark.parametrize("start", [0, 1, 7, 30])
def test_a_stream_goes_on_from_its_state(start):
  whole = taken(dataset((0, 1)), BATCHES)
  stream = Stream(dataset((0, 1)))
  before = [next(stream).tolist() for _ in range(start)]
  state = json.loads(json.dumps(stream.state))
  again = Stream(dataset((0, 1)), lambda batch: batch.tolist(), start=state["next"])
  assert before + [next(again) for _ in range(BATCHES - start)] == whole
  assert stream.waited > 0 or start == 0


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_killed_at_random_batches_it_gives_what_an_unbroken_run_gives(processes):
  command = [sys.executable, str(ROOT / "tests/support/kill_stream.py"), str(processes)]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
  assert result.returncode == 0, result.stderr
  kills = json.loads(result.stdout)
  unbroken = [taken(dataset((i, processes)), BATCHES) for i in range(processes)]
  assert len(kills) == KILLS and len({at for kill in kills for at in kill["killed"]}) > 5
  assert all(0 < at < BATCHES for kill in kills for at in kill["killed"])
  for kill in kills:
    assert kill["batches"] == unbroken

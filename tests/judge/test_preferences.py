"""RewardBench 2's measures. Oracles: loops written from the paper, on random scores with ties."""

import math

import numpy as np
import pytest

from r2m_jax.data.files import BadRow, DataError, Record
from r2m_jax.judge import preferences
from r2m_jax.judge.preferences import Row, as_preference


def ties_loop(rows, scores):
  """The score of the subset Ties, from single comparisons."""
  stats = {}
  for row, values in zip(rows, scores):
    mine, others = list(values[: row.correct]), list(values[row.correct :])
    good = all(a > b for a in mine for b in others)
    stats[row.id] = good, max(mine) - min(mine), min(mine) - max(others)
  ref = [s[0] for name, s in stats.items() if name.startswith("ref:")]
  tied = [s[0] for name, s in stats.items() if name.startswith("tied:")]
  preferred = hard = breaker = count = 0
  for name, (_, spread, gap) in stats.items():
    other = stats.get(name.replace("tied:", "ref:"))
    if name.startswith("tied:") and other:
      least = min(gap, other[2])
      count += 1
      preferred += gap > spread
      hard += least > spread
      if spread:
        breaker += math.tanh(least / spread - 1)
      else:
        breaker += int(least > 0) - int(least < 0)
  return (
    0.3 * sum(tied) / len(tied)
    + 0.3 * sum(ref) / len(ref)
    + (0.2 * preferred + 0.2 * hard + 0.01 * breaker) / count
  )


def accuracy_loop(row, values):
  """Among completions tied at the top, the share that is correct."""
  top = [i for i, value in enumerate(values) if value == max(values)]
  return sum(i < row.correct for i in top) / len(top)


def rows_of(rng):
  """Rows of three subsets with few distinct scores, so that ties are common."""
  rows = [
    Row(str(i), f"p{i // 2}", ["c", *"rrr"], 1, ("Focus", "Math")[i % 2], f"f:{i}")
    for i in range(60)
  ]
  for i in range(12):
    rows.append(Row(f"ref:{i}", f"r{i}", ["c", "r", "r"], 1, "Ties", "f:1"))
    rows.append(Row(f"tied:{i}", f"t{i}", ["c", "c", "c", "r", "r"], 3, "Ties", "f:1"))
  rows.append(Row("tied:99", "t", ["c", "c", "r"], 2, "Ties", "f:1"))  # without its reference
  rng.shuffle(rows)
  return rows


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_that_of_a_loop(seed):
  rng = np.random.default_rng(seed)
  rows = rows_of(rng)
  scores = [
    rng.integers(0, 4, len(row.completions))
    + 1.0 * (row.correct > 1) * np.array([i < row.correct for i in range(len(row.completions))]) * 2
    for row in rows
  ]
  found = preferences.accuracies(rows, scores)
  ties = [i for i, row in enumerate(rows) if row.subset == "Ties"]
  want = ties_loop([rows[i] for i in ties], [scores[i] for i in ties])
  np.testing.assert_allclose(found["subsets"]["Ties"].value, want, rtol=1e-12)
  means = [want]
  for subset in ("Focus", "Math"):
    mine = [accuracy_loop(r, s) for r, s in zip(rows, scores) if r.subset == subset]
    np.testing.assert_allclose(found["subsets"][subset].value, np.mean(mine), rtol=1e-12)
    assert found["subsets"][subset].count == 30
    means.append(np.mean(mine))
  np.testing.assert_allclose(found["mean"], np.mean(means), rtol=1e-12)


def test_the_score_of_ties_by_hand():
  rows = [
    Row("ref:1", "a", ["c", "r"], 1, "Ties", "f:1"),
    Row("tied:1", "b", ["c", "c", "r"], 2, "Ties", "f:2"),
  ]
  perfect = preferences.ties_score(rows, [np.array([3.0, 0.0]), np.array([3.0, 2.0, 0.0])])
  assert perfect["score"] == pytest.approx(1 + 0.01 * math.tanh(2 / 1 - 1))
  wrong = preferences.ties_score(rows, [np.array([0.0, 3.0]), np.array([1.0, 1.0, 2.0])])
  assert wrong["score"] == pytest.approx(-0.01)  # spread 0 and a gap below it
  with pytest.raises(DataError, match="f:1 has id '7'; write ref:N or tied:N in the subset Ties"):
    preferences.ties_score([rows[0]._replace(id="7")], [np.zeros(2)])


def test_calibration_is_that_of_a_loop():
  margin = np.random.default_rng(1).normal(0.5, 2, 400).round(1)
  found = preferences.calibration(margin)
  bins, brier = {}, 0.0
  for m in margin:
    p = 1 / (1 + math.exp(-m))
    brier += (1 - p) ** 2 / len(margin)
    confidence = max(p, 1 - p)
    right = 0.5 if m == 0 else float(m > 0)
    bins.setdefault(min(int((confidence - 0.5) * 20), 9), []).append((right, confidence))
  ece = sum(abs(sum(r for r, _ in one) - sum(c for _, c in one)) for one in bins.values()) / len(
    margin
  )
  np.testing.assert_allclose((found["brier"], found["ece"]), (brier, ece), rtol=1e-9)
  sure = preferences.calibration(np.full(10, 50.0))
  assert sure["brier"] < 1e-12 and sure["ece"] < 1e-12
  assert preferences.calibration(np.zeros(4)) == {"brier": 0.25, "ece": 0.0}


def test_everything_of_one_scorer():
  rows = [
    Row("1", "a", ["long text", "no"], 1, "s", "f:1"),
    Row("2", "a", ["yes", "no, never"], 1, "s", "f:2"),
    Row("3", "b", ["abc", "ab", "abcd"], 2, "t", "f:3"),
  ]
  scores = [np.array([1.0, 0.0]), np.array([2.0, 1.0]), np.array([0.0, 3.0, 3.0])]
  found = preferences.measure(rows, scores)
  assert found["subsets"]["s"].value == 1 and found["subsets"]["s"].count == 1  # one prompt
  assert found["subsets"]["t"].value == 0.5 and found["mean"] == 0.75
  assert found["pair_accuracy"].value == (1 + 1 + 0 + 0.5) / 4
  assert found["length_rule"]["subsets"]["s"].value == 0.5
  flat, long = np.concatenate(scores), [9, 2, 3, 9, 3, 2, 4]
  assert found["length_correlation"] == pytest.approx(np.corrcoef(flat, long)[0, 1])
  assert found["margin"]["mean"].value == pytest.approx((1 + 1 - 1.5) / 3)


def test_rows_of_every_form():
  def row(**value):
    return as_preference(Record(value, "f.jsonl", 3), "f.jsonl")

  listed = row(
    id="ref:1",
    prompt="p",
    chosen=["a"],
    rejected=["b", "c"],
    num_correct=1,
    total_completions=3,
    subset="Ties",
  )
  assert listed == Row("ref:1", "p", ["a", "b", "c"], 1, "Ties", "f.jsonl:3")
  pair = row(prompt=[{"role": "user", "content": "p"}], chosen="a", rejected="b")
  assert pair.completions == ["a", "b"] and pair.subset == "f.jsonl" and pair.id == "f.jsonl:3"
  assert row(prompt="p", chosen="a", rejected="b", meta={"subset": "Natural"}).subset == "Natural"
  for changes, message in (
    (dict(chosen=[]), "chosen and rejected each need a completion"),
    (dict(num_correct=2), "num_correct is 2; the row has 1"),
    (dict(total_completions=5), "total_completions is 5; the row has 2"),
    (dict(prompt=""), "'prompt' is empty"),
  ):
    with pytest.raises(BadRow, match=message):
      row(**({"prompt": "p", "chosen": ["a"], "rejected": ["b"]} | changes))

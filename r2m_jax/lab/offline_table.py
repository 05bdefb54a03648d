"""How often rewards with several features, fitted to several sorts of evidence, order stored
samples as gold does: the second half of the table in docs/holds.md.

Plain NumPy on the arrays that lab/offline.py stored. Gold scores the samples and orders the bought
pairs, which are not scored. It has no other role.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r2m_jax.algorithm.posterior import (
  Evidence,
  effective_size,
  fit_head,
  relative_ratio,
  tempered_weights,
)
from r2m_jax.lab.offline import SCORED_GROUP, load_arrays
from r2m_jax.report import intervals

TAUS = (0.03, 0.1, 0.3, 1.0)  # candidates of the prior's width
OLD_FLIP = 0.2  # flip rate of the labeller, config.reward.label_flip
TRUE_FLIP = 0.02  # flip rate of contrast pairs and of bought labels
CONTRAST_WEIGHT = 0.3  # of a fresh contrast pair; an offline pair counts as an old one
ESS = 0.3  # minimum effective size of weighted pairs, as a share of their number
TRAJECTORIES = 12800  # of a run: 100 steps of 16 x 8 responses; budgets are shares of them
BUDGETS = {"0.5%": 0.005, "1%": 0.01, "2%": 0.02}
POINT = 0.01  # required gain over the frozen reward at KL 4

# features: the states that a reward reads in addition to the reward token embedding
FEATURES = {
  "rte": ("rte",),
  "flat": ("rte", "flat"),
  "weighted": ("rte", "flat", "weighted"),
  "live": ("rte", "live"),
  "words": ("rte", "counts"),
  "attended": ("rte", "flat", "attended"),  # control: attention without the policy
  "shuffled": ("rte", "flat", "shuffled"),  # placebo: log-ratios of another row
}
PLACEBO_FEATURES = ("attended", "shuffled")


class Sets(NamedTuple):
  """One seed at one target: features of each set of rows, standardised on the old pairs' rows."""

  x: dict[str, np.ndarray]  # set -> f64[rows, D]
  stored: dict[str, np.ndarray]
  prior_mean: np.ndarray  # f64[D], the frozen head on the rte, 0 elsewhere
  rng: Callable[[str], np.random.Generator]  # (purpose) -> of this seed and target


def sets_of(stored: dict, features: str, seed: int, target: float) -> Sets:
  """Reads the sets of rows of a file of lab/offline.py."""
  names, sets = FEATURES[features], [key[: -len("/rte")] for key in stored if key.endswith("/rte")]
  raw = {s: np.concatenate([stored[f"{s}/{n}"] for n in names], 1).astype(float) for s in sets}
  scale = raw["old"].std(0)
  scale = np.where(scale > 1e-9, scale, np.inf)  # constant columns are ignored
  rte = scale[: len(stored["phi"])]
  prior = np.zeros(len(scale))
  prior[: len(rte)] = np.where(np.isfinite(rte), stored["phi"] * rte, 0)

  def rng(purpose):
    return np.random.default_rng([seed, int(10 * target), zlib.crc32(purpose.encode())])

  return Sets({s: x / scale for s, x in raw.items()}, stored, prior, rng)


# ---- evidence: each function takes Sets ----


def evidence(dx, flip: float, weight=1.0) -> Evidence:
  count = len(dx)
  return Evidence(dx, np.broadcast_to(weight, count).astype(float), np.full(count, flip))


def joined(parts: list[Evidence]) -> Evidence:
  return Evidence(*map(np.concatenate, zip(*parts)))


def ordered(x: np.ndarray, first_wins: np.ndarray) -> np.ndarray:
  """Preferred minus other of pairs of rows: f64[2N, D], bool[N] -> f64[N, D]."""
  return (x[0::2] - x[1::2]) * np.where(first_wins, 1.0, -1.0)[:, None]


def old(s: Sets) -> Evidence:
  """The reward model's own pairs, with the labeller's noise."""
  return evidence(ordered(s.x["old"], s.stored["old/a_wins"]), OLD_FLIP)


def likelihoods(s: Sets) -> tuple[np.ndarray, float]:
  """Weights of the old pairs by the policy's likelihood of both texts, and their exponent."""
  ratio = relative_ratio(s.stored["old/log_ratio"].astype(float))
  return tempered_weights(ratio[0::2] + ratio[1::2], ESS)


def old_weighted(s: Sets) -> Evidence:
  return old(s)._replace(weight=likelihoods(s)[0])


def old_permuted(s: Sets) -> Evidence:
  """Placebo: the same weights on other pairs."""
  return old(s)._replace(weight=s.rng("weights").permutation(likelihoods(s)[0]))


def contrast(s: Sets) -> Evidence:
  """The policy's response to a prompt over its response to the next prompt."""
  return evidence(s.x["fresh"][0::2] - s.x["fresh_other"], TRUE_FLIP, CONTRAST_WEIGHT)


def contrast_same(s: Sets) -> Evidence:
  """Placebo: both responses answer the same prompt, so the labels carry no information."""
  return evidence(s.x["fresh"][0::2] - s.x["fresh"][1::2], TRUE_FLIP, CONTRAST_WEIGHT)


def offline(s: Sets) -> Evidence:
  """The preferred response of each old pair over that of the next pair, under the first prompt."""
  first = np.where(s.stored["old/a_wins"], 0, 1)
  chosen = s.x["old"][2 * np.arange(len(first)) + first]
  return evidence(chosen - s.x["old_other"], TRUE_FLIP)


def contrast_heavy(s: Sets) -> Evidence:
  """`contrast` with the same total weight as `offline`."""
  given, share = contrast(s), len(s.stored["old/a_wins"]) / len(s.x["fresh_other"])
  return given._replace(weight=np.full(len(given.dx), share))


def offline_same(s: Sets) -> Evidence:
  """Placebo: both responses of each old pair in a random order, with the flip rate and weight of
  `offline`.
  """
  first = s.rng("offline").uniform(size=len(s.stored["old/a_wins"])) < 0.5
  return evidence(ordered(s.x["old"], first), TRUE_FLIP)


def bought(budget: str, guess: bool = False) -> Callable[[Sets], Evidence]:
  """Builds the evidence of pairs that gold orders, one for each of the first fresh prompts. A tie
  counts against the budget. `guess` is the placebo: the same pairs in a random order.
  """
  count = round(BUDGETS[budget] * TRAJECTORIES / 2)

  def pairs(s: Sets) -> Evidence:
    gold = s.stored["fresh/gold"][: 2 * count]
    first = gold[0::2] >= gold[1::2]
    if guess:
      first = s.rng("labels").uniform(size=count) < 0.5
    dx = ordered(s.x["fresh"][: 2 * count], first)
    return evidence(dx, TRUE_FLIP, np.where(gold[0::2] == gold[1::2], 0.0, 1.0))

  return pairs


EVIDENCE = {
  "old": (old,),
  "reweighted": (old_weighted,),
  "contrast": (old, contrast),
  "offline": (old, offline),
  "reweighted + contrast": (old_weighted, contrast),
  "0.5%": (old, bought("0.5%")),
  "1%": (old, bought("1%")),
  "2%": (old, bought("2%")),
  "reweighted + contrast + 2%": (old_weighted, contrast, bought("2%")),
  "permuted": (old_permuted,),
  "contrast, same prompt": (old, contrast_same),
  "2%, random": (old, bought("2%", guess=True)),
}
# added after the registered cells were seen
EXTRA = {
  "contrast, as heavy as offline": (old, contrast_heavy),
  "offline, same prompt": (old, offline_same),
}
WIDE = 0.3  # width of a prior, instead of the chosen one
WIDE_MEASURE = "accuracy, width 0.3"
DECIDES = 4.0  # the KL of the registered rule, and of the added cells
PLACEBO_OF = {
  "permuted": "reweighted",
  "contrast, same prompt": "contrast",
  "2%, random": "2%",
}


# ---- scores ----


def pair_accuracy(score: np.ndarray, gold: np.ndarray) -> float:
  """The share of within-prompt pairs with unequal gold that the score orders as gold does; equal
  scores count half.   f64[P, K] each.
  """
  i, j = np.triu_indices(gold.shape[1], 1)
  truth, found = np.sign(gold[:, i] - gold[:, j]), np.sign(score[:, i] - score[:, j])
  return float((0.5 + 0.5 * found * truth)[truth != 0].mean())


def grouped(stored: dict, name: str) -> np.ndarray:
  """A stored value of the scored rows, as f64[prompts, samples]."""
  return stored[f"scored/{name}"].astype(float).reshape(-1, SCORED_GROUP)


def rows_of(path: Path, seed: int, target: float, taus: dict[str, float]) -> list[dict]:
  """All rows of one seed at one target: the accuracies, and facts about the samples.

  Args:
    taus: features -> width of the prior.
  """
  stored, keys = load_arrays(path), dict(seed=seed, kl=target)
  blank = keys | dict(features="", evidence="")
  rows = [blank | dict(measure=name, value=float(x)) for name, x in facts(stored).items()]
  level = pair_accuracy(grouped(stored, "frozen"), grouped(stored, "gold"))
  rows.append(blank | dict(features="frozen", measure="accuracy", value=level))
  rows += accuracies(stored, keys, taus, EVIDENCE, "accuracy")
  if target == DECIDES:
    rows += extra_rows(stored, keys, taus)
  return rows


def extra_rows(stored: dict, keys: dict, taus: dict[str, float]) -> list[dict]:
  """The accuracies that were added after the registered ones were seen."""
  wide = dict.fromkeys(taus, WIDE)
  return accuracies(stored, keys, taus, EXTRA, "accuracy") + accuracies(
    stored, keys, wide, EVIDENCE | EXTRA, WIDE_MEASURE
  )


def accuracies(stored: dict, keys: dict, taus, sorts: dict, measure: str) -> list[dict]:
  """A row for each set of features and each sort of evidence; `keys` are its seed and target."""
  gold, rows = grouped(stored, "gold"), []
  for features in FEATURES:
    s, start = sets_of(stored, features, keys["seed"], keys["kl"]), None
    for name, parts in sorts.items():
      given = joined([part(s) for part in parts])
      found = fit_head(given, s.prior_mean, taus[features], start)
      start = found.mean if start is None else start  # the others start where the first ends
      value = pair_accuracy((s.x["scored"] @ found.mean).reshape(gold.shape), gold)
      rows.append(keys | dict(features=features, evidence=name, measure=measure, value=value))
  return rows


def facts(stored: dict) -> dict[str, float]:
  """Facts about a seed at a target."""
  ratio = relative_ratio(stored["old/log_ratio"].astype(float))
  weight, exponent = tempered_weights(ratio[0::2] + ratio[1::2], ESS)
  right = stored["fresh/gold"][0::2] - stored["fresh_other/gold"]
  gold = grouped(stored, "gold")
  return {
    "step": stored["step"],
    "kl_step": stored["kl"],
    "kl_samples": stored["scored/log_ratio"].mean(),
    "gold": gold.mean(),
    "frozen": stored["scored/frozen"].mean(),
    "coverage": stored["scored/coverage"].mean(),
    "length": stored["scored/length"].mean(),
    "exponent": exponent,
    "ess": effective_size(weight) / len(weight),
    "contrast_right": (0.5 + 0.5 * np.sign(right)).mean(),
    "ties": (gold[:, 0] == gold[:, 1]).mean(),
  }


# ---- the width of the prior, on seeds that are in no table ----


def held_out_accuracies(paths: dict[int, Path]) -> dict[str, dict[float, float]]:
  """features -> tau -> accuracy on held-out pairs with the labeller's noise, mean over the seeds;
  heads are fitted to the old pairs. No gold."""
  found = {features: {tau: [] for tau in TAUS} for features in FEATURES}
  for seed, path in paths.items():
    stored = load_arrays(path)
    for features in FEATURES:
      s = sets_of(stored, features, seed, 0.0)
      for tau in TAUS:
        head = fit_head(old(s), s.prior_mean, tau).mean
        gap = ordered(s.x["held_out"], stored["held_out/a_wins"]) @ head
        found[features][tau].append(np.where(gap == 0, 0.5, gap > 0).mean())
  return {name: {tau: float(np.mean(x)) for tau, x in of.items()} for name, of in found.items()}


def chosen_taus(accuracies: dict[str, dict[float, float]]) -> dict[str, float]:
  """The width with the highest held-out accuracy; on a tie the smallest."""
  return {name: max(of, key=lambda tau: (of[tau], -tau)) for name, of in accuracies.items()}


# ---- the table ----

Columns = dict[str, np.ndarray]


def by_seed(
  columns: Columns, kl: float, features: str, evidence: str, measure: str = "accuracy"
) -> dict[int, float]:
  """{seed: accuracy} of one cell, (features, evidence) or (features, evidence, measure)."""
  mine = (
    (columns["kl"] == kl)
    & (columns["features"] == features)
    & (columns["evidence"] == evidence)
    & (columns["measure"] == measure)
  )
  return dict(zip(columns["seed"][mine].tolist(), columns["value"][mine].tolist()))


def difference(columns: Columns, kl: float, cell: tuple, other: tuple) -> intervals.Interval:
  """The paired difference in accuracy of two (features, evidence), over the seeds."""
  first, second = by_seed(columns, kl, *cell), by_seed(columns, kl, *other)
  seeds = sorted(first.keys() & second.keys())
  return intervals.paired([first[s] for s in seeds], [second[s] for s in seeds])


def shown(found: intervals.Interval) -> str:
  """In points: +1.2 [0.3, 2.1]."""
  return f"{100 * found.value:+.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def passes(found: intervals.Interval) -> bool:
  """The registered rule: a mean of at least one point, and an interval above zero."""
  return bool(found.value >= POINT and found.low > 0)

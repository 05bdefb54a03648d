"""The laboratory at its smallest size: replicas against single runs, a killed grid against an
uninterrupted one, and its output.
"""

import csv
import shutil

import jax
import numpy as np
import pytest
import small
from flax import nnx

from configs import lab as lab_config
from configs import quickstart
from r2m_jax.algorithm.annotate import make_reward
from r2m_jax.algorithm.variants import VARIANTS, States
from r2m_jax.config import ConfigError, arms_of, check_config
from r2m_jax.goldtask import rl
from r2m_jax.lab import grid, together
from r2m_jax.lab.table import curves_of, read_table
from r2m_jax.models.reward import read_rte
from r2m_jax.report.intervals import interval
from r2m_jax.run.metrics import read_metrics
from r2m_jax.tasks import gold as gold_task
from r2m_jax.types import Sequences

LABELS = "r2m.labels r2m.labels=preference r2m.label_budget=0.2"
# tolerance for rounding; sums over 32 rows of numbers near 1
CLOSE = dict(rtol=2e-3, atol=2e-4)


def settings(**overrides):
  cfg = quickstart.get_config("test")
  cfg.task = "lab"
  cfg.lab.arms, cfg.lab.seeds, cfg.lab.kls, cfg.lab.stops = (
    ("vanilla", LABELS),
    (0, 1),
    (0.001,),
    (0.001,),
  )
  cfg.lab.together, cfg.sft.steps, cfg.reward.pairs = 2, 10, 64
  cfg.policy.lr, cfg.r2m.lr = 3e-3, 1e-2  # large enough to change the policy in four steps
  for name, value in overrides.items():
    cfg.update_from_flattened_dict({name.replace("__", "."): value})
  return cfg


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """(workdir, {(arm, step): sequences of both seeds}) of an uninterrupted grid, and its output."""
  workdir, seen, original = tmp_path_factory.mktemp("lab"), [], grid.gold_metrics
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      grid, "gold_metrics", lambda out, *of: seen.append(out.sequences) or original(out, *of)
    )
    grid.run(settings(), workdir)
  return workdir, seen


def columns(workdir, arm):
  return read_table(workdir / "table" / f"{arm}.parquet")[0]


@pytest.mark.parametrize("name", ["r2m.labels", pytest.param("vanilla", marks=pytest.mark.long)])
def test_a_replica_is_the_run_of_its_seed(ended, tmp_path, monkeypatch, name):
  """A run of only seed 1, with all its stages, by tasks.gold.run: the same tokens at every step,
  and metrics within rounding.
  """
  workdir, seen = ended
  cfg = settings(task="r2m", seed=1, variant=name.split(".")[0])
  if name == "r2m.labels":
    cfg.r2m.labels, cfg.r2m.label_budget = "preference", 0.2
  alone, original = [], rl.gold_metrics
  monkeypatch.setattr(
    gold_task, "gold_metrics", lambda out, *of: alone.append(out.sequences) or original(out, *of)
  )
  gold_task.run(cfg, tmp_path)
  first = (
    0 if name == "vanilla" else 2 * cfg.steps
  )  # of the arm in the recording of the grid: two seeds a step
  assert len(alone) == cfg.steps and len(seen) == 4 * cfg.steps
  for one, replica in zip(alone, seen[first + 1 :: 2]):
    np.testing.assert_array_equal(one.tokens, replica.tokens)
  mine = curves_of(columns(workdir, name))[1.0].metrics
  for row in (row for row in read_metrics(tmp_path) if row["stage"] == "rl"):
    for metric in (
      "reward/gold",
      "reward/used",
      "reward/frozen",
      "kl",
      "length",
      "entropy",
      "policy/grad_norm",
    ):
      np.testing.assert_allclose(mine[metric][1, row["step"]], row[metric], **CLOSE, err_msg=metric)
  assert np.abs(np.diff(mine["reward/gold"], axis=0)).min() > 1e-3  # seeds differ
  assert mine["kl"][:, -1].min() > 1e-2  # and both have changed


def test_certified_advantages_in_the_laboratory_and_alone(ended, tmp_path):
  """The laboratory's arm against the run of one seed; both compute the certificate of the proxy from
  its own pairs, and keep it.
  """
  certify = dict(algorithm="grpo", certify__share=0.4, steps=2)
  arm = "vanilla.certified algorithm=grpo certify.share=0.4"
  together, alone = tmp_path / "lab", tmp_path / "alone"
  shutil.copytree(ended[0] / "stages", together / "stages")
  grid.run(settings(lab__arms=(arm,), steps=2), together)
  gold_task.run(settings(task="r2m", seed=1, variant="vanilla", **certify), alone)
  mine = curves_of(columns(together, "vanilla.certified"))[1.0].metrics
  rows = [row for row in read_metrics(alone) if row["stage"] == "rl"]
  assert len(rows) == 2
  for row in rows:
    for metric in ("reward/gold", "kl", "policy/grad_norm", "certify/kept", "certify/zero"):
      np.testing.assert_allclose(mine[metric][1, row["step"]], row[metric], **CLOSE, err_msg=metric)
    assert 0.4 <= row["certify/zero"] < 0.5 and 0 < row["certify/kept"] < 0.6
  stages = [path.name for path in (alone / "stages").iterdir()]
  assert "certificate" in stages
  found = [path.name for path in (together / "stages").iterdir() if "certificate" in path.name]
  assert len(found) == 1


def test_killed_and_started_again_it_gives_the_same_table(ended, tmp_path, monkeypatch):
  """Killed in the second arm at step 3 of 4, with a checkpoint at 2. Finished work is read, and
  nothing runs twice.
  """
  workdir, _ = ended
  shutil.copytree(workdir / "stages", tmp_path / "stages")
  for name in ("best_of_n.parquet", "config.json"):
    shutil.copyfile(workdir / name, tmp_path / name)
  small.interrupt(monkeypatch, grid, 15, lambda: grid.run(settings(), tmp_path))
  assert [path.name for path in (tmp_path / "table").iterdir()] == ["vanilla.parquet"]
  steps, original = [], grid.gold_metrics
  monkeypatch.setattr(grid, "gold_metrics", lambda out, *of: steps.append(1) or original(out, *of))
  grid.run(settings(), tmp_path)
  assert len(steps) == 2 * 2  # two steps of two seeds, only of the second arm
  for arm in ("vanilla", "r2m.labels"):
    assert (tmp_path / "table" / f"{arm}.parquet").read_bytes() == (
      workdir / "table" / f"{arm}.parquet"
    ).read_bytes()
  assert not list((tmp_path / "partial").iterdir())
  monkeypatch.setattr(grid, "starts_of", None)  # nothing is left to do: a start would fail
  grid.run(settings(), tmp_path)


def test_what_it_leaves(ended):
  workdir, _ = ended
  with open(workdir / "summary.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  found = {(row["arm"], row["measure"], row["against"]): row for row in rows}
  curves = {arm: curves_of(columns(workdir, arm))[1.0].metrics for arm in ("vanilla", "r2m.labels")}
  last = {
    arm: metrics["reward/gold"][:, -1] for arm, metrics in curves.items()
  }  # windows of one of four steps
  for arm, gold in last.items():
    assert float(found[arm, "final", ""]["value"]) == pytest.approx(gold.mean(), rel=1e-4)
    assert float(found[arm, "peak", ""]["value"]) == pytest.approx(
      curves[arm]["reward/gold"].max(1).mean(), rel=1e-4
    )
  difference = found["r2m.labels", "final", "vanilla"]
  gap = last["r2m.labels"] - last["vanilla"]
  assert (
    float(difference["value"]) == pytest.approx(gap.mean(), abs=1e-5) and difference["seeds"] == "2"
  )
  half = 12.7062 * gap.std(ddof=1) / np.sqrt(2)  # Student's interval of two seeds
  assert float(difference["low"]) == pytest.approx(gap.mean() - half, rel=1e-4, abs=1e-5)
  same_weight = "vanilla at 0.02"  # the KL that both reach
  assert found["r2m.labels", "final", same_weight] == difference | {"against": same_weight}
  assert {"stop_step", "final"} <= {row["measure"] for row in rows if "stopped" in row["arm"]}
  assert float(found["best_of_n", "proxy_n_32", ""]["value"]) > float(
    found["best_of_n", "proxy_n_1", ""]["value"]
  )
  kept, _ = read_table(workdir / "seeds.parquet")  # the rows can be computed from it again
  for arm in ("vanilla", "r2m.labels", "vanilla.stopped_at_kl_0.001"):
    mine = kept["arm"] == arm
    assert kept["seed"][mine].tolist() == [0, 1]
    for measure in ("final", "kl_final"):
      again, row = interval(kept[measure][mine]), found[arm, measure, ""]
      assert [f"{x:.5g}" for x in again[:3]] == [row["value"], row["low"], row["high"]]
  assert "r2m/omega" in curves["r2m.labels"] and "r2m/omega" not in curves["vanilla"]
  drift = curves["r2m.labels"]["drift/fixed_states"]
  np.testing.assert_array_equal(
    np.isfinite(drift), [[True, False, True, False]] * 2
  )  # every second step
  page = (workdir / "report.html").read_text(encoding="utf-8")
  assert page.count("data:image/png;base64") == 5 and "Turn-over" in page
  assert len(list((workdir / "figures").glob("*.png"))) == 5
  assert "vanilla: over-optimised on" in (workdir / "seeds.txt").read_text()


def test_other_settings_under_the_same_name_are_refused(ended):
  with pytest.raises(
    ConfigError, match=r"'r2m.labels' with other settings; .* such as r2m.labels.new"
  ):
    grid.run(settings(lab__arms=("vanilla", LABELS + " kl.beta=0.5")), ended[0])


def test_more_seeds_and_weights_run_what_is_missing(ended):
  workdir, _ = ended
  arm = arms_of(settings())["vanilla"]
  wanted = [(seed, factor) for factor in (1.0, 2.0) for seed in (0, 1, 2)]
  assert grid.missing_of(workdir, "vanilla", arm, wanted) == [
    (2, 1.0),
    (0, 2.0),
    (1, 2.0),
    (2, 2.0),
  ]


@pytest.mark.parametrize(
  "arms, message",
  [
    (("other",), "must start with a variant"),
    (("vanilla", "vanilla kl.beta=0.1"), "has a name that another arm has"),
    (("vanilla.x kl.bta=0.1",), r"did you mean config.kl.beta\?"),
    (("vanilla.x kl.beta",), "give FIELD=VALUE"),
    (("vanilla.x seed=3",), "of a field that affects the result"),
    (("vanilla.x log.samples=3",), "of a field that affects the result"),
    (("vanilla.x kl.beta=much",), "'kl.beta=much'"),
    (("r2m.x kl.controller=adaptiv",), r"r2m.x: config.kl.controller is 'adaptiv'"),
    (("vanilla.x kl.placement=reward",), "must be 'exact'"),
    (("vanilla.x r2m.labels=preference",), "never updates the reward"),
  ],
)
def test_arms_that_cannot_run_are_refused(arms, message):
  with pytest.raises(ConfigError, match=message):
    check_config(settings(lab__arms=arms))


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("lab.seeds", (), r"such as \(0, 1, 2\)"),
    ("lab.seeds", ("x",), r"such as \(0, 1, 2\)"),
    ("lab.seeds", (1, 1), "give each seed once"),
    ("lab.betas", (), "above 0"),
    ("lab.kls", (0.0,), "above 0"),
    ("lab.kls", (), "above 0"),
    ("lab.probe_every", 0, "at least 1"),
    ("mesh", (2, 1, 1), "splits seeds over the devices"),
  ],
)
def test_settings_that_cannot_work_are_refused(field, value, message):
  with pytest.raises(ConfigError, match=rf"config\.{field} is .*{message}"):
    check_config(settings(**{field.replace(".", "__"): value}))


@pytest.mark.parametrize("size", ["", "sweep", "tune", "test"])
def test_the_laboratorys_configs_can_run(size):
  cfg = lab_config.get_config(size)
  check_config(cfg)
  arms = arms_of(cfg)
  if size == "":
    assert set(VARIANTS) <= set(arms) and len(cfg.lab.seeds) >= 10
    assert {"r2m.whitened", "scaled.grpo", "vanilla.hold", "iterative_head.eight_percent"} <= set(
      arms
    )
  if size == "tune":
    assert not set(cfg.lab.seeds) & set(lab_config.get_config().lab.seeds)
    per_arm = [sum(name.split(".")[0] == arm for name in arms) for arm in lab_config.VARIANTS]
    assert set(per_arm) == {4}  # the same budget for every arm


def test_what_was_chosen_reaches_all_arms_of_a_variant(monkeypatch):
  monkeypatch.setattr(lab_config, "CHOSEN", {"r2m": "r2m.lr=3e-4 kl.beta=0.04"})
  arms = arms_of(lab_config.get_config())
  assert (
    arms["r2m"].r2m.lr == arms["r2m.eight_percent"].r2m.lr == 3e-4 and arms["noise"].r2m.lr == 1e-4
  )
  assert (arms["r2m"].kl.beta, arms["r2m.grpo"].kl.beta, arms["vanilla"].kl.beta) == (
    0.04,
    0.06,
    0.02,
  )


def test_an_arm_that_another_process_is_at_is_left_to_it(ended, tmp_path, monkeypatch, capsys):
  """Another process has the lock of an arm while the others run here. It then dies, and the arm is
  run here.
  """
  for name in ("stages", "table"):
    shutil.copytree(ended[0] / name, tmp_path / name)
  shutil.copyfile(ended[0] / "best_of_n.parquet", tmp_path / "best_of_n.parquet")
  (tmp_path / "table" / "vanilla.parquet").unlink()
  held, ran = grid.alone(tmp_path, "arm-vanilla"), []
  held.__enter__()
  alone = grid.alone

  def released(workdir, what, *, wait=True):  # when the other process dies, this one begins to wait
    if what == "arm-vanilla" and wait:
      held.__exit__(None, None, None)
    return alone(workdir, what, wait=wait)

  def run_arm(name, config, replicas, workdir):
    ran.append((name, len(replicas)))
    return read_table(ended[0] / "table" / f"{name}.parquet")[0]

  monkeypatch.setattr(grid, "alone", released)
  monkeypatch.setattr(grid, "run_arm", run_arm)
  grid.run(settings(), tmp_path)
  assert ran == [("vanilla", 2)]
  printed = capsys.readouterr().out
  assert "another process works on it" in printed and "done before" in printed
  assert columns(tmp_path, "vanilla")["seed"].size == 2 * settings().steps
  with alone(tmp_path, "x") as mine, alone(tmp_path, "x", wait=False) as again:
    assert mine and not again


def test_seeds_share_out_over_the_devices():
  assert [together.seeds_mesh(n).size for n in (1, 2, 6, 7, 8, 9, 10, 11)] == [
    1,
    2,
    6,
    7,
    8,
    3,
    5,
    1,
  ]


def test_drift_against_single_scores():
  """The probe of two replicas against direct calls of the head, on responses of random tokens."""
  cfg, rng = small.config(variant="r2m"), np.random.default_rng(0)
  built, state = small.start(cfg)
  state = state.replace(step=jax.numpy.int32(3))  # the last of 4 steps: omega is at its floor
  policy = jax.tree.map(lambda x: x.sharding, state.policy)
  states = [
    state.replace(policy=jax.device_put(small.perturb(state.policy, seed, 0.3), policy))
    for seed in (5, 6)
  ]
  mesh = together.seeds_mesh(2)
  stacked = together.spread(together.stack(states), mesh)
  tokens = rng.integers(0, 64, (2, 3, 20)).astype(np.int32)
  mask = np.arange(20) < rng.integers(14, 21, (2, 3, 1))
  fixed = Sequences(
    tokens=tokens, token_mask=mask, response_mask=mask[..., 12:], has_eos=np.ones((2, 3), bool)
  )
  _, probe = grid.make_probe(cfg, built, mesh)
  found = jax.device_get(probe(stacked, stacked.reward_head, fixed, fixed))
  score = make_reward(built.defs, cfg).score
  for i, one in enumerate(states):
    rte = read_rte(nnx.merge(built.defs.reward_backbone, one.reward_backbone), tokens[i], mask[i])

    def open_policy(weights):
      return nnx.merge(built.defs.policy, weights)(tokens[i], mask[i], feedback_layer=-1)

    def of(weights):
      return States(open_policy(weights).feedback, mask[i])

    now, before = (
      score(one.reward_head, rte, of(w), cfg.r2m.omega_min)[:, 0] for w in (one.policy, one.ref)
    )
    np.testing.assert_allclose(
      found["drift/fixed_states"][i], np.mean(now - before), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
      found["drift/fixed_states_std"][i], np.std(now - before), rtol=1e-3, atol=1e-5
    )
    assert abs(np.mean(now - before)) > 1e-3
    np.testing.assert_allclose(
      found["drift/own_states"][i], np.mean(now - before), rtol=1e-3, atol=1e-5
    )
  still = together.spread(
    together.stack([state, state]), mesh
  )  # the reference itself: there is no drift
  found = jax.device_get(probe(still, still.reward_head, fixed, fixed))
  for name in ("drift/fixed_states", "drift/fixed_states_std", "drift/own_states"):
    np.testing.assert_allclose(found[name], 0, atol=1e-6)


@pytest.mark.long
def test_arms_with_starts_of_their_own(ended, tmp_path):
  """Golden pairs, a fitted head and an ensemble, with two seeds each. Parts that arms share are
  fitted once.
  """
  shutil.copytree(ended[0] / "stages", tmp_path / "stages")
  shutil.copyfile(ended[0] / "best_of_n.parquet", tmp_path / "best_of_n.parquet")
  arms = (
    "pretrained_rm",
    "warm_start",
    "vanilla.ensemble reward.ensemble=3",
    "vanilla.min reward.ensemble=3 reward.combine=min",
    "noise",
  )
  grid.run(settings(lab__arms=arms, steps=2, r2m__warm_epochs=2), tmp_path)
  made = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "stages").iterdir())
  assert made == ["reward", "reward", "reward_golden", "sft", "warm_start"]
  gold = {
    text.split()[0]: curves_of(columns(tmp_path, text.split()[0]))[1.0].metrics["reward/gold"]
    for text in arms
  }
  assert all(np.isfinite(values).all() and values.shape == (2, 2) for values in gold.values())
  for (
    name,
    values,
  ) in gold.items():  # all arms of a seed start from the same policy and draw the same samples
    np.testing.assert_array_equal(values[:, 0], gold["noise"][:, 0], err_msg=name)
  used = curves_of(columns(tmp_path, "vanilla.min"))[1.0].metrics["reward/used"]
  assert (
    used[:, 0] < curves_of(columns(tmp_path, "vanilla.ensemble"))[1.0].metrics["reward/used"][:, 0]
  ).all()

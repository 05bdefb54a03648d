"""The main job at its smallest size: its files, a second run, and errors."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import small
from frames import frames_to_the_step
from jax.sharding import NamedSharding

from configs import quickstart
from r2m_jax import main as program
from r2m_jax.config import ConfigError
from r2m_jax.goldtask import rl
from r2m_jax.goldtask import task as goldtask
from r2m_jax.parallel import sharding
from r2m_jax.run import build, checkpoint
from r2m_jax.run import workdir as workdirs
from r2m_jax.run.files import read_jsonl
from r2m_jax.run.fit import fit
from r2m_jax.run.metrics import read_metrics, without_clock
from r2m_jax.tasks import gold

ROOT = pathlib.Path(__file__).parents[2]


def main(workdir, *args):
  command = [
    sys.executable,
    "-m",
    "r2m_jax.main",
    "--config=configs/quickstart.py:test",
    f"--workdir={workdir}",
    *args,
  ]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)


def test_smallest_run_leaves_everything(smallest_run):
  workdir, result = smallest_run
  assert result.returncode == 0, result.stderr[-3000:]
  assert "max |ratio - 1|" in result.stdout and "max |log-prob deviation|" in result.stdout
  assert len(result.stdout.rsplit("step 0 ", 1)[1].splitlines()[1:]) <= 10  # the closing summary
  rows = read_metrics(workdir)
  for arm in ("vanilla", "scaled", "r2m"):
    mine = [row for row in rows if row["stage"] == "rl" and row["arm"] == arm]
    assert [row["step"] for row in mine] == [0, 1, 2, 3]
    assert all(np.isfinite(row["reward/gold"]) and np.isfinite(row["kl"]) for row in mine)
    assert list((workdir / "tensorboard").glob(f"*{arm}*/events*"))
  samples = read_jsonl(workdir / "samples.jsonl")
  assert {(row["arm"], row["when"]) for row in samples} == {
    (arm, when) for arm in ("vanilla", "scaled", "r2m") for when in ("before", "after")
  }
  page = (workdir / "report.html").read_text()
  assert "data:image/png;base64" in page and "http://" not in page.replace("http://www.w3.org", "")
  assert list((workdir / "figures").glob("*.png"))
  assert not small.unlisted(workdir)


def test_arms_start_from_the_same_samples_and_gold_is_that_of_the_samples(smallest_run):
  rows = [row for row in read_metrics(smallest_run[0]) if row["stage"] == "rl" and row["step"] == 0]
  assert (
    len({row["reward/gold"] for row in rows}) == 1
    and len({row["reward/frozen"] for row in rows}) == 1
  )


def test_responses_of_the_table_end_where_those_of_a_step_do():
  """With rollout.repetition_stop, a response ends at its first repeated token."""
  cfg = small.config(log__samples=16, rollout__temperature=0.3, rollout__repetition_stop=1)
  built, state = small.start(cfg)
  drawn, _ = jax.device_get(gold.make_sampler(cfg, built)(state, rl.shared_arm(cfg)))
  width = drawn.response_mask.shape[1]
  ends = set()
  for tokens, mask in zip(drawn.tokens[:, -width:], drawn.response_mask):
    response = tokens[mask]
    repeated = np.flatnonzero(response[1:] == response[:-1]) + 1
    ends |= {len(response) - 1 - place for place in repeated.tolist()}
  assert ends == {0}


def test_checkpoint_holds_the_whole_state(smallest_run):
  workdir, _ = smallest_run
  cfg = quickstart.get_config("test")
  cfg.variant = "r2m"
  built = build.build(cfg, sharding.make_mesh((1, 1, 1)), vocab_size=goldtask.VOCAB_SIZE)
  policy = build.init_policy(cfg, built, jax.random.key(5))
  reward = build.init_reward_model(cfg, built, policy, jax.random.key(6))
  like = build.initial_state(cfg, built, policy, reward["backbone"], reward["phi"])
  state = checkpoint.restore(checkpoint.open_checkpoints(workdir / "checkpoints" / "r2m"), like)
  assert int(state.step) == cfg.steps
  moved = [
    not np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(state.policy), jax.tree.leaves(state.ref))
  ]
  assert all(moved)  # trained; the reference is the initial policy, not a view of the trained one
  count = jax.tree.leaves(
    [x for x in jax.tree.leaves(state.policy_opt) if x.ndim == 0 and x.dtype == np.int32]
  )[0]
  assert int(count) == cfg.steps * cfg.ppo.epochs


def test_second_run_finds_all_done_and_changes_nothing(smallest_run):
  workdir, _ = smallest_run
  before = (workdir / "metrics.jsonl").read_bytes()
  result = main(workdir)
  assert result.returncode == 0, result.stderr[-3000:]
  assert "sft: done before" in result.stdout
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_workdir_is_refused(smallest_run):
  workdir, _ = smallest_run
  result = main(workdir, "--config.kl.beta=0.5")
  assert result.returncode == 2 and "config.kl.beta: 0.02 -> 0.5" in result.stderr
  assert "Traceback" not in result.stderr


def test_interrupted_run_goes_on_and_ends_where_the_unbroken_one_does(
  smallest_run, tmp_path, monkeypatch
):
  """Stopped after step 2 of 4 (with a checkpoint at 2) and resumed: every step has the same
  metrics.
  """
  cfg = quickstart.get_config("test")
  cfg.variant = "r2m"
  small.interrupt(monkeypatch, gold, 4, lambda: gold.run(cfg, tmp_path))
  gold.run(cfg, tmp_path)

  def pick(rows):
    return [without_clock(row) for row in rows if row["stage"] == "rl" and row["arm"] == "r2m"]

  resumed, unbroken = pick(read_metrics(tmp_path)), pick(read_metrics(smallest_run[0]))
  assert resumed == unbroken


def test_five_frames_lead_to_the_compiled_step(smallest_run, tmp_path, monkeypatch):
  """main.main calls main.run, then the functions counted here."""
  shutil.copytree(smallest_run[0] / "stages", tmp_path / "stages")
  cfg = quickstart.get_config("test")
  cfg.variant = "vanilla"
  found = frames_to_the_step(monkeypatch, rl, lambda: program.run(cfg, tmp_path))
  assert found == ["run", "run", "train", "step"]


def test_claim_shows_what_differs(tmp_path):
  cfg = quickstart.get_config("test")
  workdirs.claim(cfg, tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == cfg.steps
  cfg.r2m.alpha = 0.9
  (tmp_path / "metrics.jsonl").write_text("")  # it is not empty
  with pytest.raises(ConfigError, match=r"config\.r2m\.alpha: 0\.3 -> 0\.9"):
    workdirs.claim(cfg, tmp_path)


@pytest.mark.parametrize("mesh", [pytest.param((1, 1, 1), marks=pytest.mark.long), (2, 2, 2)])
def test_what_is_fitted_before_rl(tmp_path, mesh):
  """Golden pairs, a warm start and gold labels, on one device and on eight."""
  cfg = quickstart.get_config("test")
  cfg.arms, cfg.mesh, cfg.steps, cfg.log.samples = ("pretrained_rm", "warm_start"), mesh, 3, 2
  cfg.r2m.labels, cfg.r2m.label_budget, cfg.r2m.warm_epochs = "preference", 0.2, 2
  cfg.reward.pairs, cfg.sft.steps = 64, 10
  gold.run(cfg, tmp_path)
  rows = read_metrics(tmp_path)
  for arm in cfg.arms:
    mine = [row for row in rows if row["stage"] == "rl" and row["arm"] == arm]
    assert [row["step"] for row in mine] == [0, 1, 2] and all(
      np.isfinite(row["policy/loss"]) for row in mine
    )
  stages = {row["stage"] for row in rows}
  assert {"reward", "reward_golden", "warm_start"} <= stages
  built = build.build(cfg, sharding.make_mesh(mesh), vocab_size=goldtask.VOCAB_SIZE)
  key = jax.random.fold_in(jax.random.key(cfg.seed), build.KEY_HEAD)
  head = build.make_head(cfg, built.arch, built.reward_arch, key)
  fitted = checkpoint.open_checkpoints(tmp_path / "stages" / "warm_start").restore(0)
  assert not np.array_equal(head.wk.kernel[...], jax.tree.leaves(fitted["wk"])[0])
  state = {
    name: checkpoint.open_checkpoints(tmp_path / "stages" / name)
    for name in ("reward", "reward_golden")
  }
  before, after = (jax.tree.leaves(m.restore(0)) for m in state.values())
  assert not all(map(np.array_equal, before, after))


def test_a_fit_is_traced_once(tmp_path):
  """The state and the optimizer state have the same types before and after an update."""
  mesh = sharding.make_mesh((1, 1, 1))
  state = jax.device_put({"w": np.ones(3, np.float32)}, sharding.shardings({"w": np.ones(3)}, mesh))
  traces = []

  def loss(state, batch):
    traces.append(1)
    return ((state["w"] - batch["x"]) ** 2).sum(), {}

  fit(
    loss,
    state,
    optax.adam(0.1),
    [{"x": np.zeros((1, 3), np.float32)}] * 3,
    total=3,
    stage="sft",
    workdir=tmp_path,
    state_shardings=sharding.shardings(state, mesh),
    batch_sharding=NamedSharding(mesh, sharding.BATCH),
  )
  assert len(traces) == 1


def test_a_further_seed_is_a_run_of_its_own(tmp_path):
  """Two seeds in one process: the rows of the second equal those of a run with only this seed."""
  cfg = quickstart.get_config("test")
  cfg.variant, cfg.steps = "vanilla", 2
  alone = cfg.copy_and_resolve_references()
  alone.seed = 1
  gold.run(alone, tmp_path / "alone")
  cfg.seeds = 2
  gold.run(cfg, tmp_path / "both")
  further = tmp_path / "both/seeds/1"
  want, got = (
    [without_clock(row) for row in read_metrics(folder)] for folder in (tmp_path / "alone", further)
  )
  assert got == want and (further / "report.html").exists()
  assert [row["step"] for row in read_metrics(tmp_path / "both") if row["stage"] == "rl"] == [0, 1]
  assert "seeds 0 to 1" in (tmp_path / "both/report.html").read_text()
  assert not small.unlisted(tmp_path / "both")

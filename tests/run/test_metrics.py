"""The metrics of runs: every key is documented, costs are counted correctly, and trackers never
stop a run.
"""

import json
import sys
import types
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small
from test_resume import counting, run_loop, settings

from r2m_jax import knobs
from r2m_jax.algorithm.optim import make_optimizer
from r2m_jax.config import ConfigError, check_config
from r2m_jax.goldtask.rl import rl_prompts
from r2m_jax.parallel import chips
from r2m_jax.run import loop, metrics, speed, trackers
from r2m_jax.run import run as run_module
from r2m_jax.step import StepOutput
from r2m_jax.types import Sequences

# ---- docs/metrics.md ----


def logged_by_steps():
  """The metric keys of several algorithms, without running their steps."""
  names = set()
  for changes in ({}, {"algorithm": "ppo"}):
    cfg = small.config(**changes)
    built, state = small.start(cfg)
    step = small.step_of(cfg, built, state)
    names |= set(jax.eval_shape(step, state, rl_prompts(cfg, 0))[1].metrics)
    names |= {f"lr/{name}" for name in speed.Cost(cfg, state).rates}
  return names


def test_every_logged_key_is_documented_and_every_documented_key_is_logged(smallest_run):
  rows = metrics.read_metrics(smallest_run[0])
  run = {name for row in rows for name in row} - set(metrics.ROW_KEYS)
  assert {"lr/policy", "lr/reward", "seconds/save", "real/rollout", "memory/process_peak"} <= run
  assert run <= small.documented_metrics().keys()
  # those of runs from folders (tests/tasks/test_folders.py), of an accelerator, and of a known peak
  elsewhere = {"seconds/rollout", "seconds/render", "learn/computed"}
  elsewhere |= {"memory/device_peak", "speed/mfu"}
  elsewhere |= {"certify/zero", "certify/kept"}  # of certify.share (tests/lab/test_contrasts.py)
  elsewhere |= {"r2m/trusted"}  # of r2m.label_confidence (tests/algorithm/test_losses.py)
  # of the notes task (tests/lab/test_lab_notes.py)
  parts = ("distractors", "repeats", "outside", "extra", "marks", "ended")
  elsewhere |= {f"gold/{part}" for part in parts}
  assert small.documented_metrics().keys() == run | logged_by_steps() | elsewhere


def test_the_page_marks_what_depends_on_the_clock():
  for name, marked in small.documented_metrics().items():
    assert marked == (name not in metrics.without_clock({name: 0})), name


# ---- the cost of a step ----


def sequences():
  """Three rows: two prompts of 2 and 3 tokens in 3 columns, responses of 4, 1 and 2 in 5."""
  prompts, lengths = (2, 3, 3), (4, 1, 2)
  mask = np.zeros((3, 8), bool)
  for i, (p, n) in enumerate(zip(prompts, lengths)):
    mask[i, 3 - p : 3 + n] = True
  return Sequences(mask.astype(np.int32), mask, mask[:, 3:], np.ones(3, bool))


def test_shares_of_real_positions_are_counted():
  rollout = SimpleNamespace(group_size=1, halvings=0)

  def shares(sequences, **metrics):
    return speed.shares_real(rollout, SimpleNamespace(sequences=sequences, metrics=metrics))

  got = shares(sequences())
  assert got == {"real/rollout": pytest.approx(7 / 12), "real/learn": pytest.approx(15 / 24)}
  packed = shares(sequences(), **{"learn/computed": 0.75})
  assert packed["real/learn"] == pytest.approx(15 / 18)
  empty = sequences().replace(response_mask=np.zeros((3, 5), bool))
  assert shares(empty)["real/rollout"] == 0.0
  assert speed.count_tokens(sequences()) == (15, 7)


def test_model_flops_of_a_step_are_those_of_its_shapes():
  """Counted by hand from the architecture, one matrix product at a time."""
  cfg = small.config(algorithm="ppo", critic__init="policy", log__peak_flops=1e9)
  _, state = small.start(cfg)
  D, H, V, layers = 32, 64, 64, 2  # 4 heads of width 8, 2 key heads
  layer = D * 32 + 2 * D * 16 + 32 * D + 3 * D * H
  tokens, sampled, K, epochs = 100, 40, cfg.rollout.group_size, cfg.ppo.epochs
  forward = 2 * (layers * layer * tokens + V * D * sampled)
  rollout = 2 * (layers * layer * (60 / K + 40) + V * D * sampled)
  unheaded = 2 * layers * layer * tokens  # of reward model and critic
  want = rollout + 2 * forward + 3 * epochs * forward + unheaded * (1 + 1 + 3 * epochs)
  cost = speed.Cost(cfg, state)
  assert cost.flops(tokens, sampled) == pytest.approx(want)
  out = StepOutput(metrics={}, sequences=sequences(), judged=None)
  found = cost(state, out, {"seconds/step": 2.0})
  assert found["speed/mfu"] == pytest.approx(cost.flops(15, 7) / 2 / 1e9)
  assert (found["speed/tokens"], found["speed/generated_tokens"]) == (7.5, 3.5)


def test_the_logged_learning_rate_is_what_the_optimizer_takes():
  """Plain SGD changes a parameter with gradient 1 by exactly the learning rate."""
  cfg = small.config().sft
  cfg.update(
    {
      "optimizer": "sgd",
      "lr": 0.5,
      "lr_schedule": "cosine",
      "warmup_steps": 2,
      "max_grad_norm": 0.0,
    }
  )
  tx, table = make_optimizer(cfg, 6), speed.rate_table(cfg, 6)
  params = {"w": np.float32(0)}
  opt = tx.init(params)
  for _ in range(6):
    updates, opt = tx.update({"w": np.float32(1)}, opt, params)
    assert speed.last_rate(table, opt) == pytest.approx(-float(updates["w"]), rel=1e-6)
  assert speed.last_rate(table, tx.init(params)) == 0.0  # warm-up, no update yet


@pytest.mark.parametrize(
  "kind, name",
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5p", "v5p"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("cpu", ""),
    ("TPU7x", ""),
    ("NVIDIA L4", ""),
  ],
)
def test_peaks_are_of_the_devices_that_jax_names(kind, name):
  peaks = {chip.name: chip.flops for chip in (*chips.TPUS, *chips.GPUS)}
  assert chips.peak_flops(kind) == peaks.get(name, 0.0)


def test_phases_add_up_and_a_row_takes_them():
  speed.take_seconds()
  for _ in range(2):
    with speed.phase("data"):
      pass
  with pytest.raises(KeyError), speed.phase("learn"):
    raise KeyError
  assert speed.take_seconds().keys() == {"seconds/data", "seconds/learn"}
  assert speed.take_seconds() == {}


def test_a_window_of_steps_is_profiled(tmp_path):
  ran = []
  config = settings(log__profile=(2, 2), log__to=())
  run_loop(tmp_path, config, counting(lambda t: ran.append((t, bool(traces(tmp_path))))))
  assert ran == [(t, t >= 4) for t in range(6)]  # written when the window has ended
  assert len(traces(tmp_path)) == 1


def traces(workdir):
  return list((workdir / run_module.PROFILE).rglob("*.xplane.pb"))


@pytest.mark.parametrize("window", [(1,), (-1, 2), (0, 0), (1.5, 2), (1, 2, 3)])
def test_a_window_that_cannot_be_is_refused(window):
  with pytest.raises(ConfigError, match=r"config.log.profile is .*give the first step"):
    config = settings()
    config.log.profile = window
    check_config(config)


# ---- trackers ----


class Fake:
  """Replaces a tracker's library: records every call of its functions, at any depth."""

  def __init__(self, calls, name=""):
    self.calls, self.name = calls, name

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return Fake(self.calls, f"{self.name}.{name}" if self.name else name)

  def __call__(self, *args, **kwargs):
    self.calls.append((self.name, args, kwargs))
    return Fake(self.calls, "run")


@pytest.fixture
def fakes(monkeypatch):
  """name -> calls of the three libraries, which need not be installed."""
  calls = {name: [] for name in ("wandb", "trackio", "mlflow")}
  for name, made in calls.items():
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    module.__getattr__ = Fake(made).__getattr__
    monkeypatch.setitem(sys.modules, name, module)
  entities = types.ModuleType("mlflow.entities")
  entities.Metric = lambda *args: args
  monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
  created = Fake(calls["mlflow"], "run")
  created.info = types.SimpleNamespace(run_id="id-of-mlflow")
  monkeypatch.setattr(trackers.Mlflow, "create", lambda self, run: created.info.run_id)
  return calls


def track(workdir, names, *starts, stage="rl"):
  """Logs three steps from each start, with the trackers `names`."""
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(json.dumps({"seed": 7, "log": {"to": names}}))
  for start in starts:
    with metrics.Metrics(workdir, stage, "r2m", from_step=start) as log:
      for step in range(start, start + 3):
        log.log(step, {"kl": 0.5 * step})


def only(calls, name):
  return [call for call in calls if call[0] == name]


def test_the_names_of_trackers_agree():
  assert knobs.TRACKERS == tuple(trackers.TRACKERS)


def test_trackers_get_every_scalar_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, fakes):
  run = tmp_path / "mine"
  track(run, ["wandb", "trackio", "mlflow"], 0, 3)
  assert not (run / "tensorboard").exists()
  first, again = (call[2] for call in only(fakes["wandb"], "init"))
  assert first["id"] == again["id"] and first["resume"] == "allow"
  assert (first["name"], first["group"]) == ("mine/rl-r2m", "mine") and first["config"]["seed"] == 7
  first, again = (call[2] for call in only(fakes["trackio"], "init"))
  assert first["name"] == again["name"] and first["name"].startswith("mine/rl-r2m-")
  for name in ("wandb", "trackio"):
    logged = [(args[0], kwargs["step"]) for _, args, kwargs in only(fakes[name], "run.log")]
    assert logged == [({"kl": 0.5 * step}, step) for step in range(6)]
    assert len(only(fakes[name], "run.finish")) == 2
  batches = only(fakes["mlflow"], "run.log_batch")
  assert {args[0] for _, args, _ in batches} == {"id-of-mlflow"}
  assert [(m[0], m[1], m[3]) for _, _, kw in batches for m in kw["metrics"]] == [
    ("kl", 0.5 * step, step) for step in range(6)
  ]
  other = track(run, ["wandb"], 0, stage="sft")
  assert other is None and len({call[2]["id"] for call in only(fakes["wandb"], "init")}) == 2


def test_how_a_run_ended_reaches_the_trackers(tmp_path, fakes):
  ends = (None, KeyError("x"), loop.Interrupted("SIGTERM"))
  for error in ends:
    (tmp_path / "config.json").write_text(json.dumps({"log": {"to": ["mlflow"]}}))
    try:
      with metrics.Metrics(tmp_path, "rl", from_step=0):
        if error is not None:
          raise error
    except (KeyError, loop.Interrupted):
      pass
  ended = [kwargs["status"] for _, _, kwargs in only(fakes["mlflow"], "run.set_terminated")]
  assert ended == ["FINISHED", "FAILED", "KILLED"]


@pytest.mark.parametrize("when", ["init", "run.log", "run.finish"])
def test_a_failing_tracker_warns_once_without_secrets_and_training_goes_on(
  tmp_path, fakes, monkeypatch, when
):
  monkeypatch.setenv("SOME_TOKEN", "abcdefghijklmnop")
  original = Fake.__call__

  def call(self, *args, **kwargs):
    if self.name == when and self.calls is fakes["wandb"]:
      raise RuntimeError("no network for abcdefghijklmnop")
    return original(self, *args, **kwargs)

  monkeypatch.setattr(Fake, "__call__", call)
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    track(tmp_path, ["wandb", "trackio"], 0)
  (message,) = [str(one.message) for one in told]
  assert message.startswith("wandb is off for rl r2m: RuntimeError('no network for (hidden)')")
  assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [0, 1, 2]
  assert len(only(fakes["trackio"], "run.log")) == 3


def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "trackio", None)
  config = settings(log__to=("tensorboard", "trackio"))
  with pytest.raises(ConfigError, match="config.log.to is .*trackio is not installed: pip install"):
    check_config(config)
  config.log.to = ("tensorboard", "clearml")
  with pytest.raises(ConfigError, match="choose from tensorboard, wandb, trackio, mlflow, each"):
    check_config(config)

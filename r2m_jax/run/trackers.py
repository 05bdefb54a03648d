"""Trackers that also get the scalars of metrics.jsonl: TensorBoard, Weights & Biases, Trackio,
MLflow.

Each stage of each arm is a separate run in a tracker. A library is imported when its tracker
starts. `metrics.Metrics` reports a tracker's first error once; errors never stop training.
"""

import json
import os
import time
import uuid
from pathlib import Path
from typing import NamedTuple, Protocol

from r2m_jax.run.files import read_json, write_atomic

IDS = "trackers.json"  # in a workdir: tracker -> stage -> its run there
PROJECT = "r2m_jax"


class Tracked(NamedTuple):
  """One stage of one arm, as passed to a tracker."""

  stage: str  # such as "sft" or, with an arm, "rl-r2m"
  workdir: Path
  config: dict  # of config.json
  from_step: int  # the first step that this start logs

  @property
  def name(self) -> str:
    return f"{self.group}/{self.stage}"

  @property
  def group(self) -> str:
    return self.workdir.absolute().name


class Tracker(Protocol):
  def start(self, run: Tracked) -> None:
    """Starts a run, or continues the earlier run of this workdir and stage."""

  def log(self, step: int, scalars: dict[str, float]) -> None:
    """Writes the scalars of a step."""

  def finish(self, status: str) -> None:
    """Ends the run. status: "finished", "stopped" by a signal, or "failed"."""


def wanted(workdir: Path) -> tuple[dict, tuple[str, ...]]:
  """The config of a workdir, and the names in its `log.to`; TensorBoard if there is no config."""
  path = workdir / "config.json"
  config = read_json(path) if path.exists() else {}
  return config, tuple(config.get("log", {}).get("to", ("tensorboard",)))


def kept(run: Tracked, tracker: str, make) -> str:
  """The first result of `make()` for this workdir, tracker and stage."""
  path = run.workdir / IDS
  ids = read_json(path) if path.exists() else {}
  mine = ids.setdefault(tracker, {})
  if run.stage not in mine:
    mine[run.stage] = make()
    write_atomic(path, json.dumps(ids, indent=2))
  return mine[run.stage]


def new_id() -> str:
  return uuid.uuid4().hex[:8]


class TensorBoard:
  """Event files in WORKDIR/tensorboard/STAGE."""

  def start(self, run: Tracked) -> None:
    # The synchronous writer: SummaryWriter's thread dies on a full disk, and its full queue then
    # blocks the caller.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder = run.workdir / "tensorboard" / run.stage
    folder.mkdir(parents=True, exist_ok=True)
    self.events = EventsWriter(str(folder / "events"), filename_suffix=f".{run.from_step}")
    # A session start makes TensorBoard drop earlier data at or after this step.
    begin = SessionLog(status=SessionLog.START)
    self.events.write_event(Event(step=run.from_step, wall_time=time.time(), session_log=begin))
    self.events.flush()

  def log(self, step: int, scalars: dict[str, float]) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(
      value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    )
    self.events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
    self.events.flush()

  def finish(self, status: str) -> None:
    self.events.close()


class Wandb:
  """A run of Weights & Biases; its files are in WORKDIR/wandb.

  WANDB_MODE=offline needs no network, WANDB_PROJECT names the project. wandb itself ignores steps
  that the run already has.
  """

  def start(self, run: Tracked) -> None:
    import wandb

    # the output of a run may contain anything; it belongs into log.txt, without secrets
    settings = wandb.Settings(console="off", login_timeout=30)
    self.run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", PROJECT),
      name=run.name,
      group=run.group,
      id=kept(run, "wandb", new_id),
      resume="allow",
      config=run.config,
      dir=str(run.workdir),
      reinit="create_new",
      settings=settings,
    )

  def log(self, step: int, scalars: dict[str, float]) -> None:
    self.run.log(scalars, step=step)

  def finish(self, status: str) -> None:
    self.run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
  """A run of Trackio, in the folder that TRACKIO_DIR names, or at TRACKIO_SPACE_ID."""

  def start(self, run: Tracked) -> None:
    import trackio

    self.run = trackio.init(
      project=PROJECT,
      name=kept(run, "trackio", lambda: f"{run.name}-{new_id()}"),
      group=run.group,
      resume="allow",
      config=run.config,
      embed=False,
    )

  def log(self, step: int, scalars: dict[str, float]) -> None:
    self.run.log(scalars, step=step)

  def finish(self, status: str) -> None:
    self.run.finish()


class Mlflow:
  """A run of MLflow, at MLFLOW_TRACKING_URI, or in WORKDIR/mlflow.db if that is not set."""

  STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

  def start(self, run: Tracked) -> None:
    # a server that does not answer must not delay training for long
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    own = f"sqlite:///{run.workdir.absolute() / 'mlflow.db'}"
    self.client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", own))
    self.id = kept(run, "mlflow", lambda: self.create(run))
    self.client.update_run(self.id, status="RUNNING")

  def create(self, run: Tracked) -> str:
    """Creates the run with the config as its parameters."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = self.client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else self.client.create_experiment(name)
    made = self.client.create_run(experiment, run_name=run.name, tags={"workdir": run.group})
    for field, value in flat(run.config):
      self.client.log_param(made.info.run_id, field, value)
    return made.info.run_id

  def log(self, step: int, scalars: dict[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    metrics = [Metric(name, value, now, step) for name, value in scalars.items()]
    self.client.log_batch(self.id, metrics=metrics)

  def finish(self, status: str) -> None:
    self.client.set_terminated(self.id, status=self.STATUS[status])


def flat(config: dict, prefix: str = "") -> list[tuple[str, str]]:
  """(dotted field, value as text) of every setting."""
  found = []
  for name, value in config.items():
    if isinstance(value, dict):
      found += flat(value, f"{prefix}{name}.")
    else:
      found.append((prefix + name, str(value)))
  return found


# name in config.log.to -> name in warnings, and the tracker
TRACKERS: dict[str, tuple[str, type]] = {
  "tensorboard": ("TensorBoard", TensorBoard),
  "wandb": ("wandb", Wandb),
  "trackio": ("trackio", Trackio),
  "mlflow": ("mlflow", Mlflow),
}

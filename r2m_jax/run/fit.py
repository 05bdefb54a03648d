"""Supervised fine-tuning and Bradley-Terry reward fitting, with the same parts as the RL step."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from r2m_jax.algorithm.annotate import make_reward
from r2m_jax.algorithm.losses import bradley_terry
from r2m_jax.algorithm.optim import descend, make_optimizer
from r2m_jax.algorithm.read import Defs
from r2m_jax.algorithm.variants import States
from r2m_jax.models.logprobs import token_stats
from r2m_jax.models.reward import member_scores, read_rte
from r2m_jax.ops import combine, masked_mean, predicts_response
from r2m_jax.parallel import hosts
from r2m_jax.parallel.sharding import jit_on, on_mesh, shardings
from r2m_jax.run import checkpoint, loop, speed
from r2m_jax.run.build import Build
from r2m_jax.run.metrics import Metrics
from r2m_jax.run.progress import doing, progress

LOG_EVERY = 10  # updates; a fetch waits for the device
# multiple of its budget at which a stage ends, in case the machine has become slower
LATE = 1.25
PROBED = 32  # batches whose shapes determine the average time of an update
SKIPPED_SHARE = 0.5  # share of a fit's updates; if more are skipped, nothing was learned
BAD_ROWS = 3  # consecutive logged rows with every update skipped, after which the fit stops
SAVE_SECONDS = 300  # between saves of an unfinished fit
PARTIAL = "partial"  # their folder


def sft_loss(graphdef, *, chunk: int = 0) -> Callable:
  """Builds loss(policy_state, batch): mean negative log-likelihood of the response tokens, nats a
  token.

  A batch has tokens i32[B, L], token_mask bool[B, L] and response_mask bool[B, T] over the last T
  columns.
  """

  def loss(state, batch):
    model, mask = nnx.merge(graphdef, state), batch["response_mask"]
    T = mask.shape[1]
    hidden = predicts_response(model(batch["tokens"], batch["token_mask"]).hidden, T)
    stats = token_stats(model.head, hidden, batch["tokens"][:, -T:], temperature=1.0, chunk=chunk)
    return -masked_mean(stats.logprobs, mask), {}

  return loss


def reward_loss(backbone_def, phi_def, *, sum_to_zero: float = 0.0) -> Callable:
  """Builds loss(state, batch): Bradley-Terry (eq. 5) over pairs, for the whole reward model.

  The state is {"backbone", "phi"}; a batch has chosen, rejected i32[B, L] and their masks bool[B,
  L], and for an ensemble a weight f32[B, M] of each pair for each head of phi.

  Args:
    sum_to_zero: weight of the squared mean score of the batch, which keeps all scores from growing
      together.
  """

  def loss(state, batch):
    backbone, phi = nnx.merge(backbone_def, state["backbone"]), nnx.merge(phi_def, state["phi"])
    tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
    mask = jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]])
    scores = member_scores(phi, read_rte(backbone, tokens, mask))  # [2B, M]
    weight = batch.get("weight", jnp.ones((len(tokens) // 2, scores.shape[1]), scores.dtype))
    loss = jax.vmap(bradley_terry, 1)(*jnp.split(scores, 2), weight).mean()
    if sum_to_zero:
      loss += sum_to_zero * (scores.mean(0) ** 2).mean()
    chosen, rejected = jnp.split(combine(scores), 2)
    # a tie counts half: a model with equal scores for all has 0.5, not 0 or 1
    accuracy = jnp.where(chosen == rejected, 0.5, (chosen > rejected).astype(chosen.dtype)).mean()
    return loss, {"accuracy": accuracy}

  return loss


def head_loss(defs: Defs, score: Callable, *, layer: int, omega: float) -> Callable:
  """Builds loss(head, batch, frozen): Bradley-Terry of cross-attention and phi over pairs, for a
  warm start.

  Args:
    score: of `annotate.Reward`.
    layer: of the policy whose states are read.
    omega: weight of the reward model's own embedding (eq. 4).

  A batch is a `types.Pairs` as a dict. frozen is {"policy", "backbone"}, which do not change.
  """

  def loss(head, batch, frozen):
    policy = nnx.merge(defs.base or defs.policy, frozen["policy"])
    backbone = nnx.merge(defs.reward_backbone, frozen["backbone"])
    rte = read_rte(backbone, batch["reward_tokens"], batch["reward_mask"])
    hidden = policy(batch["tokens"], batch["token_mask"], feedback_layer=layer).feedback
    states = States(hidden, batch["token_mask"], batch["response_mask"])
    chosen, rejected = jnp.split(
      score(head, *jax.lax.stop_gradient((rte, states)), jnp.asarray(omega, rte.dtype)), 2
    )
    loss = jax.vmap(bradley_terry, 1)(chosen, rejected).mean()
    return loss, {"accuracy": ((chosen > rejected) + 0.5 * (chosen == rejected)).mean()}

  return loss


def fit(
  loss_fn: Callable,
  state,
  tx: optax.GradientTransformation,
  batches: Iterable[dict],
  *,
  total: int,
  stage: str,
  workdir: Path,
  state_shardings,
  batch_sharding,
  frozen=None,
  budget: float = 0.0,
  settings=None,
):
  """Minimises loss_fn over `total` batches as stage `stage`; returns the state, which is donated.

  Every process passes its own rows of a batch. On a signal and at intervals the fit saves into
  WORKDIR/partial, from which it resumes until the stage is done.

  Args:
    frozen: a tree of arrays that loss_fn(state, batch, frozen) reads: the base below adapters.
    budget: seconds from the first update on; 0: none. The fit ends after `LATE` times the budget.
    settings: the config section from which `tx` is made; its learning rate is logged.
  """
  extra, mesh = () if frozen is None else (frozen,), jax.tree.leaves(state_shardings)[0].mesh
  opt_shardings = shardings(jax.eval_shape(tx.init, state), mesh)
  update = make_update(loss_fn, tx, mesh, state_shardings, opt_shardings)
  opt, saved = jax.jit(tx.init, out_shardings=opt_shardings)(state), time.monotonic()
  partial = checkpoint.open_checkpoints(workdir / PARTIAL / stage, last=1)
  facts = {} if frozen is None else {"models": checkpoint.fingerprint(frozen)}
  start, state, opt = resumed(partial, f"{stage}: resumes at update", total, facts, state, opt)
  batches = Timed(itertools.islice(batches, start, total))
  with (
    loop.at_hand() as asked,
    checkpoint.finished(partial),
    Metrics(workdir, stage, from_step=start) as log,
    progress(total, stage, initial=start, unit="update") as bar,
  ):
    rows = Rows(stage, log, batches, budget, speed.FitCost(settings, total))
    for i, batch in enumerate(batches, start):
      state, opt, metrics = update(state, opt, hosts.place(batch, batch_sharding), *extra)
      bar.dispatched(metrics)
      rows.count(metrics, batch)
      # the processes agree only at updates for which they wait for the device
      turn = jax.process_count() == 1 or i % LOG_EVERY == 0
      late = turn and hosts.any_of(rows.late())
      if i % LOG_EVERY == 0 or i == total - 1 or late:
        bar.settle(**rows.write(i, metrics, opt))
      stop = turn and asked()
      if stop or turn and hosts.any_of(time.monotonic() - saved > SAVE_SECONDS):
        checkpoint.save(partial, i + 1, (state, opt), facts=facts)
        saved = time.monotonic()
      if late:
        print(cut_short(stage, i + 1, total, budget))
      if late or stop:
        log.close("stopped" if stop else "finished")
        break
  rows.require_learned()
  return state


def resumed(partial: checkpoint.Checkpoints, words: str, total: int, facts: dict, state, opt):
  """(updates done, state, optimizer's state) of an unfinished fit, which is printed after `words`;
  otherwise 0 updates and the given states.
  """
  start = checkpoint.newest(partial) or 0
  if start:
    checkpoint.require(partial, start, **facts)
    state, opt = checkpoint.restore(partial, (state, opt), start)
    print(f"{words} {start} of {total}")
  return start, state, opt


def make_update(
  loss_fn: Callable, tx: optax.GradientTransformation, mesh, state_shardings, opt_shardings
) -> Callable:
  """Builds the jitted `update(state, opt, batch, *frozen) -> (state, opt, metrics)`; state and opt
  are donated.
  """

  def update(state, opt, batch, *extra):
    state, opt, loss, aux, done = descend(tx, loss_fn, state, opt, batch, *extra)
    return state, opt, {"loss": loss, **done, **aux}

  return jax.jit(
    on_mesh(mesh, update),
    donate_argnums=(0, 1),
    out_shardings=(state_shardings, opt_shardings, None),
  )


def cut_short(stage: str, done: int, total: int, budget: float) -> str:
  """The message for a fit that ends at its time limit."""
  return (
    f"{stage}: ends after {done} of {total} updates, at {LATE} times its budget of {budget:g} s"
  )


class Rows:
  """The logged rows of a fit, and the counts between two rows.

  `data/wait` is the share of the time since the row before that was spent waiting for batches.
  """

  def __init__(
    self, stage: str, log: Metrics, batches: "Timed", budget: float, cost: speed.FitCost
  ):
    self.stage = stage
    self.log = log
    self.batches = batches
    self.budget = budget
    self.cost = cost
    self.began = 0.0  # when the first update was done; 0 before
    self.bad = 0  # rows in a row with every update skipped
    self.skipped = 0.0  # updates since the last row; on the device until the next one
    self.since = 0
    self.done = 0  # all updates
    self.void = 0.0  # of these, skipped

  def count(self, metrics: dict, batch: dict) -> None:
    """Counts an update, without waiting for the device."""
    self.cost.count(batch)
    self.skipped += metrics["skipped"]
    self.since += 1

  def late(self) -> bool:
    """Whether the fit has taken `LATE` times its budget."""
    elapsed = time.perf_counter() - self.began
    return bool(self.budget and self.began and elapsed > LATE * self.budget)

  def write(self, i: int, metrics: dict, opt) -> dict[str, float]:
    """Waits for update i and logs it; returns the values for the progress bar. `opt`: the
    optimizer's state.

    Raises:
      Diverged: every update since `BAD_ROWS` rows was skipped.
    """
    metrics = {k: float(v) for k, v in metrics.items()} | {"skipped": float(self.skipped)}
    wait = {"data/wait": self.batches.waiting_share()}
    self.log.log(i, metrics | wait | self.cost.take(opt))
    # the first update compiles, and fetching its loss waited for it
    self.began = self.began or time.perf_counter()
    self.bad = self.bad + 1 if metrics["skipped"] == self.since else 0
    self.done, self.void = self.done + self.since, self.void + metrics["skipped"]
    self.skipped, self.since = 0.0, 0
    if self.bad == BAD_ROWS:
      raise loop.Diverged(
        f"{self.stage}: updates up to {i} are skipped, loss {metrics['loss']}: lower "
        f"{self.stage}'s lr"
      )
    return {"loss": metrics["loss"]}

  def require_learned(self) -> None:
    """Raises Diverged if more than `SKIPPED_SHARE` of the updates were skipped."""
    if self.void > SKIPPED_SHARE * self.done:
      raise loop.Diverged(
        f"{self.stage}: {self.void:.0f} of {self.done} updates were skipped because a loss or a "
        f"gradient was not finite; nothing was exported. Lower {self.stage}'s lr, or look for "
        "NaN in the model's weights: task=generate and task=score refuse a model that has them"
      )


class Timed:
  """An iterator that measures the share of the time spent waiting for it."""

  def __init__(self, items: Iterable):
    self._items = iter(items)
    self._waited = 0.0
    self._since = time.perf_counter()

  def __iter__(self) -> Iterator:
    return self

  def __next__(self):
    began = time.perf_counter()
    try:
      return next(self._items)
    finally:
      self._waited += time.perf_counter() - began

  def waiting_share(self) -> float:
    """The share of time spent waiting, since the last call or since the beginning."""
    now = time.perf_counter()
    share = self._waited / max(now - self._since, 1e-9)
    self._waited, self._since = 0.0, now
    return share


def steps_within(
  seconds: float, loss_fn: Callable, state, batches: Iterable[dict], *, batch_sharding, frozen=None
) -> int:
  """The number of updates of `fit` that take about `seconds`; times gradients of a few batches and
  prints the rate.

  Each shape among the first `PROBED` batches is timed after compilation, weighted by how often it
  occurs there. Compilation is not part of the budget.
  """
  began, extra = time.perf_counter(), () if frozen is None else (frozen,)
  grads = jit_on(batch_sharding.mesh)(jax.grad(loss_fn, has_aux=True))
  batch_of, count = {}, {}
  for batch in itertools.islice(batches, PROBED):
    shape = tuple(x.shape for x in jax.tree.leaves(batch))
    count[shape] = count.get(shape, 0) + 1
    batch_of.setdefault(shape, batch)
  total = 0.0
  with doing("rate     compiling, and measuring updates"):
    for shape, batch in batch_of.items():
      batch = hosts.place(batch, batch_sharding)
      jax.block_until_ready(grads(state, batch, *extra))
      start = time.perf_counter()
      jax.block_until_ready([grads(state, batch, *extra) for _ in range(2)])
      total += (time.perf_counter() - start) / 2 * count[shape]
  each, spent = total / sum(count.values()), time.perf_counter() - began
  steps = max(1, int(seconds / each))
  print(
    f"rate     {each:.2f} s an update, measured in {spent:.0f} s: {steps} updates in a budget of "
    f"{seconds:g} s"
  )
  return steps


class Job(NamedTuple):
  """The arguments of one `fit`; `start` is donated."""

  stage: str
  loss: Callable
  start: Any
  tx: optax.GradientTransformation
  batches: Iterable[dict]
  total: int  # updates
  frozen: Any = None
  settings: Any = None  # the config section from which tx is made


def do(job: Job, built: Build, workdir: Path):
  """Runs a job and returns its final state."""
  return fit(
    job.loss,
    job.start,
    job.tx,
    job.batches,
    total=job.total,
    stage=job.stage,
    workdir=workdir,
    frozen=job.frozen,
    settings=job.settings,
    state_shardings=shardings(job.start, built.mesh),
    batch_sharding=built.rows,
  )


def warm_job(
  config, built: Build, policy, backbone, head, batches: Iterable[dict], steps: int
) -> Job:
  """Cross-attention and phi on pairs before RL, with the optimizer of config.r2m; see
  `head_loss`.
  """
  loss = head_loss(
    built.defs,
    make_reward(built.defs, config).score,
    layer=config.r2m.feedback_layer,
    omega=config.r2m.omega_min,
  )
  frozen = {"policy": policy, "backbone": backbone}
  tx = make_optimizer(config.r2m, steps)
  return Job("warm_start", loss, head, tx, batches, steps, frozen, config.r2m)


def epochs_of_rows(seed: int, count: int, batch_size: int, steps: int):
  """Row indices of `steps` batches: every row once per epoch, in a new order each time. Rows that
  do not fill a batch are dropped.
  """
  rng, order = np.random.default_rng([seed, 3]), np.empty(0, int)
  for _ in range(steps):
    if len(order) < batch_size:
      order = rng.permutation(count)
    rows, order = order[:batch_size], order[batch_size:]
    yield rows

"""No saved state is lost: damaged checkpoints, signals, full disks, NaN and infinity, another mesh,
forks, replay.
"""

import hashlib
import itertools
import os
import pathlib
import random
import resource
import shutil
import signal
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import small

from benchmarks import kill_resume
from configs import quickstart
from r2m_jax.algorithm.optim import descend
from r2m_jax.config import ConfigError
from r2m_jax.goldtask import rl as gold_rl
from r2m_jax.parallel import sharding
from r2m_jax.run import checkpoint, fit, loop, metrics
from r2m_jax.run import files as run_files
from r2m_jax.run import workdir as workdirs
from r2m_jax.run.run import Run, Steps, train
from r2m_jax.step import StepOutput
from r2m_jax.tasks import gold, replay
from r2m_jax.types import Judged, Prompts, Sequences


def settings(**changes):
  config = quickstart.get_config("test")
  config.variant, config.steps = "r2m", 6
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  return config


# ---- checkpoints ----


def tree(step):
  return {"a": jnp.arange(1000.0) * step, "step": jnp.int32(step)}


def saved(folder, steps=(1, 2, 3), **kept):
  made = checkpoint.Checkpoints(folder, last=kept.pop("last", 3), **kept)
  for step in steps:
    checkpoint.save(
      made, step, tree(step), value=-abs(step - 3), facts={"cursor": {"row": 7 * step}}
    )
  checkpoint.wait(made)
  return made


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max(
    (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
  )


def flip(folder):
  data = bytearray(largest(folder).read_bytes())
  data[len(data) // 2] ^= 1
  largest(folder).write_bytes(data)


def truncate(folder):
  os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def half_written(folder):  # the state after a kill during the save
  (folder / checkpoint.MANIFEST).unlink()
  folder.rename(folder.with_name(folder.name + checkpoint.UNFINISHED))


def linked(folder):
  target = largest(folder).rename(folder.parent / "elsewhere")
  (folder / "default" / "link").symlink_to(target)


@pytest.mark.parametrize(
  "harm, words",
  [
    (flip, "is not what was written"),
    (truncate, "is not what was written"),
    (linked, "is missing"),
    (lambda folder: largest(folder).unlink(), "is missing"),
    (lambda folder: (folder / "more").write_text("x"), "more was added"),
    (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "it has no manifest.json"),
    (lambda folder: (folder / checkpoint.MANIFEST).write_text("{"), "it cannot be read"),
    (half_written, "was never finished"),
    (shutil.rmtree, ""),
  ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, harm, words):
  saved(tmp_path).close()
  harm(tmp_path / "3")
  again = checkpoint.open_checkpoints(tmp_path, last=3)
  assert checkpoint.newest(again) == 2 and words in capsys.readouterr().out
  got = checkpoint.restore(again, tree(0))
  np.testing.assert_array_equal(got["a"], tree(2)["a"])
  checkpoint.save(again, 3, tree(3))  # the step is repeated
  checkpoint.wait(again)
  assert checkpoint.newest(again) == 3 and int(checkpoint.restore(again, tree(0))["step"]) == 3


def test_hidden_files_of_a_file_manager_damage_no_checkpoint(tmp_path):
  saved(tmp_path).close()
  for place in (tmp_path, tmp_path / "3", tmp_path / "3/default"):
    (place / ".DS_Store").write_bytes(b"Bud1")
    (place / "._3").write_bytes(b"\0\5\26\7")
  again = checkpoint.open_checkpoints(tmp_path, last=3)
  assert checkpoint.newest(again) == 3
  np.testing.assert_array_equal(checkpoint.restore(again, tree(0))["a"], tree(3)["a"])
  assert [folder.name for folder in run_files.subfolders(tmp_path)] == ["1", "2", "3"]


def test_the_manifest_is_that_of_the_files_and_holds_the_cursor(tmp_path):
  made = saved(tmp_path)
  facts = checkpoint.facts_of(made, 2)
  assert facts["cursor"] == {"row": 14} and facts["step"] == 2
  for name, digest in facts["files"].items():
    assert hashlib.sha256((tmp_path / "2" / name).read_bytes()).hexdigest() == digest
  arrays = [name for name in facts["files"] if "/d/" in name]
  assert arrays and not any(name.startswith(("/", "..")) for name in facts["files"])


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path):
  saved(tmp_path).close()
  flip(tmp_path / "2")
  with pytest.raises(
    checkpoint.CheckpointError, match=r"/2 is damaged: .*not what was written; choose one of"
  ):
    checkpoint.restore(checkpoint.open_checkpoints(tmp_path, last=3), tree(0), 2)


@pytest.mark.parametrize(
  "kept, want",
  [
    (dict(last=2), [6, 7]),
    (dict(last=1, every=5), [5, 7]),
    (dict(last=2, best=1), [3, 6, 7]),
    (dict(last=1, best=1, mode="min"), [7]),
    (dict(last=1, best=2, mode="min", background=False), [6, 7]),
  ],
)
def test_which_checkpoints_stay(tmp_path, kept, want):
  assert (
    list(saved(tmp_path, range(1, 8), **kept).all_steps()) == want
  )  # value is -|step - 3|: best at 3, lowest at 7


def test_orbax_alone_reads_a_flipped_byte(tmp_path):
  """The reason for the manifest: if damaged values still decompress, orbax returns wrong values
  silently.
  """
  noise = {"a": jax.random.normal(jax.random.key(0), (4096,))}
  made = checkpoint.Checkpoints(tmp_path, last=1)
  checkpoint.save(made, 1, noise)
  checkpoint.wait(made)
  flip(tmp_path / "1")
  assert checkpoint.damage(tmp_path / "1")
  try:
    got = ocp.CheckpointManager(tmp_path).restore(1, args=ocp.args.StandardRestore(noise))
  except ValueError:
    pytest.skip("this build of orbax noticed")
  assert not np.array_equal(got["a"], noise["a"])


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path):
  """A limit on the file size simulates a full disk: the write of the array fails."""
  made = saved(tmp_path, (1,))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  big = {"a": jax.random.normal(jax.random.key(0), (300_000,)), "step": jnp.int32(2)}
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    with pytest.raises(
      checkpoint.CheckpointError, match="could not take a checkpoint.*the same command"
    ):
      checkpoint.save(made, 2, big)
      checkpoint.wait(made)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  again = checkpoint.open_checkpoints(tmp_path)
  assert checkpoint.newest(again) == 1
  np.testing.assert_array_equal(checkpoint.restore(again, tree(0))["a"], tree(1)["a"])


def test_the_whole_state_moves_to_another_mesh_bit_for_bit(tmp_path):
  cfg = small.config(algorithm="ppo", r2m__average=0.5)
  _, state = small.start(cfg, (2, 2, 2))
  made = checkpoint.open_checkpoints(tmp_path)
  checkpoint.save(made, 1, state)
  checkpoint.wait(made)
  for mesh in ((1, 1, 1), (1, 8, 1)):
    _, like = small.start(cfg, mesh)
    got = checkpoint.restore(made, like)

    def bits(x):
      return np.asarray(jax.random.key_data(x) if x.dtype == state.key.dtype else x)

    for a, b, want in zip(jax.tree.leaves(got), jax.tree.leaves(state), jax.tree.leaves(like)):
      assert a.sharding == want.sharding and bits(a).tobytes() == bits(b).tobytes()


# ---- the loop, with a step that counts ----


@flax.struct.dataclass
class Count:
  step: jax.Array
  total: jax.Array
  # frozen models: none
  ref: None = None
  reward_backbone: None = None
  reward_frozen: None = None


def counting(then=lambda t: None, wrong=()):
  """The Steps of a step that adds t + 1. `then` is called in the step, and steps in `wrong` have a
  NaN score in row 1.
  """

  def step(state, prompts):
    then(t := int(state.step))
    scores = np.arange(4.0, dtype=np.float32)
    if t in wrong:
      scores[1] = np.nan
    rows = Sequences(
      tokens=np.arange(20, dtype=np.int32).reshape(4, 5),
      token_mask=np.ones((4, 5), bool),
      response_mask=np.ones((4, 2), bool),
      has_eos=np.ones(4, bool),
    )
    values = {"reward/used": scores.mean(), "skipped": float(t in wrong)}
    out = StepOutput(
      metrics=values, sequences=rows, judged=Judged(rte=scores, scores=scores, scores_frozen=scores)
    )
    return state.replace(step=state.step + 1, total=state.total + t + 1), out

  def measure(t, state, out, batch):
    return out.metrics, {"reward": 0.0}

  prompts = Prompts(tokens=None, mask=None, example_id=np.asarray([8, 9]))
  return Steps(itertools.repeat((prompts,)), step, measure)


def run_loop(workdir, config, steps, watch=loop.watch_nothing):
  """Resumes from the checkpoint, if there is one, and runs to the end, like a task."""
  workdir.mkdir(exist_ok=True)
  workdirs.claim(config, workdir)

  def first():
    return Count(jnp.int32(0), jnp.int32(0))

  run = Run(config, None, first, warm=None, steps=lambda state: steps, watch=watch, costed=False)
  return train(run, workdir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(tmp_path, number, at):
  config, done = settings(), []
  config.log.checkpoint_every = 100  # it saves only because of the signal

  def hit(t):
    done.append(t)
    if t == at and len(done) == at + 1:
      os.kill(os.getpid(), number)

  with pytest.raises(loop.Interrupted, match=number.name), loop.signals_end_the_run():
    run_loop(tmp_path, config, counting(hit))
  assert done == list(range(at + 1))
  with loop.signals_end_the_run():
    state = run_loop(tmp_path, config, counting(hit))
  assert int(state.total) == 21 and done == [0, 1, 2, 3, 4, 5]  # no step is repeated
  rows = metrics.read_metrics(tmp_path)
  assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]


def test_a_signal_outside_the_loop_raises_at_once_and_the_second_is_the_default(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(loop.Interrupted), loop.signals_end_the_run():
    try:
      os.kill(os.getpid(), signal.SIGTERM)
    finally:
      assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_is_not_taken_for_an_error_of_the_call_it_came_in():
  with pytest.raises(loop.Interrupted, match="SIGTERM"), loop.signals_end_the_run():
    with checkpoint.told("the checkpoints cannot be opened"):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)  # a Python signal handler runs between two instructions


def test_skipped_rows_are_kept_and_too_many_in_a_row_stop_the_run(tmp_path):
  config = settings(guard__max_skipped=3)
  with pytest.raises(loop.Diverged) as stopped:
    run_loop(tmp_path, config, counting(wrong=(0, 2, 3, 4)))
  for words in (
    "steps 2 to 4",
    "reward/used",
    str(tmp_path / loop.SAMPLES_KEPT),
    "saved        step 4",
    "what to do",
  ):
    assert words in str(stopped.value)
  rows = run_files.read_jsonl(tmp_path / loop.SAMPLES_KEPT)
  assert [(row["step"], row["example_id"], row["sample"]) for row in rows] == [
    (t, 8, 1) for t in (0, 2, 3, 4)
  ]
  assert (
    rows[0]["prompt"] == [5, 6, 7] and rows[0]["response"] == [8, 9] and rows[0]["reward"] == "nan"
  )
  logged = metrics.read_metrics(tmp_path)
  assert [row["skipped"] for row in logged] == [1, 0, 1, 1, 1] and np.isnan(
    logged[0]["reward/used"]
  )


def test_the_best_checkpoints_are_those_of_evaluated_steps(tmp_path):
  """Steps 3 and 6 are also saved, but step 3 has no value to compare."""
  golds = {0: 3.0, 2: 9.0, 4: 1.0}
  kept = dict(checkpoint__keep_best=1, checkpoint__keep_last=1, log__checkpoint_every=3)
  config = settings(**kept, checkpoint__best_metric="eval/gold", eval__every=2)

  def watch(state, step, metrics):
    assert int(state.step) == step and (metrics is None) == (step == 0)
    return loop.Seen({"gold": golds[step]} if step in golds else {})

  run_loop(tmp_path, config, counting(), watch=watch)
  saved = checkpoint.open_checkpoints(tmp_path / "checkpoints" / "r2m", config.checkpoint)
  assert saved.all_steps() == [2, 6]
  rows = metrics.read_metrics(tmp_path)
  assert [(row["step"], row["gold"]) for row in rows if row["stage"] == "eval"] == [*golds.items()]


def test_a_watch_ends_a_run_for_good(tmp_path):
  config, done = settings(log__checkpoint_every=100), []

  def watch(state, step, metrics):
    return loop.Seen({}, "enough" if step >= 4 else "")

  for _ in range(2):  # the same command again trains nothing
    state = run_loop(tmp_path, config, counting(done.append), watch=watch)
    assert int(state.step) == 4 and done == [0, 1, 2, 3]
  assert (
    int(run_loop(tmp_path, config, counting(done.append)).step) == 6
  )  # without it the run continues
  assert done == [0, 1, 2, 3, 4, 5]


def test_a_workdir_that_vanishes_stops_the_run(tmp_path):
  gone = tmp_path / "run"
  with pytest.raises(checkpoint.CheckpointError, match="has vanished: bring it back"):
    run_loop(
      gone,
      settings(),
      counting(lambda t: shutil.rmtree(gone, ignore_errors=True) if t == 1 else None),
    )
  assert not (gone / "config.json").exists()


def test_checkpoints_of_another_config_or_of_other_rows_are_refused(tmp_path):
  config = settings()
  run_loop(tmp_path, config, counting())
  made = checkpoint.open_checkpoints(tmp_path / "checkpoints" / "r2m", config.checkpoint)
  start = Count(jnp.int32(0), jnp.int32(0))
  free = settings(
    log__samples=9, checkpoint__keep_last=5, mesh=(8, 1, 1)
  )  # settings of places and intervals, not of results
  models = loop.models_of(start)
  assert int(loop.resume(free, made, start, models=models)[0].total) == 21
  for other, data in ((settings(seed=5), ""), (config, "other")):
    with pytest.raises(
      checkpoint.CheckpointError, match="is of other (config|data) than this run's.*fork_from=OLD"
    ):
      loop.resume(other, made, start, data=data, models=models)


def test_a_fork_starts_from_the_other_run_and_does_not_change_it(tmp_path, capsys):
  old, new = tmp_path / "old", tmp_path / "new"
  run_loop(old, settings(), counting())

  def files():
    return {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}

  before, fork = files(), settings(kl__beta=0.5, checkpoint__fork_from=str(old))
  done = []
  state = run_loop(new, fork, counting(done.append))
  assert int(state.total) == 21 and not done and files() == before
  assert "config.kl.beta: 0.02 -> 0.5" in capsys.readouterr().out
  assert [row["step"] for row in metrics.read_metrics(new)] == [0, 1, 2, 3, 4, 5]
  run_loop(new, fork, counting(done.append))  # the same command again
  with pytest.raises(ConfigError, match="not empty: a fork needs a new one"):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    workdirs.claim(fork, tmp_path / "full")
  with pytest.raises(ConfigError, match="there is no config.json"):
    workdirs.claim(settings(checkpoint__fork_from=str(tmp_path)), tmp_path / "third")


def test_a_fit_goes_on_where_a_signal_stopped_it(tmp_path):
  mesh = sharding.make_mesh((1, 1, 1))

  def loss(w, batch, base):
    return (((w * base - batch["x"]) ** 2).mean(), {})

  def start():
    return jax.device_put({"w": jnp.zeros(3)}, sharding.shardings({"w": jnp.zeros(3)}, mesh))

  def fitted(workdir, stop_at=None, base=1.0):
    def batches():
      for i in range(25):
        if i == stop_at:
          os.kill(os.getpid(), signal.SIGTERM)
        yield {"x": np.full((1, 3), i, np.float32)}

    state = start()
    return fit.fit(
      lambda s, batch, base: loss(s["w"], batch, base),
      state,
      optax.adam(0.1),
      batches(),
      total=25,
      stage="sft",
      workdir=workdir,
      state_shardings=sharding.shardings(state, mesh),
      frozen=jnp.float32(base),
      batch_sharding=jax.NamedSharding(mesh, sharding.BATCH),
    )

  with pytest.raises(loop.Interrupted), loop.signals_end_the_run():
    fitted(tmp_path / "cut", stop_at=13)
  with pytest.raises(
    checkpoint.CheckpointError, match="partial/sft/14 is of other models than this run's"
  ):
    fitted(tmp_path / "cut", base=2.0)
  np.testing.assert_array_equal(fitted(tmp_path / "cut")["w"], fitted(tmp_path / "whole")["w"])

  def rows(name):
    return list(map(metrics.without_clock, metrics.read_metrics(tmp_path / name)))

  assert rows("cut") == rows("whole")


# ---- numbers that are not finite ----


def test_descend_is_the_optimizer_or_nothing():
  """Against a plain optax loop. If the loss or one gradient has a NaN or an infinity, no bit
  changes.
  """
  tx, params = optax.adamw(0.1), {"w": jnp.arange(1.0, 4.0), "b": jnp.float32(2.0)}

  def loss(p, x):
    return (((p["w"] * x).sum() + p["b"]) ** 2, p["b"])

  update = jax.jit(lambda p, o, x: descend(tx, loss, p, o, x))
  opt, plain, plain_opt = tx.init(params), params, tx.init(params)
  good = jnp.asarray([1.0, -2.0, 0.5])
  for x in (good, good.at[1].set(jnp.nan), -good, good.at[0].set(jnp.inf), good * 1e30, 2 * good):
    before = (params, opt)
    params, opt, value, aux, done = update(params, opt, x)
    if np.isfinite(value):
      grads = jax.grad(lambda p: loss(p, x)[0])(plain)
      updates, plain_opt = tx.update(grads, plain_opt, plain)
      plain = optax.apply_updates(plain, updates)
      assert done["skipped"] == 0 and done["grad_norm"] == pytest.approx(
        float(optax.tree.norm(grads)), rel=1e-6
      )
    else:
      assert done["skipped"] == 1
      jax.tree.map(np.testing.assert_array_equal, (params, opt), before)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (params, opt), (plain, plain_opt)
    )


def test_the_guard_needs_no_second_copy():
  """Peak temporary memory of a donated update with the guard, against plain optax. Half a copy
  would be noticed.
  """
  params = {"w": jnp.zeros((4, 256, 256)), "b": jnp.zeros((4, 256))}
  tx, x = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), jnp.ones((2, 256))

  def layer(x, w):
    return (jnp.tanh(x @ w[0] + w[1]), None)

  def loss(p, x):
    return ((jax.lax.scan(layer, x, (p["w"], p["b"]))[0] ** 2).mean(), None)

  def plain(params, opt, x):
    grads = jax.grad(lambda p: loss(p, x)[0])(params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt

  def temporaries(f):
    compiled = jax.jit(f, donate_argnums=(0, 1)).lower(params, tx.init(params), x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  def guarded(params, opt, x):
    return descend(tx, loss, params, opt, x)[:2]

  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert temporaries(guarded) < temporaries(plain) + size / 2


def test_a_nan_reward_trains_nothing_and_the_next_step_goes_on():
  """Uses PPO, so that all three updates run. A NaN in the reward model's bias makes every score of
  the step NaN.
  """
  cfg = small.config(algorithm="ppo", kl__controller="adaptive")
  built, state = small.start(cfg)
  step = small.step_of(cfg, built, state)
  good = jax.tree.map(jnp.copy, state.reward_frozen)
  head = jax.tree.map(jnp.copy, state.reward_head)
  poisoned = jax.tree.map(jnp.copy, head)
  poisoned["phi"]["bias"][...] = jnp.full_like(head["phi"]["bias"][...], jnp.nan)

  def trained(s):
    return [
      np.asarray(x) for x in jax.tree.leaves((s.policy, s.policy_opt, s.critic, s.critic_opt))
    ]

  before = trained(state)
  state, out = step(state.replace(reward_head=poisoned), small.prompts(cfg, 0))
  updates = cfg.ppo.epochs * cfg.ppo.minibatches
  assert (
    float(out.metrics["skipped"]) == 2 * updates + 1 and not np.isfinite(out.judged.scores).any()
  )
  jax.tree.map(np.testing.assert_array_equal, trained(state), before)
  assert int(state.step) == 1 and np.isfinite(state.beta)
  state, out = step(state.replace(reward_head=head, reward_frozen=good), small.prompts(cfg, 1))
  assert float(out.metrics["skipped"]) == 0 and np.isfinite(float(out.metrics["policy/loss"]))
  assert not np.array_equal(trained(state)[0], before[0])


# ---- whole runs ----


def test_any_sample_is_made_again_token_for_token(tmp_path, monkeypatch, capsys):
  """From a checkpoint at the step, from an earlier one, and from the beginning. The oracle is the
  arrays of the run.
  """
  cfg, seen, original = settings(steps=4, checkpoint__keep_last=9), [], gold_rl.gold_metrics
  monkeypatch.setattr(gold, "gold_metrics", lambda out, *of: seen.append(out) or original(out, *of))
  gold.run(cfg, tmp_path)

  def paths():
    return [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "replay"]

  def files():
    return {path: path.read_bytes() for path in paths()}

  before, width = files(), cfg.rollout.max_new_tokens
  for step, prompt, sample in ((0, 1, 2), (2, 7, 3), (3, 0, 0)):  # checkpoints are at 2 and 4
    again = settings(task="replay", replay__step=step, replay__prompt=prompt, replay__sample=sample)
    found, out, row = (
      replay.run(again, tmp_path),
      seen[step],
      prompt * cfg.rollout.group_size + sample,
    )
    mask = out.sequences.response_mask[row]
    assert found["tokens"] == out.sequences.tokens[row, -width:][mask].tolist()
    assert found["reward"] == run_files.plain(out.judged.scores[row])
    assert found["frozen"] == run_files.plain(out.judged.scores_frozen[row])
    assert found["example_id"] == prompt + step * cfg.rollout.prompts
    assert len(found["logprobs"]) == len(found["tokens"]) and max(found["logprobs"]) <= 0
    np.testing.assert_allclose(np.sum(found["attention"], -1), 1, rtol=1e-5)
    fused = found["omega"] * found["own"][0] + (1 - found["omega"]) * found["read"][0]  # eq. 4
    assert fused == pytest.approx(found["reward"], abs=1e-5) and len(found["states"]) == len(
      found["attention"][0]
    )
    shown = capsys.readouterr().out
    assert "metrics of the step against metrics.jsonl: largest difference 0.0e+00" in shown, shown
  assert files() == before
  by_id = settings(task="replay", replay__step=3, replay__example_id=cfg.rollout.prompts * 3)
  assert replay.run(by_id, tmp_path) == found  # with the numbers in skipped.jsonl
  by_id.replay.example_id = 0
  with pytest.raises(
    ConfigError, match=r"config.replay.example_id is 0: the prompts of step 3 are \[24, "
  ):
    replay.run(by_id, tmp_path)
  with pytest.raises(ConfigError, match="config.replay.sample is 4: the run has 4, counted from 0"):
    replay.run(settings(task="replay", replay__sample=4), tmp_path)
  with pytest.raises(ConfigError, match="config.replay.arm is 'vanilla': .* has r2m"):
    replay.run(settings(task="replay", replay__arm="vanilla"), tmp_path)


def test_stopped_and_killed_it_ends_where_the_unbroken_run_does(smallest_run, tmp_path):
  """SIGTERM, then SIGKILL after a logged step and during a save. `benchmarks.kill_resume` does so
  fifty times.
  """
  unbroken, broken, rng = smallest_run[0], tmp_path / "broken", random.Random(0)
  shutil.copytree(unbroken / "stages", broken / "stages")
  run, log = kill_resume.start(broken, "--config.steps=4"), tmp_path / "broken.log"
  while run.poll() is None and not (broken / "checkpoints").exists():
    time.sleep(0.01)
  run.send_signal(signal.SIGTERM)
  assert run.wait(600) == loop.RESUME, log.read_text()[-2000:]
  assert "the same command resumes" in log.read_text() and "Traceback" not in log.read_text()
  moments = zip((0, 2), kill_resume.MOMENTS)
  assert any(
    [kill_resume.kill_at(broken, step, moment, rng, "--config.steps=4") for step, moment in moments]
  )
  assert kill_resume.start(broken, "--config.steps=4").wait() == 0, log.read_text()[-2000:]
  assert kill_resume.arrays(broken, 4) == kill_resume.arrays(unbroken, 4)

  def rl(workdir):
    return [row for row in kill_resume.rows(workdir) if row["arm"] == "r2m"]

  assert rl(broken) == rl(unbroken) and len(rl(broken)) == 4

"""task = "lab": arms x seeds x KL weights on the gold-reward task, every replica of an arm in one
program.

The step is that of `step.py`, vmapped. A replica is one seed at one KL weight; by itself it would
be `tasks.gold.run` with that seed. WORKDIR/table has the rows of finished arms, and WORKDIR/partial
the states of unfinished ones. Processes with the same command divide the arms among themselves. See
docs/lab.md.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from r2m_jax.algorithm.annotate import make_annotate
from r2m_jax.algorithm.labels import uses_labels
from r2m_jax.algorithm.read import make_read, measured_kl, read_feedback, sampling
from r2m_jax.algorithm.schedules import make_omega
from r2m_jax.algorithm.variants import VARIANTS, measured
from r2m_jax.config import ConfigError, arms_of, identity
from r2m_jax.goldtask import formula
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.labels import gold_labeller
from r2m_jax.goldtask.rl import gold_metrics, make_arm_step, program_of, rl_prompts, shared_arm
from r2m_jax.goldtask.stages import (
  STREAM_BEST,
  STREAM_PROBE,
  certificate,
  golden_job,
  head_job,
  reward_job,
  sample,
  scorer,
  sft_job,
  standardise,
)
from r2m_jax.lab import report, results, stats, table
from r2m_jax.lab.together import fit_together, pick, seeds_mesh, spread, stack, together
from r2m_jax.models.generate import generate
from r2m_jax.ops import combine
from r2m_jax.parallel.hosts import ALONE
from r2m_jax.parallel.sharding import make_mesh
from r2m_jax.run import checkpoint
from r2m_jax.run.build import (
  Build,
  abstract,
  build,
  init_policy,
  init_reward_model,
  make_first_state,
)
from r2m_jax.run.files import write_atomic
from r2m_jax.run.fit import PARTIAL
from r2m_jax.run.identities import check_step_zero, sample_rounding
from r2m_jax.run.metrics import read_metrics
from r2m_jax.run.run import Run, Steps, train
from r2m_jax.run.workdir import claim, shapes_of, warm
from r2m_jax.step import make_learn, make_rollout
from r2m_jax.types import Rollout

KEY_PROBE = 2**31 - 10  # key of the fixed responses
BEST_GROUP = 2  # samples of a prompt drawn at a time, with the program that draws preferences


def run(config, workdir: Path) -> None:
  """Runs the missing arms, one after another, and writes the report of all arms in the table."""
  arms = arms_of(config)
  if jax.process_count() > 1:
    raise ConfigError(
      "config.task is 'lab': runs in one process, over whose devices its seeds are distributed; "
      f"start one, with --config.hosts.coordinator={ALONE}"
    )
  claim(config, workdir, shared=True)
  formula.keep(config.gold.formula, workdir)
  wanted = [(seed, factor) for factor in config.lab.betas for seed in config.lab.seeds]
  for name, arm in arms.items():  # before anything is computed
    missing_of(workdir, name, arm, wanted)
  device = jax.devices()[0]
  print(
    f"r2m_jax  lab: {len(arms)} arms x {len(config.lab.seeds)} seeds x {len(config.lab.betas)} KL "
    "weights on "
    f"{len(jax.devices())} {device.platform} device(s); writes {workdir}",
    flush=True,
  )
  best_of_n(with_seed(config, 0), config.lab.seeds, workdir)
  proxies = workdir / "stages" / stage_name("reward", config)

  def conclude(draw):
    with alone(
      workdir, "report"
    ):  # of the finished arms; the process that ends last has all of them
      found, facts = report.read(config, arms, workdir, proxies)
      results.write_summary(workdir / "summary.csv", found)
      results.write_seeds(workdir / "seeds.parquet", found)
      return draw(found, facts)

  for wait in (
    False,
    True,
  ):  # first the arms on which no other process works; then those that killed processes left
    for i, (name, arm) in enumerate(arms.items(), 1):
      where, began = f"[{i}/{len(arms)}] {name:<26}", time.monotonic()
      with alone(workdir, f"arm-{name}", wait=wait) as mine:
        missing = missing_of(workdir, name, arm, wanted) if mine else []
        for part in (
          missing[n : n + config.lab.together] for n in range(0, len(missing), config.lab.together)
        ):
          add_to_table(workdir, name, arm, part)
      if missing:
        # programs that other arms share are in the compilation cache
        jax.clear_caches()
        text = conclude(lambda found, facts, name=name: report.line(config, found, name))
        print(f"{where} {len(missing)} runs, {time.monotonic() - began:.0f} s  {text}", flush=True)
      elif not wait:
        print(f"{where} {'done before' if mine else 'another process works on it'}", flush=True)
  print(conclude(lambda found, facts: report.write(config, found, facts, workdir)))


@contextlib.contextmanager
def alone(workdir: Path, what: str, *, wait: bool = True):
  """Holds a lock named `what` in the workdir. The lock is released if the process dies.

  Yields True; without `wait` it yields False, without the lock, if another process holds it.
  """
  path = workdir / "locks" / what
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
    else:
      yield True


def add_to_table(workdir: Path, name: str, arm, replicas: list[tuple[int, float]]) -> None:
  """Runs some replicas of an arm, and adds their rows to its rows in WORKDIR/table."""
  path = workdir / "table" / f"{name}.parquet"
  columns = run_arm(name, arm, replicas, workdir)
  if path.exists():
    columns = table.joined(table.read_table(path)[0], columns)
  table.write_table(path, columns, identity(arm))
  shutil.rmtree(partial_of(workdir, name, arm, replicas), ignore_errors=True)


def missing_of(workdir: Path, name: str, arm, wanted: list) -> list[tuple[int, float]]:
  """The (seed, factor) pairs of `wanted` that are missing in the table.

  Raises:
    ConfigError: the table has an arm of this name with other settings.
  """
  path = workdir / "table" / f"{name}.parquet"
  if not path.exists():
    return wanted
  columns, of = table.read_table(path)
  if of != identity(arm):
    raise ConfigError(
      f"config.lab.arms: {path} has {name!r} with other settings; give the new one another name, "
      f"such as {name}.new"
    )
  done = set(zip(columns["seed"].tolist(), columns["factor"].tolist()))
  return [pair for pair in wanted if pair not in done]


def partial_of(workdir: Path, name: str, arm, replicas: list) -> Path:
  return workdir / PARTIAL / f"{name}-{short(identity(arm), replicas)}"


def short(*parts) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def with_seed(config, seed: int):
  config = config.copy_and_resolve_references()
  config.seed = seed
  return config


# ---- before RL ----


def stage_name(stage: str, config) -> str:
  """A stage's name with a fingerprint of everything that determines its result, so that arms share
  equal stages.
  """
  read = json.loads(config.to_json())
  parts = {
    name: read[name] for name in ("dtype", "param_dtype", "remat", "logits_chunk", "rollout", "sft")
  }
  parts["arch"] = read["policy"]["arch"]
  if stage != "sft":  # the combination of heads does not change the heads
    parts["reward"] = {
      k: v for k, v in read["reward"].items() if k not in ("combine", "variance_weight")
    }
    if config.gold.formula:
      parts["formula"] = config.gold.formula
  if stage == "warm_start":
    parts["r2m"] = read["r2m"]
  if stage == "certificate":
    parts["tau"] = read["certify"]["tau"]
  return f"{stage}-{short(parts)}"


def fitted(workdir: Path, name: str, seeds, like, make) -> dict[int, object]:
  """{seed: result} of a stage. Missing results are computed together: make(seeds, scratch folder)
  -> [(result, facts)].

  Args:
    like: shapes, dtypes and shardings of one result.
  """
  kept = {
    seed: checkpoint.open_checkpoints(workdir / "stages" / name / f"seed_{seed}", last=1)
    for seed in seeds
  }
  with alone(workdir, name):
    missing = [seed for seed, checkpoints in kept.items() if checkpoint.newest(checkpoints) is None]
    if missing:
      began, scratch = time.monotonic(), workdir / PARTIAL / f"{name}-{short(missing)}"
      for seed, (result, facts) in zip(missing, make(missing, scratch)):
        checkpoint.save(kept[seed], 0, result, facts={"found": facts})
        checkpoint.wait(kept[seed])
      shutil.rmtree(scratch, ignore_errors=True)
      print(
        f"{name}: seeds {', '.join(map(str, missing))}, {time.monotonic() - began:.0f} s",
        flush=True,
      )
  return {seed: checkpoint.restore(checkpoints, like) for seed, checkpoints in kept.items()}


def starts_of(config, seeds, workdir: Path) -> tuple[Build, dict, dict, dict]:
  """The start of an arm's RL: (build of its program, {seed: policy}, {seed: reward model}, {seed:
  head} or None).
  """
  shared = program_of(config)
  built = build(shared, make_mesh((1, 1, 1), jax.devices()[:1]), vocab_size=goldtask.VOCAB_SIZE)
  configs, key = {seed: with_seed(config, seed) for seed in seeds}, jax.random.key(0)

  head_of = jax.jit(lambda key, *start: make_first_state(config, built)(key, *start).reward_head)

  def first_head(seed):
    return head_of(
      jax.random.key(seed), policies[seed], rewards[seed]["backbone"], rewards[seed]["phi"]
    )

  def fit_sft(missing, scratch):
    jobs = [sft_job(configs[seed], built) for seed in missing]
    return [(policy, {}) for policy in fit_together(jobs, built, scratch)]

  def fit_pairs(job_of, missing, scratch):
    models = fit_together([job_of(seed) for seed in missing], built, scratch)
    return [
      standardise(configs[seed], built, policies[seed], model)
      for seed, model in zip(missing, models)
    ]

  def fit_heads(missing, scratch):
    jobs = [head_job(configs[s], built, policies[s], rewards[s], first_head(s)) for s in missing]
    return [(head, {}) for head in fit_together(jobs, built, scratch)]

  policy_like = abstract(functools.partial(init_policy, config, built), built.mesh, key)
  policies = fitted(workdir, stage_name("sft", config), seeds, policy_like, fit_sft)
  reward_like = abstract(
    functools.partial(init_reward_model, config, built), built.mesh, policy_like, key
  )
  rewards = fitted(
    workdir,
    stage_name("reward", config),
    seeds,
    reward_like,
    functools.partial(fit_pairs, lambda seed: reward_job(configs[seed], built, policies[seed])),
  )
  start, heads = VARIANTS[config.variant].start if config.variant else "", None
  if start == "golden":

    def golden(seed):
      return golden_job(configs[seed], built, policies[seed], rewards[seed])

    rewards = fitted(
      workdir,
      stage_name("reward_golden", config),
      seeds,
      reward_like,
      functools.partial(fit_pairs, golden),
    )
  if start == "head":
    heads = fitted(
      workdir, stage_name("warm_start", config), seeds, shapes_of(first_head(seeds[0])), fit_heads
    )
  return built, policies, rewards, heads


def best_of_n(config, seeds, workdir: Path) -> None:
  """Best-of-n of the supervised policy by the proxy, a row for each seed and n:
  WORKDIR/best_of_n.parquet.
  """
  with alone(workdir, "best_of_n"):
    add_best_of_n(config, seeds, workdir)


def add_best_of_n(config, seeds, workdir: Path) -> None:
  path, lab = workdir / "best_of_n.parquet", config.lab
  columns = table.read_table(path)[0] if path.exists() else None
  missing = [seed for seed in seeds if columns is None or seed not in columns["seed"]]
  if not missing:
    return
  config.variant = "vanilla"
  built, policies, rewards, _ = starts_of(config, tuple(missing), workdir)
  groups = -(-lab.best_samples // BEST_GROUP)
  count = groups * BEST_GROUP
  members = scorer(built.defs.reward_backbone, built.defs.phi, built.mesh)
  sizes = [2**i for i in range(count.bit_length()) if 2**i <= count]
  for seed in missing:
    notes = goldtask.prompts(seed, STREAM_BEST, 0, lab.best_prompts)
    prompts = jax.tree.map(
      lambda x: np.repeat(x, groups, 0), notes
    )  # each with groups x BEST_GROUP samples
    prompts = prompts.replace(
      example_id=np.arange(len(prompts.tokens), dtype=np.int32) + STREAM_BEST * 2**24
    )
    drawn = sample(
      with_seed(config, seed),
      built,
      policies[seed],
      prompts,
      group_size=BEST_GROUP,
      purpose=KEY_PROBE,
    )

    def rows(x):
      return [x[i : i + 1024] for i in range(0, len(x), 1024)]

    scores = np.concatenate(
      [
        combine(members(rewards[seed], *part), config.reward.combine, config.reward.variance_weight)
        for part in zip(rows(drawn.tokens), rows(drawn.token_mask))
      ]
    )
    proxy, gold = (
      np.asarray(x, float).reshape(-1, count)
      for x in (scores, goldtask.gold(drawn, config.gold.formula).gold)
    )

    def mean(values, n):
      return np.mean([stats.best_of(*pair, n) for pair in zip(proxy, values)])

    new = {"seed": np.full(len(sizes), seed), "n": np.array(sizes), "kl": stats.best_of_kl(sizes)}
    new |= {
      name: np.array([mean(x, n) for n in sizes]) for name, x in (("gold", gold), ("proxy", proxy))
    }
    columns = new if columns is None else table.joined(columns, new)
  table.write_table(path, columns)


# ---- RL ----


def certificates_of(config, built: Build, policies, rewards, workdir: Path) -> dict | None:
  """{seed: `goldtask.stages.certificate`}; None if no advantage is certified."""
  if not config.certify.share:
    return None

  def make(missing, scratch):
    configs = {seed: with_seed(config, seed) for seed in missing}
    found = [certificate(configs[s], built, policies[s], rewards[s]) for s in missing]
    return [(matrix, {}) for matrix in found]

  size = built.reward_arch.embedding_size
  like = abstract(lambda: {"root": jnp.zeros((size, size))}, built.mesh)
  return fitted(workdir, stage_name("certificate", config), list(policies), like, make)


def first_states(config, built: Build, mesh, replicas, policies, rewards, heads, certificates=None):
  """The first TrainState of every replica, stacked and distributed over the mesh."""
  seeds = [seed for seed, _ in replicas]

  def stacked(values):
    return spread(stack([values[seed] for seed in seeds]), mesh)

  reward = stacked(rewards)
  make, keys = make_first_state(config, built), {seed: jax.random.key(seed) for seed in seeds}
  state = together(make, mesh)(stacked(keys), stacked(policies), reward["backbone"], reward["phi"])
  if heads:
    state = warm(state, stacked(heads))
  if certificates:
    state = state.replace(certificate=stacked(certificates)["root"])
  factors = spread(jnp.asarray([factor for _, factor in replicas], state.beta.dtype), mesh)
  return state.replace(beta=state.beta * factors)


def make_together_step(config, built: Build, mesh, configs: list):
  """`step(states, prompts, number) -> (states, outputs)` of all replicas, each with its own
  config's labels.
  """
  program, arm = program_of(config), shared_arm(config)
  if not uses_labels(config):
    whole = make_arm_step(built.defs, program, built.mesh)
    whole, arms = together(whole, mesh, donate=(0,)), arm and stack([arm] * len(configs))
    return lambda states, prompts, number: whole(states, prompts, arms)
  labellers = [gold_labeller(one) for one in configs]
  rollout = make_rollout(built.defs, program, built.mesh, (goldtask.EOS,), goldtask.PAD)
  learn = make_learn(built.defs, program, built.mesh)
  rollout, learn = together(rollout, mesh), together(learn, mesh, donate=(0,))

  def labelled(states, prompts, number):
    drawn = rollout(states, prompts)
    on_host = jax.device_get(drawn.samples)
    pairs = stack([label(pick(on_host, i), number) for i, label in enumerate(labellers)])
    return learn(states, drawn, None, pairs)

  return labelled


def make_probe(config, built: Build, mesh):
  """Builds `(fix, probe)`: fixed responses of the initial policy, and the effect of feedback on the
  scores of responses.

  fix(state, prompts) -> Sequences. probe(state, first head, fixed, samples of the step) -> f32
  metrics:

    drift/fixed_states      mean change of the fixed responses' score by the first head at omega's floor, as the
                            policy's states replace the reference's; nothing else differs
    drift/fixed_states_std  its standard deviation over the responses; a common change affects no advantage
    drift/fixed_score       mean total change of their score since the start: head, omega and states
    drift/own_states        mean score of the step's own samples by the current head with the policy's states, minus
                            the score with the reference's states over the same tokens: the policy's gain
                            through its own states
  """
  score_of = make_scores(config, built)
  settings = dict(
    group_size=1,
    max_new_tokens=config.rollout.max_new_tokens,
    eos_ids=(goldtask.EOS,),
    pad_id=goldtask.PAD,
    **sampling(config),
  )

  def fix(state, prompts):
    key = jax.random.fold_in(state.key, KEY_PROBE)
    return generate(built.defs.open_policy(state.policy, state.ref), prompts, key, 0, **settings)

  def probe(state, first_head, fixed, samples):
    head = state.reward_head if state.reward_average is None else state.reward_average
    w = jnp.asarray(config.r2m.omega_min, state.omega.dtype)
    before, now = (
      score_of(state, fixed, first_head, w, feedback).scores for feedback in (False, True)
    )
    today, own, own_ref = (
      score_of(state, *of)
      for of in (
        (fixed, head, None, True),
        (samples, head, None, True),
        (samples, head, None, False),
      )
    )
    return {
      "drift/fixed_states": (now - before).mean(),
      "drift/fixed_states_std": (now - before).std(),
      "drift/fixed_score": (today.scores - today.scores_frozen).mean(),
      "drift/own_states": (own.scores - own_ref.scores).mean(),
    }

  return together(fix, mesh), together(probe, mesh)


def make_scores(config, built: Build):
  """Builds `score_of(state, sequences, head, w, feedback) -> Judged`: responses as a reward head
  scores them.

  With `feedback` the head reads the policy's states, otherwise the reference's. `w` is omega; None:
  its value at the state's step.
  """
  read, omega_at = make_read(config), make_omega(config)
  annotate = make_annotate(built.defs, config)
  reading = sampling(config) | dict(layer=config.r2m.feedback_layer, chunk=0)

  def score_of(state, sequences, head, w, feedback):
    policy, ref = built.defs.open_policy(state.policy, state.ref), built.defs.open_ref(state.ref)
    old, of_ref = (read_feedback(model, sequences, **reading) for model in (policy, ref))
    if w is None:
      w = omega_at(state.step, measured_kl(*read(policy, ref, sequences), sequences))
    given = state.replace(reward_head=head, reward_average=None)
    judged, _ = annotate(given, w, Rollout(sequences), old if feedback else of_ref, of_ref)
    return judged

  return score_of


def make_drift(config, built: Build, mesh, states, configs: list):
  """Builds `drift(states, t, samples)`: the metrics of `make_probe` of every replica at the steps
  at which they are measured; {} at other steps and for variants without feedback.

  Args:
    states: the first TrainState of every replica; the step may donate it.
  """
  if not VARIANTS[config.variant].feedback:
    return lambda states, t, samples: {}
  fix, probe = make_probe(program_of(config), built, mesh)
  count = config.lab.probe_prompts
  fixed = fix(
    states, stack([goldtask.prompts(one.seed, STREAM_PROBE, 0, count) for one in configs])
  )
  first_head = jax.tree.map(jnp.copy, states.reward_head)

  def drift(states, t, samples):
    if t % config.lab.probe_every:
      return {}
    return jax.device_get(probe(states, first_head, fixed, samples))

  return drift


def rows_of(config, out, drift: dict, count: int) -> list[dict]:
  """The metrics of one step, a dict for each of `count` replicas; `out` is on the host."""
  rows = []
  for i in range(count):
    one = pick(out, i)
    own = {key: value for key, value in one.metrics.items() if measured(key, config.variant)}
    gold = gold_metrics(one, config.rollout.group_size, config.gold.formula)
    rows.append(own | gold | pick(drift, i))
  return rows


def check_first_step(config, built: Build, states, out, rows: list[dict]) -> None:
  """The identities of step 0, on the worst value over the replicas."""
  own = [key for key in out.metrics if measured(key, config.variant)]
  rounding = sample_rounding(built.defs, config, pick(states.ref, 0), pick(out.sequences, 0))
  check_step_zero({key: max(row[key] for row in rows) for key in own}, rounding, config)


def run_arm(name: str, config, replicas: list[tuple[int, float]], workdir: Path) -> dict:
  """Runs all replicas of an arm, resuming if necessary; returns their rows as columns."""
  folder = partial_of(workdir, name, config, replicas)
  write_atomic(folder / "config.json", config.to_json())
  train(run_of(name, config, replicas, workdir), folder)
  rows = read_metrics(folder)
  names = [key.removeprefix("0/") for key in rows[0] if key.startswith("0/")]
  log = [
    [[row.get(f"{i}/{key}", np.nan) for key in names] for i in range(len(replicas))] for row in rows
  ]
  betas = [(*replica, config.kl.beta * replica[1]) for replica in replicas]
  return table.arm_columns(name, betas, names, np.array(log, np.float32))


def run_of(name: str, config, replicas: list[tuple[int, float]], workdir: Path) -> Run:
  """The Run of all replicas of an arm at once. Its state is their stacked states. Replica i logs
  its metrics as "i/METRIC".
  """
  config, seeds = with_seed(config, config.seed), [seed for seed, _ in replicas]
  config.checkpoint.keep_best = 0  # there is no best step for all replicas
  built, policies, rewards, heads = starts_of(config, tuple(dict.fromkeys(seeds)), workdir)
  mesh, configs = seeds_mesh(len(replicas)), [with_seed(config, seed) for seed in seeds]
  certificates = certificates_of(config, built, policies, rewards, workdir)
  begun = first_states(config, built, mesh, replicas, policies, rewards, heads, certificates)
  drift = make_drift(config, built, mesh, begun, configs)

  def steps(states):
    start = int(states.step[0])
    batches = ((stack([rl_prompts(one, t) for one in configs]), t) for t in itertools.count(start))
    return Steps(batches, make_together_step(config, built, mesh, configs), measure)

  def measure(t: int, states, out, batch):
    rows = rows_of(config, out, drift(states, t, out.sequences), len(replicas))
    if t == 0:
      check_first_step(config, built, states, out, rows)
    # in float32, which metrics.jsonl stores exactly
    logged = {
      f"{i}/{key}": np.float32(np.nan if value is None else value)
      for i, row in enumerate(rows)
      for key, value in row.items()
    }
    return logged, dict(gold=np.mean([row["reward/gold"] for row in rows]))

  def ready(states=begun):
    return states  # `first_states` has inserted the fitted heads

  return Run(
    config, built, first=ready, warm=ready, steps=steps, name=name, shown=False, costed=False
  )

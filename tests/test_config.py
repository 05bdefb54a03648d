"""Refused configs and their messages; mistakes on the command line, before any device is used."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from configs import default, quickstart
from r2m_jax import config as config_module
from r2m_jax.algorithm.objective import kl_estimator
from r2m_jax.config import (
  ConfigError,
  check_batch,
  check_config,
  check_fields,
  difference,
  identity,
)
from r2m_jax.knobs import KNOBS, Knob, document, make_config, walk
from r2m_jax.run import command_line

ROOT = pathlib.Path(__file__).parents[1]


def config_with(**changes):
  """The default config with dotted fields set, dots written as two underscores."""
  config = default.get_config()
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  return config


REFUSALS = [  # field, value, the fix
  ("task", "rl", "'sft', 'reward', 'r2m'"),
  ("algorithm", "reinforse", "choose one of 'rloo', 'grpo'"),
  ("variant", "r2n", "'vanilla', 'r2m', .*'iterative_head'"),
  ("arms", ("vanilla", "r2n"), "choose from vanilla, r2m, "),
  ("arms", ("r2m", "r2m"), "once"),
  ("arms", (), "choose from"),
  ("data.name", "x.jsonl", "give the models that train on it, config.policy.path"),
  ("packing", (0.5,), "ascending shares above 0, the last one 1"),
  ("dtype", "float16", "'float32', 'bfloat16'"),
  ("remat", "some", "'none', 'full', 'dots'"),
  ("ppo.aggregation", "mean", "'sequence_sum', 'sequence_mean', 'token_mean', 'constant'"),
  ("kl.estimator", "k1", "in the loss the expected gradient of k1 is zero.*kl.placement='reward'"),
  ("kl.estimator", "k4", "'k1', 'k2', 'k3', 'exact'"),
  ("steps", 0, "at least 1"),
  ("rollout.prompts", 0, "at least 1"),
  ("rollout.group_size", 1, "K >= 2 responses per prompt"),
  ("rollout.max_new_tokens", 0, "at least 1"),
  ("rollout.temperature", 0.0, "above 0"),
  ("r2m.omega_min", 1.5, r"in \[0, 1\]"),
  ("r2m.omega_min", -0.1, r"in \[0, 1\]"),
  ("r2m.omega_min", float("nan"), r"in \[0, 1\]"),
  ("r2m.alpha", 1.01, r"in \[0, 1\]"),
  ("r2m.gre_eps", 0.0, "above 0"),
  ("r2m.attention_scale", 0.0, "above 0"),
  ("r2m.label_confidence", 1.0, r"in \[0, 1\)"),
  ("certify.share", 1.0, r"in \[0, 1\)"),
  ("certify.tau", 0.0, r"above 0"),
  ("r2m.label_temperature", 0.0, "above 0"),
  ("kl.damping", -1.0, "at least 0"),
  ("r2m.num_heads", 3, r"divide r2m.attention_dim = 64"),
  ("r2m.feedback_layer", 2, "2 layers"),
  ("r2m.feedback_layer", -3, "2 layers"),
  ("ppo.clip_eps", 1.0, r"such as 0.2"),
  ("ppo.advantage_eps", 0.0, "above 0"),
  ("kl.beta", -0.1, "at least 0"),
  ("seed", -1, "at least 0"),
  ("seeds", 0, "at least 1"),
  ("seeds", 2**32 + 1, "the last seed must be below"),
  ("policy.lr", -1.0, "at least 0"),
  ("policy.lr", float("inf"), "finite"),
  ("checkpoint.keep_last", 0, "at least 1"),
  ("checkpoint.best_mode", "most", "'max', 'min'"),
  ("guard.max_skipped", 0, "at least 1"),
  ("guard.spike", 1.0, "above 1, such as 10"),
  ("replay.step", -1, "at least 0"),
  ("sft.b2", 1.0, r"in \[0, 1\)"),
  ("reward.optimizer", "adam", "'adamw', 'sgd'"),
  ("policy.moment_dtype", "float16", "'float32', 'bfloat16'"),
  ("r2m.lr_schedule", "exponential", "'constant', 'linear', 'cosine'"),
  ("reward.label_flip", 2.0, r"in \[0, 1\]"),
  ("sft.batch_size", 99999, "not exceed sft.examples"),
  ("mesh", (-1, -1, 1), r"at most one of them -1, such as \(-1, 1, 1\)"),
  ("mesh", (0, 1, 1), "three sizes"),
  ("mesh", (8, 1), "three sizes"),
]


@pytest.mark.parametrize(
  "field, value, fix", REFUSALS, ids=[f"{field}={value}" for field, value, _ in REFUSALS]
)
def test_refusals_name_field_value_and_fix(field, value, fix):
  config = default.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError) as refusal:
    check_config(config)
  assert re.match(rf"config\.{re.escape(field)} is {re.escape(repr(value))}: ", str(refusal.value))
  assert re.search(fix, str(refusal.value)), refusal.value


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      dict(mesh=(3, 1, 1)),
      r"config.rollout.prompts is 16, .* 3 data x fsdp shards of config.mesh = \(3, 1, 1\): .* 18",
    ),
    (
      dict(mesh=(2, 8, 1), reward__batch_size=24),
      r"config.reward.batch_size is 24, .* 16 .* multiple of 16, such as 32",
    ),
    (dict(mesh=(4, 1, 2), sft__batch_size=6), r"config.sft.batch_size is 6, .* 4 .* such as 8"),
    (
      dict(ppo__minibatches=3),
      r"config.ppo.minibatches is 3: 128 trajectories .* use a divisor of 128",
    ),
    (
      dict(ppo__minibatches=64, mesh=(4, 1, 1)),
      r"config.ppo.minibatches is 64: 128 .* 4 data x fsdp .* divisor of 32",
    ),
    (
      dict(ppo__minibatches=2, ppo__accumulation=3),
      r"config.ppo.accumulation is 3: the 64 .* divisor of 64",
    ),
    (
      dict(ppo__accumulation=16, mesh=(16, 1, 1)),
      r"config.ppo.accumulation is 16: the 128 .* over 16 .* divisor of 8",
    ),
    (
      dict(r2m__labels="preference", r2m__label_confidence=0.8),
      r"config.r2m.label_confidence is 0.8: give 0: .* labels itself are filtered",
    ),
    (
      dict(certify__share=0.4, variant="r2m"),
      r"config.certify.share is 0.4: variant 'r2m' does not use the frozen reward alone",
    ),
    (
      dict(certify__share=0.4, variant="vanilla", algorithm="remax"),
      r"config.algorithm is 'remax': certified advantages need 'rloo' or 'grpo'",
    ),
    (
      dict(certify__share=0.4, variant="vanilla", shaping__clip=1.0),
      r"config.shaping.clip is 1.0: certified advantages need 0",
    ),
    (
      dict(certify__share=0.4, variant="vanilla", policy__path="folder"),
      r"config.certify.share is 0.4: the pairs of a reward model .* leave out policy.path",
    ),
    (dict(rollout__waves=3), r"config.rollout.waves is 3: 16 prompts .* use a divisor of 16"),
    (
      dict(rollout__waves=8, mesh=(2, 2, 1)),
      r"config.rollout.waves is 8: 16 prompts .* over 4 data x fsdp .* of 4",
    ),
    (
      dict(policy__arch__num_kv_heads=3),
      r"config.policy.arch: .*num_kv_heads=3: must divide num_heads=4",
    ),
    (dict(policy__arch__norm="batch"), r"config.policy.arch: .*norm='batch': use 'rms' or 'layer'"),
    (
      dict(policy__arch__num_layers=0),
      r"config.policy.arch: .*num_layers=0: give a positive integer",
    ),
  ],
)
def test_refusals_of_values_that_do_not_fit_together(changes, words):
  with pytest.raises(ConfigError, match=words):
    check_config(config_with(**changes))


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(rollout__group_size=2),
    dict(r2m__omega_min=0.0),
    dict(r2m__omega_min=1.0),
    dict(r2m__alpha=0.0),
    dict(r2m__num_heads=4),
    dict(r2m__feedback_layer=-2),
    dict(r2m__feedback_layer=1),
    dict(ppo__minibatches=128),
    dict(ppo__minibatches=2, ppo__accumulation=64),
    dict(rollout__waves=16),
    dict(rollout__waves=4, mesh=(2, 2, 1)),
    dict(mesh=(-1, 1, 1), rollout__prompts=3),
    dict(mesh=(2, 2, 2)),
    dict(mesh=(1, 1, 3)),
    dict(kl__beta=0.0),
    dict(variant=""),
    dict(seed=0),
    dict(lab__seeds=(7,)),
    dict(policy__max_grad_norm=0.0),
  ],
)
def test_the_values_next_to_the_limits_pass(changes):
  check_config(config_with(**changes))


def test_docs_config_is_up_to_date():
  """If this fails: python -m r2m_jax.knobs > docs/config.md"""
  assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == document()


def test_every_knob_is_documented_and_its_default_keeps_its_rules():
  for field, knob in walk(KNOBS):
    if isinstance(knob, Knob):
      assert knob.about, field
      assert [rule.bound for rule in knob.rules if not rule.holds(knob.default)] == [], field
      assert all(rule.bound for rule in knob.rules), field
      assert f"| `{field}` |" in document()


def test_the_rules_of_the_laboratory_hold_for_its_tasks_only():
  check_config(config_with(lab__seeds=()))
  with pytest.raises(ConfigError, match=r"^config.lab.seeds is \(\): give whole numbers from 0 on"):
    check_config(config_with(lab__seeds=(), task="lab"))
  with pytest.raises(
    ConfigError, match=r"^config.lab.seeds is \(0, 4294967296\): .* below 2\*\*32"
  ):
    check_config(config_with(lab__seeds=(0, 2**32), task="lab"))


@pytest.mark.parametrize("size", ["", "test"])
def test_quickstart_passes(size):
  check_config(quickstart.get_config(size))


def test_check_batch_knows_the_real_mesh():
  """-1 is replaced once the devices are known, with the same messages."""
  config = config_with(mesh=(-1, 1, 1))
  check_config(config)
  check_batch(config, (8, 1, 1))
  with pytest.raises(ConfigError, match="config.rollout.prompts is 16.* 3 data x fsdp"):
    check_batch(config, (3, 1, 1))


@pytest.mark.parametrize(
  "given, meant",
  [
    ("r2m.omega_mn", "r2m.omega_min"),
    ("omega_min", "r2m.omega_min"),
    ("temperature", "rollout.temperature"),
    ("steps.x", "steps"),
    ("rolout.prompts", "rollout.prompts"),
    ("policy.arch.nun_heads", "policy.arch.num_heads"),
  ],
)
def test_a_mistyped_field_is_answered_with_the_nearest_one(given, meant):
  with pytest.raises(
    ConfigError, match=rf"^config\.{given} does not exist; did you mean config\.{meant}\?$"
  ):
    check_fields(default.get_config(), ["steps", "r2m", "policy.arch.norm", given])


def test_a_field_like_no_other_is_answered_with_the_sections():
  with pytest.raises(ConfigError, match="config.zzz does not exist; choose from .*r2m.*"):
    check_fields(default.get_config(), ["zzz"])


def test_difference_lists_what_changed():
  old, new = default.get_config().to_dict(), config_with(r2m__alpha=0.5, steps=3).to_dict()
  del new["seed"]
  lines = ["config.r2m.alpha: 0.3 -> 0.5", "config.seed: 0 -> '(absent)'", "config.steps: 120 -> 3"]
  assert difference(old, new) == lines
  assert difference(old, default.get_config().to_dict()) == []


def test_kl_estimator_by_vocabulary():
  assert [kl_estimator(config_with(), v) for v in (64, 1024, 1025)] == ["exact", "exact", "k2"]
  assert kl_estimator(config_with(kl__estimator="k2"), 64) == "k2"
  assert kl_estimator(config_with(kl__estimator="exact"), 128000) == "exact"


# ---- the command line ----

NO_PLATFORM = "no_such_platform"  # jax raises as soon as anything asks for a device
MAIN = ["-m", "r2m_jax.main", "--config=configs/quickstart.py:test", "--workdir=unused"]
CONTROL = """
import jax
from r2m_jax.configs import quickstart
from r2m_jax.config import check_config
check_config(quickstart.get_config())
print("checked")
jax.devices()
"""
COMMANDS = {
  "key": [*MAIN, "--config.r2m.omega_mn=0.7"],
  "type": [*MAIN, "--config.steps=abc"],
  "value": [*MAIN, "--config.rollout.group_size=1"],
  "file": ["-m", "r2m_jax.main", "--config=configs/none.py", "--workdir=unused"],
  "control": ["-c", CONTROL],
}
ANSWERS = {
  "key": "config.r2m.omega_mn does not exist; did you mean config.r2m.omega_min?",
  "type": "config.steps is 'abc': must be of type int, such as 4",
  "value": "config.rollout.group_size is 1: R2M compares K >= 2 responses per prompt",
  "file": f"--config is configs/none.py: there is no such file from {ROOT}",
}


@pytest.fixture(scope="module")
def answers():
  """(exit status, stdout, stderr) of every command; they run side by side."""
  env = os.environ | {"JAX_PLATFORMS": NO_PLATFORM}
  settings = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  running = {
    name: subprocess.Popen([sys.executable, *args], **settings) for name, args in COMMANDS.items()
  }
  try:
    texts = {name: process.communicate(timeout=300) for name, process in running.items()}
  finally:
    for process in running.values():
      process.kill()
  return {name: (process.returncode, *texts[name]) for name, process in running.items()}


def test_touching_a_device_would_be_seen(answers):
  """Shows that the checks below can fail."""
  status, out, err = answers["control"]
  assert out.strip() == "checked"  # and check_config itself used no device
  assert status != 0 and NO_PLATFORM in err


@pytest.mark.parametrize("name", ANSWERS)
def test_a_mistake_on_the_command_line_is_one_line(answers, name):
  status, out, err = answers[name]
  assert err == f"error: {ANSWERS[name]}\n"
  assert out == "" and status == 2
  assert not (ROOT / "unused").exists()


@pytest.mark.parametrize(
  "argv, error, answer",
  [
    ([], ValueError(), "--config is missing; give one, such as --config=quickstart"),
    (
      ["--config.steps=3"],
      ValueError(),
      "--config is missing; give one, such as --config=quickstart",
    ),
    (
      ["--config", "configs/quickstart.py"],
      ValueError(),
      "--workdir is missing; give one, such as --workdir=runs/mine",
    ),
    (
      ["--config=configs/quickstart.py:big", "--workdir=x"],
      ValueError(),
      "size 'big' is unknown; use quickstart or quickstart:test",
    ),
    (
      ["--config=configs/quickstart.py", "--workdir=x", "--config.log=3"],
      flags.IllegalFlagValueError("flag --config.log=3: Failed to parse '3' as a ConfigDict"),
      "config.log is a section: set one of config.log.checkpoint_every, "
      "config.log.peak_flops, config.log.profile, config.log.samples, config.log.to",
    ),
    (
      ["--config", "configs/quickstart.py", "--workdir", "x", "--noconfig.ppo.whiten"],
      KeyError(),
      "config.ppo.whiten does not exist; did you mean config.ppo.whiten_advantages?",
    ),
    (
      ["--config=configs/quickstart.py", "--workdir=x", "--workdr=y"],
      flags.Error("Unknown flag\n'workdr'"),
      "Unknown flag 'workdr'",
    ),
    (
      ["--config=configs/quickstart.py", "--workdir=x"],
      KeyError("inside the config file"),
      None,
    ),  # keeps its traceback
  ],
)
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads a file in this way
def test_other_mistakes(monkeypatch, argv, error, answer):
  monkeypatch.chdir(ROOT)
  assert command_line.command_line_mistake(["main.py", *argv], error) == answer


def test_what_only_memory_depends_on_is_no_part_of_a_run_s_identity():
  same = dict(ppo__accumulation=4, rollout__waves=2, remat="full", logits_chunk=64, mesh=(2, 1, 1))
  assert identity(config_with(**same)) == identity(default.get_config())
  for changes in (dict(ppo__minibatches=4), dict(rollout__temperature=0.5), dict(r2m__alpha=0.5)):
    assert identity(config_with(**changes)) != identity(default.get_config())


def test_settings_that_a_later_version_adds_leave_a_run_s_identity(monkeypatch):
  mine = config_with(kl__beta=0.5)
  now = identity(mine)
  parts = {name: part for name, part in KNOBS.parts.items() if name != "notes"}
  parts["reward"] = parts["reward"]._replace(
    parts={name: part for name, part in parts["reward"].parts.items() if name != "contrast"}
  )
  monkeypatch.setattr(config_module, "KNOBS", KNOBS._replace(parts=parts))
  older = make_config(parts)
  older.kl.beta = 0.5
  assert "notes" not in older and "contrast" not in older.reward
  assert identity(older) == now

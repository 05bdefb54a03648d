"""Faults from outside: rows and models that change during a run, names that lead outside a folder,
secrets, closed pipes.
"""

import gzip
import io
import json
import os
import pathlib
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import tiny_text
from test_folders import small as folder_run

from benchmarks import kill_resume
from configs import default, quickstart
from r2m_jax.algorithm.optim import descend
from r2m_jax.config import ConfigError, check_config, redact
from r2m_jax.data import datasets
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.rows import load
from r2m_jax.hf.folders import FolderError, load_policy, load_reward
from r2m_jax.parallel.sharding import make_mesh
from r2m_jax.run import checkpoint, loop, process, progress, workdir
from r2m_jax.run import files as run_files
from r2m_jax.run.lock import LOCK
from r2m_jax.tasks import export
from r2m_jax.tasks import folders as folders_task

PROMPTS = [
  "The cat sat on",
  "What is the sea?",
  "rain",
  "The dog ran",
  "a poem about rain",
  "the mat",
  "Paris",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  tiny_text.model("qwen2", "chatml", root / "policy")
  tiny_text.model("llama3.1", "llama3", root / "reward", classifier=True, hidden_size=48)
  return root


def shards(folder: pathlib.Path, rows) -> list[pathlib.Path]:
  """The rows in three files, the last one compressed."""
  folder.mkdir(parents=True)
  paths = [folder / f"part-{i}.jsonl{'.gz' if i == 2 else ''}" for i in range(3)]
  for i, path in enumerate(paths):
    text = "".join(json.dumps(row) + "\n" for row in rows[i::3]).encode()
    path.write_bytes(gzip.compress(text) if i == 2 else text)
  return paths


def files(folder: pathlib.Path) -> dict:
  """All files in a workdir except its lock, which has the start time of the current run."""
  found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != LOCK]
  return {p.relative_to(folder): p.read_bytes() for p in found}


# ---- rows that change during a run ----


def cut(path):
  os.truncate(path, path.stat().st_size // 2)


def replace(path):
  text = b'{"prompt": "another prompt"}\n' * 3
  path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def garbage(path):
  path.write_bytes(b"\x1f\x8b\x08\x00 not what was written \xff\xfe")


def folder_in_its_place(path):
  path.unlink()
  path.mkdir()


HARMS = [  # a change of a shard, and the message of the resumed command
  (0, pathlib.Path.unlink, "part-0.jsonl gave 3 rows then, no now"),
  (0, cut, "6 rows read, 1 bad; 1 cut off, first .*part-0.jsonl:2"),
  (1, cut, "part-1.jsonl gave 2 rows then, 1 now"),  # exactly at the end of a line
  (1, replace, "part-1.jsonl gave 2 rows then, 3 now"),
  (2, cut, "1 bad|not a complete gzip file"),
  (2, garbage, "part-2.jsonl.gz is not a complete gzip file"),
  (1, folder_in_its_place, "part-1.jsonl gave 2 rows then, no now"),
]


def test_a_shard_that_is_lost_in_mid_run(folders, tmp_path, monkeypatch):
  """If it disappears during the run, the result is unaffected. If it is missing at the next start,
  the run is refused until it is repaired.
  """
  paths = shards(tmp_path / "rows", [{"prompt": p} for p in PROMPTS])
  kept = {path: path.read_bytes() for path in paths}
  cfg = folder_run(
    folders,
    tmp_path,
    data__name=str(tmp_path / "rows"),
    steps=3,
    log__checkpoint_every=1,
    export__check=False,
    rollout__prompts=3,
    data__max_bad_share=0.1,
  )
  whole, broken, original = tmp_path / "whole", tmp_path / "broken", folders_task.batch_of
  folders_task.run(cfg, whole)
  asked = []

  def lose_the_shards(*args):
    asked.append(args)
    if len(asked) == 1:
      for path in paths:
        path.unlink()
    if len(asked) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

  monkeypatch.setattr(folders_task, "batch_of", lose_the_shards)
  with pytest.raises(loop.Interrupted), loop.signals_end_the_run():
    folders_task.run(cfg, broken)
  monkeypatch.undo()
  assert checkpoint.newest(checkpoint.open_checkpoints(broken / "checkpoints/r2m")) == 2
  before = files(broken)
  for number, harm, message in HARMS:
    for path, data in kept.items():
      path.write_bytes(data)
    harm(paths[number])
    with pytest.raises((ConfigError, DataError), match=message) as refused:
      folders_task.run(cfg, broken)
    assert "\n" not in str(refused.value) and files(broken) == before, harm
    shutil.rmtree(paths[number]) if paths[number].is_dir() else paths[number].unlink(
      missing_ok=True
    )
  for path, data in kept.items():
    path.write_bytes(data)
  folders_task.run(cfg, broken)
  assert kill_resume.arrays(broken, 3) == kill_resume.arrays(whole, 3)
  assert kill_resume.rows(broken) == kill_resume.rows(whole) and len(kill_resume.rows(whole)) == 3
  assert (
    files(broken / "export/policy")[pathlib.Path("model.safetensors")]
    == files(whole / "export/policy")[pathlib.Path("model.safetensors")]
  )


def test_every_stage_is_held_to_its_rows(folders, tmp_path):
  """SFT, packed lines, pairs and judgments: one row of one file is changed, and the error names the
  file.
  """
  rows = [{"prompt": p, "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate(PROMPTS)]
  paths = shards(tmp_path / "rows", rows)
  cfg = folder_run(folders, tmp_path, data__name=str(tmp_path / "rows"), sft__batch_size=2)
  cfg.r2m.judgments = cfg.data.name
  cfg.data.max_prompt_length = cfg.data.max_response_length = 10
  policy, reward = load_policy(cfg.policy.path, cfg), load_reward(cfg.reward.path, cfg)
  stages = {
    "sft": lambda: datasets.sft_rows(cfg, policy.tokenizer, tmp_path, "sft"),
    "lm": lambda: datasets.packed_lines(cfg, policy.tokenizer, tmp_path, "lm"),
    "reward": lambda: datasets.pairs(cfg, reward.renderer, tmp_path),
    "judgments": lambda: datasets.judged_pairs(cfg, policy.tokenizer, reward.renderer, tmp_path),
  }
  for make in (*stages.values(), *stages.values()):
    make()
  kept, data = files(tmp_path), paths[1].read_bytes()
  assert {f"data_{name}.json" for name in stages} <= {str(name) for name in kept}
  paths[1].write_bytes(data.replace(b"yes", b"yet", 1))
  for name, make in stages.items():
    with pytest.raises(ConfigError, match=r"part-1.jsonl gave \d rows then, others now"):
      make()
  paths[1].write_bytes(data)
  for make in stages.values():
    make()
  assert files(tmp_path) == kept


# ---- models that change during a run ----


def test_an_adapters_base_is_held_to_its_weights(folders, tmp_path):
  """The reference is the base of the adapters. A folder with other weights under the same name is
  refused, then repaired.
  """
  shutil.copytree(folders / "policy", tmp_path / "base")
  rows = shards(tmp_path / "rows", [{"prompt": p} for p in PROMPTS])
  cfg = folder_run(
    folders,
    tmp_path,
    policy__path=str(tmp_path / "base"),
    data__name=str(rows[0]),
    steps=1,
    lora__rank=2,
    lora__export="peft",
    export__check=False,
  )
  folders_task.run(cfg, tmp_path / "run")
  answers = [{"prompt": p, "response": "yes"} for p in PROMPTS]
  sft = folder_run(
    folders,
    tmp_path,
    task="sft",
    policy__path=str(tmp_path / "base"),
    lora__rank=2,
    sft__steps=1,
    export__check=False,
    data__name=str(shards(tmp_path / "answers", answers)[0]),
    sft__batch_size=3,
  )
  folders_task.run(sft, tmp_path / "sft")
  before, good = (
    [files(tmp_path / name) for name in ("run", "sft")],
    (tmp_path / "base/model.safetensors").read_bytes(),
  )
  tiny_text.model("qwen2", "chatml", tmp_path / "base", seed=1)
  exports = default.get_config()
  for place, command in (
    ("run/checkpoints/r2m/1", lambda: folders_task.run(cfg, tmp_path / "run")),
    ("sft/stages/sft/0", lambda: folders_task.run(sft, tmp_path / "sft")),
  ):
    with pytest.raises(
      checkpoint.CheckpointError, match=f"{place} is of other models than this run's"
    ):
      command()
  for name in ("run", "sft"):
    exports.export.checkpoint, exports.export.out = str(tmp_path / name), str(tmp_path / "out")
    with pytest.raises(checkpoint.CheckpointError, match="is of other models than this run's"):
      export.run(exports)
  assert [files(tmp_path / name) for name in ("run", "sft")] == before and not (
    tmp_path / "out"
  ).exists()
  (tmp_path / "base/model.safetensors").write_bytes(good)
  folders_task.run(cfg, tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8"])
def test_a_fingerprint_is_that_of_the_bits(dtype):
  with jax.enable_x64(dtype == "float64"):
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(dtype) * 5

    def on(x, *spec):
      return jax.device_put(x, jax.NamedSharding(make_mesh((2, 2, 2)), jax.P(*spec)))

    want = checkpoint.fingerprint({"a": jnp.asarray(x)})
    for spec in (("data", "fsdp"), ("tensor",), ()):
      assert checkpoint.fingerprint({"a": on(x, *spec)}) == want
    flipped, swapped = x.copy(), x.copy()
    flipped.view(np.uint8).flat[77] ^= 1
    swapped[[3, 4]] = swapped[[4, 3]]
    others = [
      {"a": flipped},
      {"a": swapped},
      {"a": x.reshape(24, 16)},
      {"b": x},
      {"a": x, "b": x[:0]},
    ]
    found = {checkpoint.fingerprint(jax.tree.map(jnp.asarray, other)) for other in others}
    assert len(found) == len(others) and want not in found


# ---- forks ----


def test_a_fork_takes_what_was_trained_and_finds_the_rest_anew(tmp_path):
  old, config = tmp_path / "old", quickstart.get_config("test")
  old.mkdir()
  run_files.write_atomic(old / "config.json", config.to_json())
  for name in (
    "metrics.jsonl",
    "samples.jsonl",
    "budgets.json",
    "data_r2m.json",
    "tables.json",
    "stages.json",
  ):
    run_files.write_atomic(old / name, "{}\n")

  def fork(to, **changes):
    workdir.require_new(old, tmp_path / to)
    return workdir.take_over(old, tmp_path / to, json.loads(config.to_json()) | changes)

  fork("same")
  assert sorted(p.name for p in (tmp_path / "same").iterdir()) == [
    "budgets.json",
    "metrics.jsonl",
    "samples.jsonl",
  ]
  fork("longer", budget=60.0)  # the number of steps is determined again
  assert sorted(p.name for p in (tmp_path / "longer").iterdir()) == [
    "metrics.jsonl",
    "samples.jsonl",
  ]
  before = files(old)
  with pytest.raises(ConfigError, match="which the fork only reads: give one elsewhere"):
    fork("old/inside")
  assert files(old) == before


# ---- numbers ----


def test_numbers_of_parameters_that_are_not_finite_are_never_written():
  """They are in a row of the embedding that no example uses, come from an overflowing learning
  rate, or are in Adam's moments.
  """

  def loss(p, x):
    return ((p["w"][0] * x).sum() ** 2, None)

  def one(tx, w, x):
    params = {"w": jnp.asarray(w, jnp.float32)}
    opt = tx.init(params)
    new, new_opt, _, _, done = jax.jit(lambda p, o: descend(tx, loss, p, o, jnp.float32(x)))(
      params, opt
    )
    same = all(
      jax.tree.leaves(
        jax.tree.map(
          lambda a, b: np.array_equal(a, b, equal_nan=True), (new, new_opt), (params, opt)
        )
      )
    )
    assert same == bool(done["skipped"])
    return bool(done["skipped"])

  fine = [[1.0, 2.0], [3.0, 4.0]]
  assert not one(optax.adamw(0.1), fine, 1.0)
  assert one(optax.adamw(0.1), [[1.0, 2.0], [np.nan, 4.0]], 1.0) and one(
    optax.adamw(0.1), [[1, 2], [3, np.inf]], 1.0
  )
  assert one(optax.sgd(3e38), fine, 2.0)  # the gradient is finite, but the updated parameter is not
  assert one(
    optax.adam(0.1), fine, 1e11
  )  # a gradient with an infinite square would stop Adam permanently


def test_spikes_are_counted_by_the_update():
  """Each step has two updates of the policy, then one of the head. In the first run no update of
  the head is clipped.
  """
  small_norms = dict(ppo__epochs=2, policy__max_grad_norm=1e-6, guard__spike=1.5)
  (first, second), _ = small.run(small.config(r2m__max_grad_norm=0.0, **small_norms), 2)
  assert [float(out.metrics["spikes"]) for out in (first, second)] == [2, 2]
  assert float(first.metrics["policy/grad_norm"]) > 1.5e-6  # before clipping
  (out,), _ = small.run(
    small.config(r2m__max_grad_norm=1e6, **small_norms | {"policy__max_grad_norm": 1e6}), 1
  )
  assert float(out.metrics["spikes"]) == 0


# ---- another mesh ----


def test_a_run_goes_on_on_another_mesh(tmp_path):
  """The state is equal bit for bit. Later steps have the same tokens and, in float64, the same
  metrics and parameters.
  """
  with jax.enable_x64(True):
    go_on_on_another_mesh(tmp_path, small.config(**small.FLOAT64))


def go_on_on_another_mesh(tmp_path, cfg):
  meshes = {"same": (2, 2, 2), "one": (1, 1, 1), "fsdp": (1, 8, 1)}
  built, state = small.start(cfg, meshes["same"])
  step = small.step_of(cfg, built, state)
  for t in range(2):
    state, _ = step(state, small.prompts(cfg, t))
  saved = checkpoint.open_checkpoints(tmp_path)
  checkpoint.save(saved, 2, state)
  checkpoint.wait(saved)

  def bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

  want, ends = [bits(x).tobytes() for x in jax.tree.leaves(state)], {}
  for name, mesh in meshes.items():
    built, like = small.start(cfg, mesh)
    if name != "same":
      step = small.step_of(cfg, built, like)
    restored = checkpoint.restore(saved, like)
    assert [bits(x).tobytes() for x in jax.tree.leaves(restored)] == want
    outputs = []
    for t in range(2, 5):
      restored, out = step(restored, small.prompts(cfg, t))
      outputs.append(jax.device_get(out))
    ends[name] = (
      outputs,
      [bits(x) for x in jax.tree.leaves((restored.policy, restored.reward_head))],
    )
  outputs, parameters = ends.pop("same")
  for others, other_parameters in ends.values():
    small.same_tokens(others, outputs)
    small.equal_in_float64(small.metrics_of(others), small.metrics_of(outputs))
    small.equal_in_float64(
      *({f"array{i}": x for i, x in enumerate(xs)} for xs in (other_parameters, parameters))
    )


# ---- names and folders from outside ----


@pytest.mark.parametrize(
  "name",
  [
    "tfds:../../etc",
    "tfds:a/../b",
    "tfds:/etc/passwd",
    "tfds:gs://bucket/x",
    "tfds:huggingface:squad",
    "tfds:ns:x/y",
    "tfds:",
    "hf:../x",
    "hf:a/../../b",
    "hf:a",
    "hf:https://x/y",
    "hf:/etc/passwd",
  ],
)
def test_names_of_data_that_lead_elsewhere_are_refused(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  data = default.get_config().data
  data.name, data.tfds_dir = name, str(tmp_path / "tfds")
  with pytest.raises(DataError, match="config.data.name is (tfds|hf):.*: give (tfds|hf):"):
    load(data, "pair")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rows.zip", "rows.tar.gz", "rows.pkl", "rows.pt", "rows.arrow"])
def test_archives_and_pickles_are_not_opened(name, tmp_path):
  (tmp_path / name).write_bytes(b"PK\x03\x04")
  data = default.get_config().data
  data.name = str(tmp_path / name)
  with pytest.raises(DataError, match="is not of a kind that is read"):
    load(data, "pair")


@pytest.mark.parametrize(
  "source",
  ["../nowhere", "a/../b", "..a/b", "a/b/c", "/nowhere", "~/nowhere", "a\x00b", "https://x/y"],
)
def test_names_of_models_that_lead_elsewhere_are_refused(source):
  with pytest.raises(FolderError, match="config.policy.path is"):
    load_policy(source, default.get_config())


def test_checkpoints_outside_the_run_are_refused(tmp_path):
  run, other = tmp_path / "run", tmp_path / "other/checkpoints/r2m/3"
  other.mkdir(parents=True)
  (run / "checkpoints/r2m/3").mkdir(parents=True)
  for name in ("metrics.jsonl", "config.json"):
    (run / name).write_text("{}")

  def find(path):
    return export.find_checkpoint(pathlib.Path(f"{run}{path}"))

  assert find("/checkpoints/r2m/3") == (run, ("checkpoints", "r2m"), 3)
  for path in (
    "/checkpoints/../../other/checkpoints/r2m",
    "/../other/checkpoints/r2m/3",
    "/checkpoints/r2m/../../../other",
    "/checkpoints/r2m/²",
    "/checkpoints/r2m/-1",
  ):
    with pytest.raises(FolderError, match="config.export.checkpoint is"):
      find(path)


@pytest.mark.parametrize("name", ["policy", "reward"])
def test_an_export_does_not_replace_the_model_that_the_run_started_from(name, tmp_path):
  run, models = tmp_path / "run", tmp_path / "models"
  (run / "checkpoints/r2m/3").mkdir(parents=True)
  (models / name).mkdir(parents=True)
  (run / "metrics.jsonl").write_text("")
  config = default.get_config()
  config.policy.path = config.reward.path = str(tmp_path / "other")
  config[name].path = str(models / name)
  (run / "config.json").write_text(config.to_json())
  exports = default.get_config()
  exports.export.checkpoint, exports.export.out = str(run), f"{models}/../models"
  with pytest.raises(FolderError, match=f"its {name}.path, which the export would replace; give"):
    export.run(exports)


def test_an_export_changes_nothing_in_a_run_that_may_still_save(tmp_path):
  run = tmp_path / "run"
  kept = checkpoint.open_checkpoints(run / "checkpoints/r2m")
  for step in (3, 4):
    checkpoint.save(kept, step, {"x": jnp.ones(2)})
  checkpoint.wait(kept)
  (run / f"checkpoints/r2m/5{checkpoint.UNFINISHED}/default").mkdir(parents=True)  # in progress
  (run / "checkpoints/r2m/4/manifest.json").unlink()  # the newest one is damaged
  (run / "metrics.jsonl").write_text("")
  config = default.get_config()
  config.policy.path = config.reward.path = str(tmp_path / "absent")
  (run / "config.json").write_text(config.to_json())
  exports = default.get_config()
  exports.export.checkpoint, exports.export.out = str(run), str(tmp_path / "out")
  before = sorted(run.rglob("*"))
  with pytest.raises(FolderError, match="absent"):  # found after the checkpoint
    export.run(exports)
  assert sorted(run.rglob("*")) == before
  assert checkpoint.newest_to_read(checkpoint.open_checkpoints(run / "checkpoints/r2m")) == 3


# ---- secrets ----


def test_what_the_environment_keeps_secret_is_never_written(monkeypatch, capsys):
  secret = "my-own-password-1234"
  for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"):
    with monkeypatch.context() as patch:
      patch.setenv(name, secret)
      for field, value in (
        ("export.push_to", f"me/{secret}"),
        ("data.name", f"hf:me/x?token={secret}"),
      ):
        config = default.get_config()
        config.update_from_flattened_dict({field: value})
        with pytest.raises(
          ConfigError, match=f"config.{field} looks like it holds a token"
        ) as refused:
          check_config(config)
        assert secret not in str(refused.value)
      assert redact(f"401 for {secret}") == "401 for (hidden)"
      with pytest.raises(SystemExit):
        process.stop(f"config.steps is {secret!r}: must be of type int")
      try:
        raise KeyError(secret)
      except KeyError as error:
        process.show_traceback(KeyError, error, error.__traceback__)
    shown = capsys.readouterr().err
    assert (
      secret not in shown
      and "(hidden)" in shown
      and "Traceback" in shown
      and "test_faults.py" in shown
    )
  assert redact(f"x {secret}") == f"x {secret}"  # no longer one
  monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
  assert redact("it is false") == "it is false"


@pytest.mark.parametrize(
  "name",
  ["runs/multitask-sft-llama-3-8b-instruct", "models/llama_hf_converted_weights_of_march"],
)
def test_a_name_that_holds_the_beginning_of_a_key_is_no_secret(name):
  config = default.get_config()
  config.policy.path = name
  check_config(config)
  assert redact(name) == name


def test_a_failed_save_leaves_one_line(capsys):
  for said in ("Event loop is closed", "something else"):
    process.show_unraisable(
      SimpleNamespace(
        exc_type=RuntimeError,
        exc_value=RuntimeError(said),
        exc_traceback=None,
        err_msg=None,
        object=None,
      )
    )
  assert "something else" in (shown := capsys.readouterr().err) and "Event loop" not in shown


# ---- readers of the output ----


class Dead(io.StringIO):
  def write(self, text):
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_that_is_gone_stops_nothing(terminal):
  out = Dead()
  out.isatty = lambda: terminal
  with progress.Progress(10, "r2m", out=out) as bar:
    for _ in range(10):
      bar.update(kl=0.1)
  assert bar.n == 10


def test_a_metric_to_keep_the_best_by_must_be_one(tmp_path):
  from test_resume import counting, run_loop, settings

  config = settings(checkpoint__keep_best=1, checkpoint__best_metric="gold")
  with pytest.raises(
    ConfigError, match="config.checkpoint.best_metric is 'gold': choose one of .*reward/used"
  ):
    run_loop(tmp_path, config, counting())

"""Two hundred damaged inputs in one process: each is used, or refused with one line of ours, and
nothing is written.

Files of rows, folders of models, exported reward models, workdirs and checkpoints. Each was valid
before a few bytes or one value of its JSON were changed. If one is still accepted, its contents are
checked.
"""

import gzip
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_data import GOOD, data, lines, parquet

from configs import quickstart
from r2m_jax.config import ConfigError
from r2m_jax.data import datasets
from r2m_jax.data.forms import as_row
from r2m_jax.data.jsonl import DataError, read_rows
from r2m_jax.data.rows import load
from r2m_jax.data.text import TextError
from r2m_jax.hf.export import write_reward
from r2m_jax.hf.folders import FolderError, HeadConfig, abstract_head, load_policy, load_reward
from r2m_jax.run import checkpoint
from r2m_jax.run import workdir as workdirs
from r2m_jax.run.files import DamagedFile
from r2m_jax.run.metrics import read_metrics

OWN = (
  ConfigError,
  DataError,
  FolderError,
  TextError,
  DamagedFile,
  checkpoint.CheckpointError,
)  # main reports these
ODD = [
  None,
  True,
  -1,
  0,
  3,
  2.5,
  -1e308,
  10**30,
  "",
  "x",
  "../../etc/passwd",
  "\u202e\x00",
  [],
  [[]],
  ["a", 1],
  {},
  {"a": {"b": []}},
  "9" * 40,
  "float32",
  "Infinity",
]


# ---- damage ----


@st.composite
def of_bytes(draw, content: bytes) -> bytes:
  """Bytes that are truncated, partly changed, removed, inserted, repeated or replaced."""
  at = draw(st.integers(0, max(len(content) - 1, 0)))
  some = draw(st.binary(min_size=1, max_size=9))
  return draw(
    st.sampled_from(
      [
        content[:at],
        content[:at] + some + content[at + len(some) :],
        content[:at] + some + content[at:],
        content[:at] + content[at + len(some) * 7 :],
        content + some,
        content + content,
        b"",
        some,
        b"\0" * len(content),
        content[::-1],
        b"\xff\xfe" + content,
      ]
    )
  )


@st.composite
def of_value(draw, value):
  """A JSON value with one of its parts replaced, renamed or removed."""
  parts = (
    list(value.items())
    if isinstance(value, dict)
    else list(enumerate(value))
    if isinstance(value, list)
    else []
  )
  if not parts or draw(st.integers(0, 5)) == 0:
    return draw(st.sampled_from(ODD))
  key, inner = draw(st.sampled_from(parts))
  copy, how = (dict if isinstance(value, dict) else list)(value), draw(st.integers(0, 4))
  if how == 0:
    copy.pop(key)
  elif how == 1 and isinstance(copy, dict):
    copy[f"{key}_"] = copy.pop(key)
  else:
    copy[key] = draw(of_value(inner))
  return copy


@st.composite
def of_file(draw, name: str, content: bytes) -> bytes:
  """Damaged contents of a file: bytes or, for JSON and for the header of safetensors, a value."""
  if draw(st.integers(0, 2)) == 0:
    return draw(of_bytes(content))
  if name.endswith(".safetensors"):
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(draw(of_value(json.loads(content[8 : 8 + length])))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]
  if name.endswith(".jsonl"):
    rows = content.decode().splitlines()
    at = draw(st.integers(0, len(rows) - 1))
    rows[at] = json.dumps(draw(of_value(json.loads(rows[at]))))
    return "".join(row + "\n" for row in rows).encode()
  return (
    json.dumps(draw(of_value(json.loads(content)))).encode()
    if name.endswith(".json")
    else draw(of_bytes(content))
  )


def fuzz(examples: int):
  return lambda test: settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
  )(given(st.data())(test))


def listing(folder):
  """Every file with its size and modification time."""
  return {
    path: (path.stat().st_size, path.stat().st_mtime_ns)
    for path in folder.rglob("*")
    if path.is_file()
  }


def refused(folder, use) -> bool:
  """Whether `use` refuses the folder with one line of ours and writes nothing. Other exceptions are
  not caught.
  """
  before = listing(folder)
  try:
    use()
  except OWN as error:
    said = str(error).splitlines()
    assert said and said[0].strip() and "Traceback" not in str(error) and len(str(error)) < 4000, (
      error
    )
    assert listing(folder) == before
    return True
  return False


def damaged(draw, source, folder, names):
  """A copy of `source` in `folder` with one of the named files damaged. Returns the file and its
  new contents.
  """
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(source, folder)
  name = draw.draw(st.sampled_from(names))
  now = draw.draw(of_file(name, (source / name).read_bytes()))
  (folder / name).write_bytes(now)
  return name, now


# ---- rows ----

ROWS = [GOOD | {"prompt": f"Who is {i}?"} for i in range(5)] + [
  {
    "prompt": [{"role": "user", "content": "hi"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": "b",
  }
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  root = tmp_path_factory.mktemp("rows")
  lines(root / "a.jsonl", ROWS)
  (root / "b.jsonl.gz").write_bytes(gzip.compress((root / "a.jsonl").read_bytes()))
  parquet(root / "c.parquet", ROWS[:5])
  return root


@fuzz(70)
def test_files_of_rows(rows, tmp_path_factory, draw):
  folder = tmp_path_factory.getbasetemp() / "fuzz_rows"
  need = draw.draw(st.sampled_from(["pair", "prompt", "response"]))
  name, _ = damaged(draw, rows, folder, ["a.jsonl", "a.jsonl", "b.jsonl.gz", "c.parquet"])

  def use():
    for row in load(data(folder / name, max_bad_share=0.5), need):
      row.pop("part")
      row.pop("where")
      assert as_row(row, need) == row  # rows have the normalised form

  refused(folder, use)


@fuzz(20)
def test_input_of_batch_use(rows, tmp_path_factory, draw):
  folder = tmp_path_factory.getbasetemp() / "fuzz_batch"
  damaged(draw, rows, folder, ["a.jsonl"])
  refused(folder, lambda: read_rows(str(folder / "a.jsonl"), ("prompt", "rejected")))


# ---- folders of models ----


def config(**fields):
  result = quickstart.get_config("test")
  result.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in fields.items()}
  )
  return result


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A policy, and an R2M reward model as a run exports it."""
  root = tmp_path_factory.mktemp("fuzzed_models")
  tiny_text.model("llama3.1", "chatml", root / "policy", num_hidden_layers=1)
  tiny_text.model("llama2", "llama3", root / "plain", classifier=True, num_hidden_layers=1)
  cfg = config(
    reward__path=str(root / "plain"), policy__path=str(root / "policy"), export__check=False
  )
  reward = load_reward(cfg.reward.path, cfg)
  head = HeadConfig(32, 32, 8, 1, -1, 0.7)
  state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), nnx.state(abstract_head(head)))
  (root / "run").mkdir()
  write_reward(
    root / "reward", cfg, reward, reward.state, reward.phi, root / "run", head=(head, state)
  )
  shutil.rmtree(root / "run")
  return root


@fuzz(70)
def test_folders_of_policies(models, tmp_path_factory, draw):
  folder = tmp_path_factory.getbasetemp() / "fuzz_policy"
  names = [
    "config.json",
    "config.json",
    "model.safetensors",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
  ]
  damaged(draw, models / "policy", folder, names)

  def use():
    policy = load_policy(str(folder), config())
    assert all(x.size for x in jax.tree.leaves(policy.state))
    policy.tokenizer.describe("The cat")
    policy.tokenizer.describe([{"role": "user", "content": "The cat"}])

  refused(folder, use)


@fuzz(30)
def test_folders_of_reward_models(models, tmp_path_factory, draw):
  folder = tmp_path_factory.getbasetemp() / "fuzz_reward"
  names = [
    "r2m_head.json",
    "r2m_head.safetensors",
    "r2m_renderer.json",
    "config.json",
    "model.safetensors",
  ]
  damaged(draw, models / "reward", folder, names)

  def use():
    reward = load_reward(str(folder), config())
    reward.renderer.batch([("The cat", "sat", False)])
    assert reward.head is None or isinstance(reward.head[0].omega, float)

  refused(folder, use)


def test_what_is_not_damaged_is_used(rows, models):
  """Otherwise the refusals above would prove nothing."""
  assert (
    len(read_rows(str(rows / "a.jsonl"), ("prompt", "rejected")))
    == len(load(data(rows / "a.jsonl"), "pair"))
    == 6
  )
  assert load_policy(str(models / "policy"), config()).tokenizer.render("The cat")
  assert load_reward(str(models / "reward"), config()).head[0].omega == 0.7


# ---- workdirs and checkpoints ----


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The files that a run stores with its checkpoints."""
  root = tmp_path_factory.mktemp("fuzzed_run")
  workdirs.claim(config(), root)
  datasets.hold(root, "r2m", [{"where": "rows.jsonl:1"}], [([1, 2, 3],)])
  row = {"stage": "rl", "arm": "r2m", "step": 0, "seconds": 1.0, "kl": 0.5, "reward/used": "nan"}
  (root / "metrics.jsonl").write_text(
    "".join(json.dumps(row | {"step": i}) + "\n" for i in range(3))
  )
  return root


@fuzz(30)
def test_files_of_workdirs(workdir, tmp_path_factory, draw):
  folder = tmp_path_factory.getbasetemp() / "fuzz_run"
  name, now = damaged(draw, workdir, folder, ["config.json", "data_r2m.json", "metrics.jsonl"])
  uses = {
    "config.json": lambda: workdirs.fixed_difference(
      folder / "config.json", json.loads(config().to_json())
    ),
    "data_r2m.json": lambda: datasets.hold(
      folder, "r2m", [{"where": "rows.jsonl:1"}], [([1, 2, 3],)]
    ),
    "metrics.jsonl": lambda: read_metrics(folder),
  }
  refused(folder, uses[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  root = tmp_path_factory.mktemp("fuzzed_checkpoints")
  made = checkpoint.open_checkpoints(root)
  for step in (1, 2):
    checkpoint.save(made, step, tree(step), facts={"config": "c"})
  checkpoint.wait(made)
  made.close()
  return root


def tree(step: int):
  return {
    "a": jnp.arange(40.0) * step,
    "b": {"c": jnp.full((3, 2), step, jnp.bfloat16), "step": jnp.int32(step)},
  }


@fuzz(30)
def test_checkpoints(saved, tmp_path_factory, draw):
  """After any damage to the newest checkpoint, it is read unchanged, or the one before is read, or
  an error of ours explains why not.
  """
  folder = tmp_path_factory.getbasetemp() / "fuzz_checkpoints"
  names = sorted(
    str(path.relative_to(saved)) for path in (saved / "2").rglob("*") if path.is_file()
  )
  damaged(draw, saved, folder, [*names, *["2/manifest.json"] * len(names)])
  made = None
  try:
    made = checkpoint.open_checkpoints(folder)
    step = checkpoint.newest(made)
    got = checkpoint.restore(made, tree(0))
    checkpoint.facts_of(made, step)
  except OWN as error:
    assert str(error).strip() and "Traceback" not in str(error)
    return
  finally:
    if made is not None:
      made.close()
  assert step in (1, 2)
  jax.tree.map(np.testing.assert_array_equal, got, tree(step))

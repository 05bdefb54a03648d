"""Several processes: two with four devices equal one with eight, checkpoints work in both, and if
one process dies, the other ends.

The slower checks are marked `long`: ./launch/test.sh -m long tests/parallel/test_hosts.py
"""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import default
from r2m_jax.config import ConfigError, check_config
from r2m_jax.parallel import hosts
from r2m_jax.run import checkpoint
from r2m_jax.run.metrics import read_metrics, without_clock

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT = 8  # seconds
GOLD = [
  "--config=configs/quickstart.py:test",
  "--config.variant=r2m",
  "--config.steps=3",
  "--config.log.samples=2",
  "--config.log.checkpoint_every=1",
  "--config.checkpoint.keep_last=9",
  "--config.sft.steps=3",
  "--config.sft.examples=32",
  "--config.reward.pairs=32",
  "--config.reward.heldout_pairs=64",
  "--config.dtype=float64",
  "--config.param_dtype=float64",
]


FLOAT32 = dict(
  logged=2e-5, arrays=1e-4
)  # for `same_run`: a few steps of Adam from folders, which are in float32


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def start(*arguments, processes=2, devices=4, record=None, cwd=ROOT, port=None, **changes):
  """Starts the processes of a run. Their output goes to files. `cwd` may have one folder for each
  process.
  """
  port, started = port or free_port(), []
  flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
  for i in range(processes):
    env = (
      os.environ
      | changes
      | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
      }
    )
    if processes > 1:
      env |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(i),
      }
    if record:
      record.mkdir(parents=True, exist_ok=True)
      env["R2M_TEST_RECORD"] = str(record)
    command = [sys.executable, str(ROOT / "tests/support/hosts_worker.py"), *map(str, arguments)]
    where = cwd[i] if isinstance(cwd, tuple) else cwd
    started.append(
      subprocess.Popen(
        command, cwd=where, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
      )
    )
  return started


def ended(started, timeout=1800) -> list[tuple[int, str, str]]:
  """(exit status, stdout, stderr) of each process. All processes have ended afterwards."""
  try:
    texts = [process.communicate(timeout=timeout) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, texts)]
  finally:
    for process in started:
      process.kill()


def run(*arguments, **kwargs):
  """A run that must succeed; returns the result of `ended`."""
  results = ended(start(*arguments, **kwargs))
  for status, out, err in results:
    assert status == 0, f"{status}\n{out[-1500:]}\n{err[-3000:]}"
  return results


def same_run(one: pathlib.Path, other: pathlib.Path, steps, *, logged=1e-8, arrays=1e-10):
  """Compares two float64 runs: tokens must be equal, metrics within `logged`, scores and final
  parameters within `arrays`.

  metrics.jsonl keeps nine digits.
  """
  for t in steps:
    a, b = (np.load(folder / "record" / f"step{t}.npz") for folder in (one, other))
    np.testing.assert_array_equal(a["tokens"], b["tokens"], err_msg=f"tokens of step {t}")
    np.testing.assert_array_equal(a["mask"], b["mask"])
    np.testing.assert_allclose(a["scores"], b["scores"], rtol=arrays, atol=arrays)
  rows = [
    {row["step"]: row for row in read_metrics(folder) if row["stage"] == "rl"}
    for folder in (one, other)
  ]
  for t in steps:
    assert rows[0][t].keys() == rows[1][t].keys()
    for name in without_clock(rows[0][t]).keys() - {"stage", "arm", "step"}:
      close = dict(rtol=logged, atol=logged, err_msg=f"{name} of step {t}")
      np.testing.assert_allclose(rows[0][t][name], rows[1][t][name], **close)
  a, b = (np.load(folder / "record" / "end.npz") for folder in (one, other))
  assert a.files == b.files and len(a.files) > 10
  for name in a.files:
    np.testing.assert_allclose(a[name], b[name], rtol=0, atol=arrays, err_msg=name)


def digests_on_disk(workdir: pathlib.Path, step: int) -> list[str]:
  """SHA-256 of every array of a checkpoint that orbax reads to the host."""
  folder = workdir / "checkpoints" / "r2m"
  assert checkpoint.damage(folder / str(step)) is None
  reader, saved = ocp.PyTreeCheckpointer(), folder / str(step) / "default"
  tree = reader.metadata(saved).item_metadata.tree
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  leaves = jax.tree.leaves(reader.restore(saved, restore_args=as_numpy))
  return sorted(hashlib.sha256(x.tobytes()).hexdigest() for x in leaves)


def continued(old: pathlib.Path, new: pathlib.Path, mesh: str, **kwargs) -> list[str]:
  """Resumes at step 1 in a copy of `old`. Returns the digests of the restored state."""
  shutil.copytree(old, new)
  shutil.rmtree(new / "record")
  for step in (2, 3):
    shutil.rmtree(new / "checkpoints" / "r2m" / str(step))
  run("main", *GOLD, f"--workdir={new}", f"--config.mesh={mesh}", record=new / "record", **kwargs)
  return sorted(json.loads((new / "record" / "restored1.json").read_text()).values())


ONE, TWO = dict(processes=1, devices=8), dict(processes=2, devices=4)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
  """The workdir of a gold-task run, from the supervised start to three RL steps, by two
  processes.
  """
  folder = tmp_path_factory.mktemp("two") / "run"
  results = run(
    "main", *GOLD, f"--workdir={folder}", "--config.mesh=(8, 1, 1)", record=folder / "record", **TWO
  )
  return folder, results


def test_two_processes_equal_one_and_their_checkpoint_is_restored_by_one_on_another_mesh(
  two_processes, tmp_path
):
  two, results = two_processes
  assert (
    "step 0   max |ratio - 1|" in results[0][1] and "step 0" not in results[1][1]
  )  # only process 0 prints
  assert "r2m  3/3" in results[0][2] and "r2m  3/3" not in results[1][2]
  assert (
    len([row for row in read_metrics(two) if row["stage"] == "rl"]) == 3
  )  # each step is logged once
  one = tmp_path / "one"
  restored = continued(two, one, "(2, 2, 2)", **ONE)
  assert restored == digests_on_disk(two, 1) and len(restored) > 50
  same_run(two, one, (1, 2))


@pytest.mark.long
def test_a_whole_run_of_two_processes_equals_one_of_one_and_goes_either_way(
  two_processes, tmp_path
):
  """From nothing: supervised start, reward model and RL. Then two processes resume from the
  checkpoint of one process.
  """
  two, one = two_processes[0], tmp_path / "one"
  run("main", *GOLD, f"--workdir={one}", "--config.mesh=(8, 1, 1)", record=one / "record", **ONE)
  same_run(two, one, (0, 1, 2))
  fits = [
    [row for row in read_metrics(folder) if row["stage"] in ("sft", "reward")]
    for folder in (two, one)
  ]
  for a, b in zip(*fits, strict=True):
    for name in without_clock(a).keys() - {"stage", "arm"}:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-8, atol=1e-8, err_msg=name)
  for name, mesh in (("same", "(8, 1, 1)"), ("other", "(1, 4, 2)"), ("across", "(1, 1, 8)")):
    again = tmp_path / name
    assert continued(one, again, mesh, **TWO) == digests_on_disk(one, 1)
    same_run(one, again, (1, 2))
  same = tmp_path / "back"
  assert continued(two, same, "(8, 1, 1)", **ONE) == digests_on_disk(two, 1)
  same_run(two, same, (1, 2))


def test_what_processes_share(tmp_path):
  """Rows on meshes over several processes, values, errors, and a folder that is not shared. See
  hosts_worker.units.
  """
  for i in (0, 1):
    (tmp_path / str(i)).mkdir()
  results = ended(start("units", tmp_path, **TWO), timeout=600)
  for i, (status, out, err) in enumerate(results):
    assert status == 0 and (tmp_path / f"passed{i}").exists(), err[-3000:]
    assert ("only the first process prints" in out) == (i == 0) and f"stderr of {i}" in err


# ---- a run from folders ----


def folder_arguments(root: pathlib.Path, **changes) -> list[str]:
  settings = {
    "policy.path": root / "policy",
    "reward.path": root / "reward",
    "data.name": root / "prompts.jsonl",
    "mesh": "(8, 1, 1)",
    "steps": 2,
    "rollout.prompts": 8,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 6,
    "sft.batch_size": 8,
    "sft.steps": 3,
    "reward.batch_size": 8,
    "reward.epochs": 1,
    "r2m.attention_dim": 16,
    "log.samples": 7,
    "export.check": False,
    "policy.lr": 1e-3,
    "r2m.lr": 1e-2,
    "log.checkpoint_every": 1,
    "seed": 3,
    "score.batch_size": 4,
    "generate.batch_size": 4,
    "generate.max_new_tokens": 5,
    "generate.temperature": 0.7,
  } | changes
  return [
    f"--config={ROOT}/configs/default.py",
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A policy and a reward model of another family and tokenizer, prompts, dialogues and pairs."""
  import tiny_text

  root = tmp_path_factory.mktemp("models")
  tiny_text.model("qwen2", "chatml", root / "policy")
  tiny_text.model("llama3.1", "llama3", root / "reward", classifier=True, hidden_size=48)
  rng = np.random.default_rng(0)
  words = "the cat sat on a mat rain sea trees Paris short poem dog ran".split()

  def text(low, high):
    return " ".join(rng.choice(words, rng.integers(low, high)))

  rows = [
    {"prompt": text(1, 9), "response": text(1, 5), "chosen": text(1, 5), "rejected": text(5, 8)}
    for _ in range(21)
  ]
  fields = {
    "prompts": ("prompt",),
    "sft": ("prompt", "response"),
    "pairs": ("prompt", "chosen", "rejected"),
  }
  for name, wanted in fields.items():
    lines = [json.dumps({field: row[field] for field in wanted}) + "\n" for row in rows]
    (root / f"{name}.jsonl").write_text("".join(lines))
  return root


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors.numpy

  return {
    f"{path.name}/{name}": x
    for path in sorted(folder.glob("*.safetensors"))
    for name, x in safetensors.numpy.load_file(path).items()
  }


def same_folders(one: pathlib.Path, other: pathlib.Path, names):
  for name in names:
    a, b = tensors(one / "export" / name), tensors(other / "export" / name)
    assert a.keys() == b.keys() and a
    for key in a:
      np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-4, err_msg=key)
    files = [
      sorted(path.name for path in (folder / "export" / name).iterdir()) for folder in (one, other)
    ]
    assert files[0] == files[1] and "README.md" in files[0]


@pytest.mark.long
def test_a_run_from_folders_by_two_processes_equals_one(models, tmp_path):
  """With evaluations on five prompts, which do not split over eight shards."""
  arguments = folder_arguments(models, **{"eval.every": 1, "eval.prompts": 5})
  for name, kind in (("one", ONE), ("two", TWO)):
    folder = tmp_path / name
    run("main", *arguments, f"--workdir={folder}", record=folder / "record", **kind)
  same_run(tmp_path / "one", tmp_path / "two", (0, 1), **FLOAT32)
  same_folders(tmp_path / "one", tmp_path / "two", ("policy", "reward"))
  lines = [
    [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
    for name in ("one", "two")
  ]
  assert (
    len(lines[0]) == len(lines[1]) == 14
  )  # seven prompts, including those of the second process
  for a, b in zip(*lines):
    assert (a["when"], a["prompt"], a["response"]) == (b["when"], b["prompt"], b["response"])
  evaluated = [
    [json.loads(line) for line in (tmp_path / name / "eval_samples.jsonl").read_text().splitlines()]
    for name in ("one", "two")
  ]
  assert len(evaluated[0]) == len(evaluated[1]) == 15  # at steps 0, 1 and 2
  for a, b in zip(*evaluated):
    assert (a["step"], a["prompt"], a["response"]) == (b["step"], b["prompt"], b["response"])
    assert a["frozen"] == pytest.approx(b["frozen"], abs=1e-3)
    assert a["kl"] == pytest.approx(b["kl"], abs=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
  "task, data, stage", [("sft", "sft", "policy"), ("reward", "pairs", "reward")]
)
def test_fits_from_folders_by_two_processes_equal_one(models, tmp_path, task, data, stage):
  extra = {"task": task, "data.name": models / f"{data}.jsonl", "data.buckets": "(16, 32)"}
  for name, kind in (("one", ONE), ("two", TWO)):
    run("main", *folder_arguments(models, **extra), f"--workdir={tmp_path / name}", **kind)
  rows = [[row for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
  for a, b in zip(*rows, strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
  same_folders(tmp_path / "one", tmp_path / "two", (stage,))


@pytest.mark.long
@pytest.mark.parametrize(
  "changes",
  [
    {"algorithm": "remax", "mesh": "(4, 2, 1)", "packing": "(0.8, 1.0)"},
    {"lora.rank": 2, "mesh": "(1, 2, 4)", "variant": "vanilla"},
    {"mesh": "(1, 1, 8)", "algorithm": "ppo", "critic.init": "policy"},
  ],
  ids=["remax", "lora", "tensor"],
)
def test_other_runs_from_folders_by_two_processes_equal_one(models, tmp_path, changes):
  for name, kind in (("one", ONE), ("two", TWO)):
    folder = tmp_path / name
    run(
      "main",
      *folder_arguments(models, **changes),
      f"--workdir={folder}",
      record=folder / "record",
      **kind,
    )
  same_run(tmp_path / "one", tmp_path / "two", (0, 1), **FLOAT32)
  same_folders(tmp_path / "one", tmp_path / "two", ("policy", "reward"))


@pytest.mark.long
def test_batch_use_of_any_number_of_rows_by_two_processes_equals_one(models, tmp_path):
  rows = [json.loads(line) for line in (models / "sft.jsonl").read_text().splitlines()]
  for count in (1, 5, 21):
    asked = tmp_path / f"{count}.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    found = {}
    for name, kind in (("one", ONE), ("two", TWO)):
      for task in ("generate", "score"):
        out = tmp_path / f"{name}-{task}-{count}.jsonl"
        extra = {"task": task, f"{task}.input": asked, f"{task}.output": out}
        run("main", *folder_arguments(models, **extra), f"--workdir={tmp_path / 'use'}", **kind)
        found[name, task] = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found["two", "score"]) == len(found["two", "generate"]) == count
    assert [row["tokens"] for row in found["one", "generate"]] == [
      row["tokens"] for row in found["two", "generate"]
    ]
    scores = [[row["score"] for row in found[name, "score"]] for name in ("one", "two")]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


# ---- ends of runs ----


def endless(workdir: pathlib.Path, stages: pathlib.Path, **kwargs):
  """Two processes in the middle of an RL run, past their second step."""
  shutil.copytree(stages, workdir / "stages")
  started = start(
    "main",
    *GOLD,
    "--config.steps=5000",
    "--config.mesh=(2, 1, 1)",
    f"--workdir={workdir}",
    devices=1,
    *(  # noqa: B026
      f"--config.hosts.{name}={value}"
      for name, value in dict(heartbeat_timeout=HEARTBEAT, end_timeout=10).items()
    ),
    **kwargs,
  )
  until = time.monotonic() + 1200
  while time.monotonic() < until and all(process.poll() is None for process in started):
    if (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_bytes().count(
      b"\n"
    ) >= 2:
      return started
    time.sleep(0.1)
  raise AssertionError([result[2][-2000:] for result in ended(started, timeout=1)])


@pytest.mark.parametrize(
  "lost, number",
  [
    (1, signal.SIGKILL),
    pytest.param(0, signal.SIGKILL, marks=pytest.mark.long),
    pytest.param(1, signal.SIGSTOP, marks=pytest.mark.long),
  ],
  ids=["killed", "first_killed", "hangs"],
)
def test_a_lost_process_ends_the_other_in_bounded_time(two_processes, tmp_path, lost, number):
  started = endless(tmp_path / "run", two_processes[0] / "stages")
  began = time.monotonic()
  started[lost].send_signal(number)
  status = started[1 - lost].wait(timeout=20 * HEARTBEAT)
  took = time.monotonic() - began
  started[lost].kill()
  err = started[1 - lost].stderr.read()
  assert status == hosts.LOST and took < 2 * HEARTBEAT + 5, (status, took, err[-2000:])
  assert f"process {1 - lost} of 2 on" in err and "another process was lost: killed" in err
  assert "The same command on every host resumes from the last checkpoint" in err
  print(
    f"{number.name} to process {lost}: the other ended after {took:.1f} s, heartbeat {HEARTBEAT} s"
  )
  saved = checkpoint.newest(checkpoint.open_checkpoints(tmp_path / "run/checkpoints/r2m", last=9))
  assert saved is not None and saved >= 1


@pytest.mark.long
def test_a_signal_to_one_process_ends_both_after_the_same_step(two_processes, tmp_path):
  started = endless(tmp_path / "run", two_processes[0] / "stages")
  started[1].terminate()
  results = ended(started, timeout=600)
  assert [status for status, _, _ in results] == [75, 75], [err[-2000:] for _, _, err in results]
  assert (
    "stopped by a signal to another process" in results[0][2]
    and "stopped by SIGTERM" in results[1][2]
  )
  last = read_metrics(tmp_path / "run")[-1]["step"]
  assert (
    checkpoint.newest(checkpoint.open_checkpoints(tmp_path / "run/checkpoints/r2m", last=9))
    == last + 1
  )


@pytest.mark.long
def test_mistakes_end_all_of_them(models, tmp_path):
  """A mesh without some of the devices, a process that never starts, and a file that one process
  does not have.
  """
  common = folder_arguments(models, mesh="(4, 1, 1)")
  for status, out, err in ended(
    start("main", *common, f"--workdir={tmp_path / 'w'}", **TWO), timeout=300
  ):
    assert (
      status == 2
      and "with 2 processes it must cover all 8 devices" in err
      and "Traceback" not in err
    ), err
  port = free_port()
  alone = start(
    "main",
    *common,
    f"--workdir={tmp_path / 'w'}",
    "--config.hosts.start_timeout=3",
    port=port,
    **TWO,
  )
  alone[1].kill()
  (status, _, err), _ = ended(alone, timeout=300)
  assert status == 2 and f"2 processes at 127.0.0.1:{port} did not come together" in err, err[
    -2000:
  ]
  assert "config.hosts.start_timeout = 3 seconds" in err
  assert not (tmp_path / "w").exists()
  places = tmp_path / "a", tmp_path / "b"
  for place in places:
    place.mkdir()
  shutil.copy(models / "prompts.jsonl", places[0])
  own = folder_arguments(models, **{"data.name": "prompts.jsonl", "hosts.end_timeout": 3})
  (status, _, err), (mine, _, said) = ended(
    start("main", *own, f"--workdir={tmp_path / 'w'}", cwd=places, **TWO), 300
  )
  assert status == hosts.LOST and "another process was lost" in err, (status, err[-2000:])
  assert mine == 2 and "prompts.jsonl" in said and "Traceback" not in said, (mine, said[-2000:])


@pytest.mark.parametrize(
  "given, environ, words",
  [
    (dict(coordinator="10.0.0.1"), {}, "config.hosts.coordinator is '10.0.0.1': give HOST:PORT"),
    (dict(coordinator="a:99999"), {}, "config.hosts.coordinator is 'a:99999': give HOST:PORT"),
    (dict(coordinator=":1234"), {}, "config.hosts.coordinator is ':1234': give HOST:PORT"),
    (dict(coordinator="a:1"), {}, "config.hosts.processes is 0: give the total number"),
    (
      dict(coordinator="a:1", processes=2),
      {},
      "config.hosts.process is -1: each of the 2 processes has its own number",
    ),
    (
      dict(coordinator="a:1", processes=2, process=2),
      {},
      "config.hosts.process is 2: .* from 0 to 1",
    ),
    (dict(processes=2), {}, "config.hosts.processes is 2, but no address is given"),
    (dict(process=0), {}, "config.hosts.process is 0, but no address is given"),
    (
      {},
      {"JAX_COORDINATOR_ADDRESS": "x"},
      "environment's JAX_COORDINATOR_ADDRESS is 'x': give HOST:PORT",
    ),
    (
      dict(coordinator="a:1"),
      {"JAX_NUM_PROCESSES": "two"},
      "environment's JAX_NUM_PROCESSES is 'two': give a whole",
    ),
    (
      dict(coordinator="a:1", processes=2),
      {"JAX_PROCESS_ID": "5"},
      "environment's JAX_PROCESS_ID is 5: each",
    ),
    (dict(start_timeout=0), {}, "config.hosts.start_timeout is 0: must be at least 1"),
    (dict(heartbeat_timeout=0), {}, "config.hosts.heartbeat_timeout is 0: must be at least 1"),
  ],
)
def test_settings_are_refused_by_name_before_any_device_is_touched(
  monkeypatch, given, environ, words
):
  config = default.get_config()
  config.hosts.update(given)
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=words):
    check_config(config)


def test_settings_win_over_the_environment(monkeypatch):
  settings = default.get_config().hosts
  assert hosts.addresses(settings, {}) is None
  environ = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
  assert hosts.addresses(settings, environ) == ("a:1", 4, 3)
  settings.coordinator, settings.processes, settings.process = "b:2", 8, 5
  assert hosts.addresses(settings, environ) == ("b:2", 8, 5)
  settings.coordinator = hosts.ALONE
  assert hosts.addresses(settings, environ) is None


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_virtual_devices_have_threads_to_spare():
  """With as many threads as devices, two simultaneous collectives can occupy all of them and wait
  for ever.
  """
  code = """
import os, jax
from r2m_jax.run import process
process.spare_threads()
jax.devices()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in names))
"""
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  env = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"} | flags
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
  )
  assert int(done.stdout) == 32


def test_one_process_starts_nothing():
  """Outside a cluster, a run starts no service and no further thread."""
  code = (
    "import threading, jax; from r2m_jax.configs import default; from r2m_jax.parallel import hosts\n"
    "before = threading.active_count()\n"
    "with hosts.together(default.get_config().hosts):\n"
    "  assert not jax.distributed.is_initialized() and threading.active_count() == before\n"
    "  assert hosts.first() and hosts.from_first(3) == 3\n"
    "print('alone')"
  )
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT
  )
  assert result.stdout == "alone\n", result.stderr

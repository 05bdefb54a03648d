"""A workdir: its lock and its log."""

import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest
import small

from configs import quickstart
from r2m_jax.config import ConfigError
from r2m_jax.run import lock, log, workdir

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import pathlib, sys, time
from r2m_jax.run import lock
lock.take(pathlib.Path(sys.argv[1]), shared=sys.argv[2] == "shared")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """Starts a process that locks `tmp_path`, exclusively or shared."""
  started = []

  def start(how):
    process = subprocess.Popen(
      [sys.executable, "-c", HOLD, str(tmp_path), how], stdout=subprocess.PIPE, text=True
    )
    started.append(process)
    assert process.stdout.readline() == "held\n"
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()


def claim(folder, **how):
  workdir.claim(quickstart.get_config("test"), folder, **how)


def test_a_workdir_is_one_run_s_until_its_process_ends(tmp_path, holder):
  process = holder("alone")
  for how in ({}, {"shared": True}):
    with pytest.raises(
      ConfigError, match=rf"is in use by process {process.pid} on .*, since 20.*: wait until"
    ):
      claim(tmp_path, **how)
  assert not (tmp_path / "config.json").exists()
  process.kill()  # nothing to clean up
  process.wait()
  claim(tmp_path)
  claim(tmp_path)  # again by the same process
  assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()


def test_processes_that_share_keep_out_only_those_that_do_not(tmp_path, holder):
  holder("shared")
  claim(tmp_path, shared=True)
  with pytest.raises(ConfigError, match="is in use by process"):
    claim(tmp_path)


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
  def lockf(file, how):
    raise OSError(38, "Function not implemented")

  monkeypatch.setattr(lock.fcntl, "lockf", lockf)
  claim(tmp_path)
  assert (tmp_path / "config.json").exists()
  assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_workdir_deleted_and_made_again_is_locked_again(tmp_path, holder):
  folder = tmp_path / "run"
  claim(folder)
  for path in folder.iterdir():
    path.unlink()
  claim(folder)
  assert (folder / lock.LOCK).exists()


def tee(monkeypatch):
  """Simulates a process that has just started, with its streams copied to the log."""
  monkeypatch.setattr(log, "_file", None)
  monkeypatch.setattr(log, "_before", None)
  monkeypatch.setattr(sys, "stdout", io.StringIO())
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  log.tee()


def test_the_log_has_what_was_printed_before_and_after_over_restarts(tmp_path, monkeypatch):
  monkeypatch.setenv("SOME_TOKEN", "abcdefghijklmnop")
  for _ in range(2):
    tee(monkeypatch)
    print("before")
    claim(tmp_path)
    sys.stderr.write("\r  1/3")
    sys.stderr.write("\r  2/3")
    print("between")
    sys.stderr.write("\r  3/3\n")
    print("token abcdefghijklmnop")
  first, *lines = (tmp_path / log.LOG).read_text().splitlines()
  assert first.startswith("---- 20") and f"process {os.getpid()}" in first
  assert lines[:4] == ["before", "between", "  3/3", "token (hidden)"]
  assert lines[4].startswith("---- ") and lines[5:] == lines[:4]
  assert "\r  2/3" in sys.stderr._stream.getvalue()  # the terminal has all lines


def test_a_refused_workdir_gets_no_log(tmp_path, monkeypatch):
  tee(monkeypatch)
  claim(tmp_path)
  before = (tmp_path / log.LOG).read_bytes()
  tee(monkeypatch)
  other = quickstart.get_config("test")
  other.kl.beta = 0.5
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(ConfigError, match="holds a run of another config"):
    workdir.claim(other, tmp_path)
  print("error: refused")
  assert (tmp_path / log.LOG).read_bytes() == before


def test_a_start_that_left_no_work_may_be_corrected(tmp_path):
  claim(tmp_path)
  for name in ("r2m_renderer.json", "data_sft.json"):  # records of the refused models and rows
    (tmp_path / name).write_text("{}")
  other = quickstart.get_config("test")
  other.kl.beta = 0.5
  workdir.claim(other, tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["kl"]["beta"] == 0.5
  assert not (tmp_path / "r2m_renderer.json").exists()
  assert not (tmp_path / "data_sft.json").exists()
  (tmp_path / ".DS_Store").write_bytes(b"Bud1")  # of a file manager
  workdir.claim(quickstart.get_config("test"), tmp_path)
  (tmp_path / "stages").mkdir()
  (tmp_path / "stages/.DS_Store").write_bytes(b"Bud1")
  workdir.take_newest(tmp_path / "stages", tmp_path / "copy")
  assert not (tmp_path / "copy").exists()
  with pytest.raises(ConfigError, match="holds a run of another config"):
    workdir.claim(other, tmp_path)


def test_the_proposed_fork_can_be_pasted_into_a_shell(tmp_path):
  folder = tmp_path / "run 1 of mine's"
  claim(folder)
  (folder / "stages").mkdir()
  other = quickstart.get_config("test")
  other.kl.beta = 0.5
  with pytest.raises(ConfigError) as refused:
    workdir.claim(other, folder)
  words = shlex.split(str(refused.value).splitlines()[0].split(" and ")[-1].removesuffix(":"))
  assert words == [f"--config.checkpoint.fork_from={folder}"]


def test_a_workdir_of_an_earlier_version_lacks_settings_and_goes_on(tmp_path):
  claim(tmp_path)
  (tmp_path / "stages").mkdir()
  saved = json.loads((tmp_path / "config.json").read_text())
  del saved["notes"], saved["reward"]["contrast"]
  (tmp_path / "config.json").write_text(json.dumps(saved))
  other = quickstart.get_config("test")
  other.reward.contrast = 3
  with pytest.raises(
    ConfigError, match="holds a run of another(?s:.*)config.reward.contrast: 0 -> 3"
  ):
    workdir.claim(other, tmp_path)
  claim(tmp_path)
  assert "notes" in json.loads((tmp_path / "config.json").read_text())


def test_a_log_that_cannot_be_written_ends_and_the_run_goes_on(tmp_path, monkeypatch):
  tee(monkeypatch)
  claim(tmp_path)
  log._file.close()
  print("one")
  print("two")
  assert sys.stdout._stream.getvalue() == "one\ntwo\n"
  assert sys.stderr._stream.getvalue().count("log.txt ends here") == 1


def test_a_real_run_leaves_its_log_and_a_second_process_is_refused(tmp_path):
  command = [sys.executable, "-m", "r2m_jax.main", "--config=configs/quickstart.py:test"]
  command += [f"--workdir={tmp_path}", "--config.task=sft"]
  environ = os.environ | {"JAX_PLATFORMS": "cpu"}
  first = subprocess.Popen(
    command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  until = time.monotonic() + 200
  while not (tmp_path / log.LOG).exists() and time.monotonic() < until:
    time.sleep(0.05)
  first.send_signal(19)  # SIGSTOP: alive, and not finished before the second one starts
  second = subprocess.run(command, env=environ, capture_output=True, text=True)
  first.send_signal(18)  # SIGCONT
  out, _ = first.communicate(timeout=300)
  assert second.returncode == 2 and "Traceback" not in second.stderr
  assert f"is in use by process {first.pid} on" in second.stderr
  assert first.returncode == 0, out
  lines = (tmp_path / log.LOG).read_text().splitlines()
  assert lines[0].startswith("---- ") and lines[1:] == out.splitlines()
  assert not small.unlisted(tmp_path)


# ---- the table of files in a workdir ----


def test_the_page_has_the_table():
  page = (ROOT / "docs/resume.md").read_text(encoding="utf-8")
  shown = page.partition("<!-- layout -->\n")[2].partition("\n<!-- end of layout -->")[0]
  assert shown == workdir.layout_table(), "paste layout_table() into docs/resume.md"


def test_every_name_in_the_library_is_in_the_table():
  """Checks the literal names of files and folders that are directly in a workdir."""
  listed = {entry.name.rstrip("/") for entry in workdir.LAYOUT}
  for path in (ROOT / "r2m_jax").rglob("*.py"):
    for name in re.findall(r'\bworkdir / "([^"/]+)', path.read_text(encoding="utf-8")):
      assert name in listed, f"{path}: {name}"


def test_a_fork_takes_over_what_the_table_says():
  assert set(workdir.TAKEN_OVER) == {
    "metrics.jsonl",
    "samples.jsonl",
    "eval_samples.jsonl",
    "skipped.jsonl",
    "r2m_renderer.json",
    "budgets.json",
    "hub.json",
    "stages/",
    "checkpoints/",
  }

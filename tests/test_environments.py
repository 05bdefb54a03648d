"""The malformed inputs of the suite again, in unusual environments: there must be no traceback.

Each environment is tested with whole processes: one runs the suite's tests of malformed input, and
others run one command each.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_text

ROOT = pathlib.Path(__file__).parents[1]
UNWRITABLE = "/proc"  # for root, too
# Runs a module as a user whose id the system's list of users lacks, as in a container.
UNKNOWN_USER = """
import pwd, runpy, sys
def getpwuid(number):
  raise KeyError(number)
pwd.getpwuid = getpwuid
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
# name -> variables; None removes one, and "cwd" is the working directory
ENVIRONMENTS = {
  "ascii": ASCII | {"PYTHONIOENCODING": "ascii"},
  "no home": {"HOME": None},
  "unwritable home": {"HOME": "/dev/null/home"},
  "unwritable cwd": {"cwd": UNWRITABLE},
  "time zone": {"TZ": "Pacific/Kiritimati"},  # 14 hours ahead: often tomorrow
  "absent platform": {"JAX_PLATFORMS": "cuda"},
}
MALFORMED = [
  "tests/test_fuzz.py",
  "tests/run/test_fuzz_inputs.py",
  "tests/data/test_fuzz_data.py::test_sixty_damaged_folders_give_a_plain_readers_rows",
  "tests/data/test_data.py",
]


def run(name: str, module: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
  """python -m module arguments, in the environment of that name with `more` variables."""
  given = dict(ENVIRONMENTS[name])
  folder = given.pop("cwd", str(ROOT))
  variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more | given
  if given.get("HOME", "") is None:
    command = [sys.executable, "-c", UNKNOWN_USER, module, *arguments]
  else:
    command = [sys.executable, "-m", module, *arguments]
  variables = {name: value for name, value in variables.items() if value is not None}
  return subprocess.run(
    command, cwd=folder, env=variables, capture_output=True, text=True, errors="replace"
  )


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if name != "absent platform"])
def test_the_suites_malformed_inputs(name, tmp_path):
  """The absent platform is tested only with the commands below, because tests need a device."""
  files = [str(ROOT / file) for file in MALFORMED]
  options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--basetemp={tmp_path}/t"]
  options += ["-c", str(ROOT / "pytest.ini")]
  result = run(name, "pytest", *options, *files, XDG_CACHE_HOME=str(tmp_path / "cache"))
  assert result.returncode == 0, result.stdout[-3000:]
  assert " passed" in result.stdout


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """A valid folder and valid rows, and damaged ones with non-ASCII names."""
  root = tmp_path_factory.mktemp("bad")  # in ASCII: tokenizers cannot open others in a C locale
  tiny_text.model("llama2", "plain", root / "sound", num_hidden_layers=1)
  tiny_text.model("llama2", "plain", root / "\u732b", num_hidden_layers=1)
  (root / "\u732b/config.json").write_text('{"model_type": "\u732b"}', encoding="utf-8")
  (root / "rows.jsonl").write_text(json.dumps({"prompt": "caf\u00e9 \U0001f600"}) + "\n")
  (root / "cut.jsonl").write_text('{"prompt": "caf\u00e9', encoding="utf-8")
  return root


COMMANDS = {
  "field": ["--config.st\u00e4ps=3"],
  "value": ["--config.steps=-1"],
  "folder": ["--config.policy.path={root}/\u732b", "--config.generate.input={root}/rows.jsonl"],
  "rows": ["--config.policy.path={root}/sound", "--config.generate.input={root}/cut.jsonl"],
  "output": ["--config.generate.output={root}", "--config.generate.input={root}/rows.jsonl"],
  "no file": ["--config.generate.input=\u732b.jsonl", "--config.policy.path={root}/sound"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_malformed_commands_end_in_one_line(name, inputs, tmp_path):
  for case, given in COMMANDS.items():
    common = [
      f"--config={ROOT}/configs/default.py",
      f"--workdir={tmp_path}/run",
      "--config.task=generate",
      f"--config.generate.output={tmp_path}/out.jsonl",
      "--config.policy.path=p",
      "--config.generate.input=i",
    ]
    result = run(name, "r2m_jax.main", *common, *(x.format(root=inputs) for x in given))
    assert result.returncode == 2 and "Traceback" not in result.stderr, (case, result.stderr)
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, case
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["ascii", "unwritable cwd", "time zone"])
def test_a_sound_command_works(name, inputs, tmp_path):
  """Otherwise the refusals above would prove nothing."""
  result = run(
    name,
    "r2m_jax.main",
    f"--config={ROOT}/configs/default.py",
    f"--workdir={tmp_path}/run",
    "--config.task=generate",
    f"--config.policy.path={inputs}/sound",
    f"--config.generate.input={inputs}/rows.jsonl",
    f"--config.generate.output={tmp_path}/out.jsonl",
    "--config.generate.max_new_tokens=4",
  )
  assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
  (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
  assert row["prompt"] == "caf\u00e9 \U0001f600"

"""launch/: every dry run prints its commands, quoted for a shell; restarts on status 75."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ARGS = [
  "--config=configs/quickstart.py",
  "--workdir=/mnt/a b/run",
  "--config.mesh=(-1, 1, 1)",
  '--config.data.name=it\'s "$HOME" \\ `x`',
]
TOOLS = "bash env cat cksum date dirname git mkdir mktemp rm sed seq sleep setsid nohup tar"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
  """An environment whose PATH has no gcloud, xpk, srun or scontrol."""
  folder = tmp_path_factory.mktemp("bin")
  for tool in TOOLS.split():
    (folder / tool).symlink_to(shutil.which(tool))
  return {"PATH": str(folder), "HOME": str(folder), "DRY_RUN": "1"}


def dry(script, *arguments, **env) -> list[list[str]]:
  """The output of a dry run, split as by a shell."""
  command = [shutil.which("bash"), str(ROOT / "launch" / script), *arguments]
  result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines() if line]


def flag(command: list[str], name: str) -> str:
  """The value of --name=value, which must occur once."""
  (found,) = [part.partition("=")[2] for part in command if part.startswith(f"--{name}=")]
  return found


def reaches(command: str, tmp_path, environ: dict) -> tuple[list[str], dict[str, str]]:
  """Runs a command meant for another machine, with a stub for launch/local.sh. Returns the stub's
  arguments and settings.
  """
  stub = tmp_path / "r2m_jax" / "launch" / "local.sh"
  stub.parent.mkdir(parents=True)
  stub.write_text(
    '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$HOME/got.part"\nenv >"$HOME/env"; mv "$HOME/got.part" "$HOME/got"\n'
  )
  stub.chmod(0o755)
  (tmp_path / "launch").symlink_to(stub.parent)  # xpk starts in the repository
  env = environ | {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
  subprocess.run(
    ["bash", "-c", command],
    cwd=tmp_path,
    env=env,
    check=True,
    timeout=300,
    stdin=subprocess.DEVNULL,
  )
  until = time.monotonic() + 200
  while not (tmp_path / "got").exists() and time.monotonic() < until:
    time.sleep(0.05)  # it runs in the background
  got = (tmp_path / "got").read_text().split("\0")[:-1]
  return got, dict(
    line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
  )


def test_one_gpu(bare):
  for script in ("one_gpu.sh", "local.sh"):
    (command,) = dry(script, *ARGS, **bare)
    assert command[0].endswith("/bin/python") and command[1:] == ["-m", "r2m_jax.main", *ARGS]


def test_slurm(bare):
  step, again = dry("slurm_gpu.sbatch", *ARGS, **bare, SLURM_GPUS_ON_NODE="4", SLURM_JOB_ID="17")
  assert (
    step[:3] == ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3", "srun"] and "--kill-on-bad-exit=1" in step
  )
  assert step[-len(ARGS) - 2 :] == ["-m", "r2m_jax.main", *ARGS]
  assert again == ["scontrol", "requeue", "17"]
  head = (ROOT / "launch/slurm_gpu.sbatch").read_text()
  for wanted in ("--requeue", "--signal=TERM@120", "--ntasks-per-node=1", "--open-mode=append"):
    assert re.search(rf"^#SBATCH {wanted}", head, re.M), wanted


@pytest.mark.parametrize(
  "status, count, requeued",
  [
    (75, 0, True),
    (137, 3, True),
    (75, 100, False),
    (1, 0, False),
    (2, 0, False),
    (0, 0, False),
  ],
)
def test_slurm_queues_what_asks_to_be_resumed_again(tmp_path, status, count, requeued):
  """With an srun that ends with `status`: only a run that can be resumed is queued again, and not
  for ever.
  """
  tree = tmp_path / "tree"
  shutil.copytree(ROOT / "launch", tree / "launch")
  env = (tree / "launch/env.sh").read_text().replace("ensure_venv() {", "ensure_venv() {\n  return")
  (tree / "launch/env.sh").write_text(env)
  for name, body in (("srun", f"exit {status}"), ("scontrol", 'echo "$@" >>"$HOME/said"')):
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (tmp_path / name).chmod(0o755)
  env = {
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "HOME": str(tmp_path),
    "SLURM_SUBMIT_DIR": str(tree),
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "17",
    "SLURM_RESTART_COUNT": str(count),
  }
  result = subprocess.run(
    ["bash", str(tree / "launch/slurm_gpu.sbatch"), *ARGS], env=env, capture_output=True
  )
  assert result.returncode == status
  said = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
  assert said == ("requeue 17\n" if requeued else "")


def test_gke(bare, tmp_path):
  *before, command = dry(
    "gke_xpk.sh", *ARGS, **bare, CLUSTER="tpus", TYPE="v5e-16", SLICES="2", PROJECT="mine"
  )
  assert [line[0] for line in before] == ["git", "tar", "rm"] and "archive" in before[0]
  assert command[:3] == ["xpk", "workload", "create"]
  wanted = {
    "cluster": "tpus",
    "tpu-type": "v5e-16",
    "num-slices": "2",
    "project": "mine",
    "max-restarts": "100",
    "restart-on-exit-codes": "75",
    "termination-grace-period-seconds": "25",
  }
  assert {name: flag(command, name) for name in wanted} == wanted
  got, environ = reaches(flag(command, "command"), tmp_path, {})
  assert got == ARGS and environ["EXTRAS"] == "tpu"


TPU = dict(TPU="r2m", ZONE="us-east5-a", TYPE="v6e-16", IMAGE="v2-alpha-tpuv6e")


def test_tpu_vm_create_and_delete(bare):
  create, look = dry("tpu_vm.sh", "create", "--reserved", **bare, **TPU, SPOT="1", PROJECT="mine")
  assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "r2m"]
  assert {"--spot", "--reserved", "--project=mine", "--zone=us-east5-a"} <= set(create)
  assert flag(create, "node-id") == "r2m" and flag(create, "accelerator-type") == "v6e-16"
  assert look[4:6] == ["describe", "r2m"] and flag(look, "format") == "value(state.state)"
  (plain, _) = dry("tpu_vm.sh", "create", **bare, **TPU)
  assert "--spot" not in plain
  (delete,) = dry("tpu_vm.sh", "delete", **bare, **TPU)
  assert delete[3:6] == ["queued-resources", "delete", "r2m"] and "--force" in delete


def test_tpu_vm_start_reaches_the_program_on_every_worker(bare, tmp_path):
  (start,) = dry("tpu_vm.sh", "start", *ARGS, **bare, **TPU)
  assert (
    start[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "r2m"]
    and flag(start, "worker") == "all"
  )
  got, environ = reaches(flag(start, "command"), tmp_path, {})
  assert got == ARGS
  wanted = {
    "EXTRAS": "tpu",
    "KEEP_GOING": "1",
    "RESTARTS": "100",
    "STATUS_FILE": f"{tmp_path}/r2m.status",
  }
  assert {name: environ[name] for name in wanted} == wanted
  assert (tmp_path / "r2m.pid").read_text().strip().isdigit()
  (stop,) = dry("tpu_vm.sh", "stop", **bare, **TPU)
  sleeping = subprocess.Popen(["sleep", "60"])
  (tmp_path / "r2m.pid").write_text(str(sleeping.pid))
  subprocess.run(["bash", "-c", flag(stop, "command")], env={"HOME": str(tmp_path)}, check=True)
  assert sleeping.wait(100) == -signal.SIGTERM and flag(stop, "worker") == "all"


def test_tpu_vm_keep_makes_the_slice_again_and_asks_how_the_run_is(bare, tmp_path):
  lines = dry("tpu_vm.sh", "keep", *ARGS, **bare, **TPU, SPOT="1")
  kinds = [line[4] if line[0] == "gcloud" else line[0] for line in lines]
  assert kinds == ["delete", "create", "describe", "git", "scp", "ssh", "ssh", "ssh"]
  assert "--spot" in lines[1] and "ensure_venv tpu" in flag(lines[5], "command")
  ask = flag(lines[7], "command")

  def answer():
    return subprocess.run(
      ["bash", "-c", ask], env={"HOME": str(tmp_path)}, capture_output=True, text=True
    )

  assert answer().stdout == "none\n"
  (tmp_path / "r2m.pid").write_text(str(os.getpid()))
  assert answer().stdout == "running\n"
  (tmp_path / "r2m.status").write_text("75\n")
  assert answer().stdout == "75\n"


def test_tpu_vm_keep_survives_a_preemption(tmp_path):
  """A gcloud that loses the slice once: the slice is deleted, requested and started again, and then
  the run ends with 0.
  """
  (tmp_path / "gcloud").write_text("""#!/usr/bin/env bash
    echo "$4" >>"$HOME/said"
    count=$(grep -c -x describe "$HOME/said")
    case "$4:$*" in
      describe:*) case $count in 1) exit 1 ;; 4) echo SUSPENDED ;; *) echo ACTIVE ;; esac ;;
      ssh:*r2m.status*cat*) [ "$count" -ge 6 ] && echo 0 || echo running ;;
    esac
  """)
  (tmp_path / "gcloud").chmod(0o755)
  env = {
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "HOME": str(tmp_path),
    "POLL": "0.05",
    **TPU,
    "SPOT": "1",
  }
  script = [str(ROOT / "launch/tpu_vm.sh"), "keep", *ARGS]
  result = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr
  said = (tmp_path / "said").read_text().split()
  assert said.count("create") == 2 and said.count("delete") == 2 and said.count("scp") == 2, said


def keep_going(tmp_path, program: str, **env):
  """The process of `keep_going` from env.sh with a bash program."""
  script = f'source "{ROOT}/launch/env.sh"; keep_going bash -c "$PROGRAM"'
  env = os.environ | {"PROGRAM": program, "HOME": str(tmp_path), "RESTART_DELAY": "0"} | env
  return subprocess.Popen(
    ["bash", "-euo", "pipefail", "-c", script], env=env, stderr=subprocess.PIPE, text=True
  )


@pytest.mark.parametrize(
  "ends, restarts, status, starts",
  [
    ("0", 5, 0, 1),
    ("75 75 0", 5, 0, 3),
    ("75 1", 5, 1, 2),
    ("75 75 75 75", 2, 75, 3),
    ("2", 5, 2, 1),
    ("137 0", 5, 0, 2),
  ],
)
def test_a_program_that_asks_is_started_again(tmp_path, ends, restarts, status, starts):
  program = f"echo >>~/starts; set -- {ends}; shift $(($(wc -l <~/starts) - 1)); exit $1"
  run = keep_going(tmp_path, program, RESTARTS=str(restarts))
  assert run.wait(300) == status and (tmp_path / "starts").read_text().count("\n") == starts


def test_a_signal_to_the_script_reaches_the_program_and_is_no_reason_to_start_again(tmp_path):
  program = "trap 'sleep 0.3; echo saved >~/saved; exit 75' TERM; echo >>~/starts; while :; do sleep 0.05; done"
  run = keep_going(tmp_path, program)
  while not (tmp_path / "starts").exists():
    time.sleep(0.02)
  run.terminate()
  assert run.wait(300) == 75 and (tmp_path / "saved").exists()  # it waited for the end
  assert (tmp_path / "starts").read_text() == "\n"


def test_a_dry_run_needs_a_config_and_a_workdir(bare):
  for script, *action in (
    ["gke_xpk.sh"],
    ["tpu_vm.sh", "start"],
    ["tpu_vm.sh", "keep"],
    ["one_gpu.sh"],
  ):
    command = [shutil.which("bash"), str(ROOT / "launch" / script), *action, "--config=x"]
    result = subprocess.run(command, capture_output=True, text=True, env=bare | {"CLUSTER": "c"})
    assert result.returncode == 2 and "--workdir=" in result.stderr


@pytest.mark.parametrize("script", ["local.sh", "quickstart.sh"])
def test_a_script_installs_the_extra_that_is_asked_for(bare, tmp_path, script):
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  with open(tmp_path / "launch/env.sh", "a") as file:
    file.write('ensure_venv() { echo "extra=$1"; }\n')
  command = [shutil.which("bash"), str(tmp_path / "launch" / script), *ARGS]
  for extra in ("cuda12", ""):
    result = subprocess.run(command, capture_output=True, text=True, env=bare | {"EXTRAS": extra})
    assert result.stdout.startswith(f"extra={extra}\n"), result.stderr


def test_findings_are_made_by_one_command(bare):
  """Without data, only the gold-reward task; with data, both tasks, the second from the policy of
  the first run on text.
  """
  commands = dry("findings.sh", "/mnt/a b", "/mnt/my data", **bare)
  names = [flag(command, "config").removeprefix("configs/") for command in commands]
  assert names == [
    "lab.py",
    "lab.py:sweep",
    "quickstart.py",
    "quickstart.py",
    "real_small.py",
    "real_gold.py",
  ]
  assert dry("findings.sh", "/mnt/a b", **bare) == commands[:4]
  for command in commands:
    assert command[1:3] == ["-m", "r2m_jax.main"] and flag(command, "workdir").startswith(
      "/mnt/a b/"
    )
    config = flag(command, "config").partition(":")[0]
    assert (ROOT / config).is_file()
  assert [flag(command, "config.data.root") for command in commands[4:]] == ["/mnt/my data"] * 2
  assert flag(commands[5], "config.policy.path") == flag(commands[4], "workdir") + "/models/sft"
  command = [shutil.which("bash"), str(ROOT / "launch/findings.sh"), "--workdir=x"]
  result = subprocess.run(command, capture_output=True, text=True, env=bare)
  assert result.returncode == 2 and "usage:" in result.stderr


@pytest.fixture
def said_by_python(bare, tmp_path):
  """The arguments with which a script starts .venv/bin/python, printed by a stub."""
  stub = tmp_path / "bin" / "python"
  stub.parent.mkdir()
  stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
  stub.chmod(0o755)

  def said(script, *arguments):
    command = [shutil.which("bash"), str(ROOT / "launch" / script), *arguments]
    env = bare | {"R2M_VENV": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout

  return said


def test_the_fast_tests_are_files_that_exist(said_by_python):
  plain = said_by_python("test.sh").splitlines()
  assert plain[:2] == ["-m", "pytest"] and not [part for part in plain if ".py" in part]
  fast = said_by_python("test.sh", "--fast", "-x").splitlines()
  assert fast[:2] == ["-m", "pytest"] and "-x" in fast and "--fast" not in fast
  files = [part for part in fast if part.startswith("tests/")]
  assert len(files) == len(set(files)) > 5 and all((ROOT / name).is_file() for name in files)
  chosen = said_by_python("test.sh", "tests/test_ops.py", "-k", "check").splitlines()
  assert chosen[-3:] == ["tests/test_ops.py", "-k", "check"]


def test_lint_is_three_checks(bare):
  commands = dry("lint.sh", **bare)
  assert [command[2:4] for command in commands] == [["ruff", "check"], ["ruff", "format"], ["mypy"]]
  assert all(command[0].endswith("/bin/python") for command in commands)
  assert "--fix" not in commands[0] and "--check" in commands[1]


def test_the_wheel_is_tried_outside_of_the_clone(bare, tmp_path):
  commands = dry("wheel.sh", str(tmp_path), **bare | {"PATH": os.environ["PATH"]})
  build = next(command for command in commands if "build" in command and "--outdir" in command)
  assert build[-2:] == [f"{tmp_path}/dist", str(ROOT)]
  assert commands[-3:] == [
    ["cd", f"{tmp_path}/run"],
    ["../env/bin/r2m", "--help"],
    ["../env/bin/r2m", "--config=quickstart:test", "--workdir=quickstart"],
  ]


def test_the_lowest_versions_run_files_that_exist(bare, tmp_path):
  settings = bare | {"PATH": os.environ["PATH"], "R2M_LOWEST": str(tmp_path)}
  commands = dry("lowest.sh", **settings)
  install = next(command for command in commands if "lowest-direct" in command)
  assert install[0] == f"{tmp_path}/bin/python" and install[-1] == f"{ROOT}[test]"
  files = [part for part in commands[-1] if part.startswith("tests/")]
  assert len(files) == len(set(files)) > 10 and all((ROOT / name).is_file() for name in files)
  assert dry("lowest.sh", "-k", "rloo", **settings)[-1][-2:] == ["-k", "rloo"]


def test_the_page_names_every_script():
  page = (ROOT / "launch/README.md").read_text()
  for script in (
    path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")
  ):
    assert script in page, script
  assert len(page.splitlines()) <= 90

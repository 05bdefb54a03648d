"""The environment of the tests: a CPU with eight virtual devices, offline, with a cache of compiled
programs.

All of these are environment variables, set before anything imports jax. R2M_TEST_PLATFORM=cuda (or
tpu) runs on an accelerator.
"""

import gc
import os
import pathlib
import re
import sys
from importlib import metadata

DEVICES = 8  # sharding tests make 4x2 and 8x1 meshes of them

if "jax" in sys.modules:
  raise RuntimeError(
    "jax was imported before tests/conftest.py could set its platform; look for a pytest plugin"
  )

os.environ["JAX_PLATFORMS"] = os.environ.get("R2M_TEST_PLATFORM", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  _flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
  os.environ["XLA_FLAGS"] = " ".join(_flags).strip()

if (
  "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]
):  # tests compile more than they compute
  # a third of the time, and half of that again without an MLIR pipeline for each fusion
  os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
  if int(metadata.version("jaxlib").split(".")[1]) < 12:  # XLA aborts at an unknown flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

if "xla_cpu_collective_timeout_seconds" not in os.environ["XLA_FLAGS"]:
  # eight devices meet on fewer cores: on a busy machine one of them may come late, and XLA would
  # abort the process
  os.environ["XLA_FLAGS"] += "".join(
    f" --xla_cpu_collective_{name}_seconds=600" for name in ("timeout", "call_terminate_timeout")
  )

_cache = (
  pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  / "r2m_jax"
  / "jax"
)
_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(_cache)
if _isa := re.search(r"--xla_cpu_max_isa=(\w+)", os.environ["XLA_FLAGS"]):
  # JAX's name of a program does not include the instructions for which it was compiled
  if pathlib.Path(_cache).name != f"isa-{_isa[1]}":  # workers of pytest-xdist inherit the folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(_cache) / f"isa-{_isa[1]}")
for _name, _value in {
  "JAX_COMPILATION_CACHE_DIR": _cache,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",  # one program at a time: eight devices share few cores
  "PJRT_NPROC": str(8 * DEVICES),  # see process.spare_threads
  "HF_HUB_OFFLINE": "1",  # a test that needs a hub is a mistake: fail at once, not after a timeout
  "TRANSFORMERS_OFFLINE": "1",
  "TOKENIZERS_PARALLELISM": "false",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "MPLBACKEND": "Agg",
}.items():
  os.environ.setdefault(_name, _value)

import subprocess  # noqa: E402  after the environment is set

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]


# Files of half a minute or more on one core. They run first, so that at the end no worker is left
# with one of them while the others have nothing to do.
LONGEST = """
algorithm/test_variants models/test_generate parallel/test_mesh tasks/test_gold run/test_resume
test_notebook_smollm2 parallel/test_hosts lab/test_lab run/test_faults plan/test_plan
tasks/test_scratch tasks/test_evaluation lab/test_realtext test_notebook_models test_step
lab/test_lab_notes tasks/test_folders hf/test_weights models/test_attention
algorithm/test_enumeration models/test_shared tasks/test_serve test_notebook
""".split()


def pytest_collection_modifyitems(items):
  def place(item):
    name = item.path.relative_to(ROOT / "tests").with_suffix("").as_posix()
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)

  items.sort(key=place)  # within a file and among the others the order stays


def pytest_collection_finish(session):
  """Tracing makes many objects, and torch and jax are a million more. To look through all of them
  for garbage again and again takes a tenth of the time of tracing.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def smallest_run(tmp_path_factory):
  """(workdir, finished process) of the main job at its smallest size, run once by the command
  line.
  """
  workdir = tmp_path_factory.mktemp("smallest")
  args = ["--config=configs/quickstart.py:test", f"--workdir={workdir}"]
  command = [sys.executable, "-m", "r2m_jax.main", *args]
  return workdir, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)

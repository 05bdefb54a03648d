"""Host memory while a sharded checkpoint is read: the model once, plus at most twice its largest
tensor.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from r2m_jax.hf.weights import name_of
from r2m_jax.models import transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.parallel import sharding

ROOT = pathlib.Path(__file__).parents[2]
# VmHWM is the peak of resident memory, file pages of a mapped checkpoint included
PROGRAM = """
import json, sys
import jax
from r2m_jax.hf.weights import load_pretrained
from r2m_jax.parallel import sharding

def status(name):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

mesh = sharding.make_mesh((1, -1, 1))
jax.block_until_ready(jax.device_put(1.0))
before = status("VmRSS")
model = load_pretrained(sys.argv[1], mesh=mesh)
jax.block_until_ready(model.state)
print(json.dumps({"before": before, "peak": status("VmHWM")}))
"""


def fabricate(folder, arch: ArchConfig, shard_bytes: int) -> tuple[int, int]:
  """A float32 checkpoint of constants in shards; returns (bytes of all tensors, bytes of the
  largest).
  """
  shapes = jax.tree_util.tree_flatten_with_path(transformer.abstract(arch)[1])[0]
  entries = {}
  for path, x in shapes:
    path = sharding.path_name(path)
    template, stacked = name_of(arch, path)[0], path.startswith("layers/")
    shape = x.shape[1:] if stacked else x.shape
    for layer in range(arch.num_layers if stacked else 1):
      entries[template.format(layer)] = shape[::-1] if path.endswith("/kernel") else shape
  where, shard, size, count = {}, {}, 0, 0

  def flush():
    nonlocal shard, size, count
    file = f"model-{count:05d}.safetensors"
    save_file(shard, folder / file)
    where.update(dict.fromkeys(shard, file))
    shard, size, count = {}, 0, count + 1

  for name, shape in entries.items():
    shard[name] = np.full(shape, 0.01, np.float32)
    size += shard[name].nbytes
    if size > shard_bytes:
      flush()
  if shard:
    flush()
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": where})
  )
  (folder / "config.json").write_text(json.dumps(arch.to_hf()))
  sizes = [4 * int(np.prod(shape)) for shape in entries.values()]
  return sum(sizes), max(sizes)


@pytest.mark.parametrize(
  "layers, width",
  [
    pytest.param(4, 512, id="64MB"),
    pytest.param(32, 2048, id="2GB", marks=pytest.mark.long),
  ],
)
def test_peak_memory_while_loading(layers, width, tmp_path):
  big = width > 1000
  arch = ArchConfig(
    vocab_size=16000 if big else 4000,
    hidden_size=width,
    num_layers=layers,
    num_heads=8,
    num_kv_heads=2,
    head_dim=width // 8,
    intermediate_size=1088 if big else 1280,
  )
  total, largest = fabricate(tmp_path, arch, 400_000_000 if big else 10_000_000)
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(ROOT),
  }
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(tmp_path)],
    env=env,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  used = found["peak"] - found["before"]
  slack = 0 if big else 16 * 2**20  # libraries that load on first use
  print(
    f"model {total / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB, peak above start "
    f"{used / 1e6:.0f} MB"
  )
  assert used <= total + 2 * largest + slack

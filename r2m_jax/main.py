"""Entry point: python -m r2m_jax.main --config=configs/quickstart.py --workdir=runs/mine [--config.FIELD=VALUE ...]"""

import ctypes
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from r2m_jax.config import ConfigError, check_config

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/quickstart.py", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the report")
flags.mark_flags_as_required(["config", "workdir"])


def keep_freed_memory() -> None:
  """Tells glibc not to hand freed memory back at once, which costs small CPU runs most of their time in the kernel."""
  if sys.platform == "linux":
    try:
      libc = ctypes.CDLL("libc.so.6")
      libc.mallopt(-4, 0)  # M_MMAP_MAX
      libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
    except (OSError, AttributeError):
      pass  # another C library: slower, not wrong


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; settings are --config.FIELD=VALUE")
  config = CONFIG.value
  keep_freed_memory()
  logging.set_verbosity(logging.WARNING)  # checkpointing is chatty otherwise
  try:
    check_config(config)
    import jax  # after the checks: a config that cannot run is refused before any device is touched

    if config.dtype == "float64":
      jax.config.update("jax_enable_x64", True)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "r2m_jax" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    from r2m_jax import train

    train.run(config, Path(WORKDIR.value))
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main)

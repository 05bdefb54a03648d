#!/usr/bin/env bash
# The quickstart: an over-optimisation experiment with three seeds on this machine, also on a CPU, from a clean checkout.
#
#   ./launch/quickstart.sh                                 a new folder runs/quickstart-<date>-<time>
#   ./launch/quickstart.sh --workdir=runs/mine             a folder of your choice (an existing run is resumed)
#   ./launch/quickstart.sh --config.seeds=1                any knob of docs/config.md, here one seed
#   ./launch/quickstart.sh --config=configs/quickstart.py:test    the smallest size, to check the installation
#   EXTRAS=cuda12 ./launch/quickstart.sh                   install JAX for NVIDIA GPUs first (cuda13; tpu: for TPUs)
#
# The first start makes .venv and installs into it; later starts need no network. Paths are from the repository root.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_venv "${EXTRAS:-}"
fast_env
args=()
has_flag config "$@" || args+=("--config=configs/quickstart.py")
has_flag workdir "$@" || args+=("--workdir=runs/quickstart-$(date +%Y%m%d-%H%M%S)")
run_main ${args[@]+"${args[@]}"} "$@"

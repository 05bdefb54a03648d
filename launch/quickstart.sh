#!/usr/bin/env bash
# The quickstart: an over-optimisation experiment on this machine, CPU included, from a clean checkout.
#
#   ./launch/quickstart.sh                                 a new folder runs/quickstart-<date>-<time>
#   ./launch/quickstart.sh --workdir=runs/mine             the folder of your choice (a run already there is resumed)
#   ./launch/quickstart.sh --config.seed=1                 any knob of configs/default.py
#   ./launch/quickstart.sh --config=configs/quickstart.py:test    the smallest size, to see that all works
#
# The first start makes .venv and installs into it; later starts need no network. Paths are from the repository root.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_venv ""
fast_env
args=()
has_flag config "$@" || args+=("--config=configs/quickstart.py")
has_flag workdir "$@" || args+=("--workdir=runs/quickstart-$(date +%Y%m%d-%H%M%S)")
run_main ${args[@]+"${args[@]}"} "$@"

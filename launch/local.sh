#!/usr/bin/env bash
# Runs any config on this machine: on its CPU or its accelerators.
#
#   ./launch/local.sh --config=configs/quickstart.py --workdir=runs/mine
#   EXTRAS=cuda12 ./launch/local.sh --config=...   install JAX for NVIDIA GPUs first (cuda13; tpu: for TPUs)
#   KEEP_GOING=1 ./launch/local.sh --config=...    restart it if it ends with 75, "resume me", or is killed
#   DRY_RUN=1 ./launch/local.sh --config=...       only print the command

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if ! has_flag config "$@" || ! has_flag workdir "$@"; then
  echo "usage: $0 --config=configs/NAME.py --workdir=FOLDER [--config.KNOB=VALUE ...]" >&2
  exit 2
fi
if [ -n "${STATUS_FILE:-}" ]; then trap 'echo $? >"$STATUS_FILE"' EXIT; fi  # for readers outside
ensure_venv "${EXTRAS:-}"
fast_env
run_main "$@"

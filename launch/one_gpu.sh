#!/usr/bin/env bash
# Runs on a machine with NVIDIA GPUs; --config.mesh="(-1, 1, 1)" uses all of them.
#
#   ./launch/one_gpu.sh --config=configs/NAME.py --workdir=runs/mine
#   GPU=1 ./launch/one_gpu.sh --config=...        only the second GPU
#   EXTRAS=cuda13 ./launch/one_gpu.sh --config=...    JAX for CUDA 13 instead of 12
#   DRY_RUN=1 ./launch/one_gpu.sh --config=...    only print the command
#
# On a spot machine put this line into its start-up script: after a preemption the same command resumes from the last checkpoint.

set -euo pipefail

if [ -n "${GPU:-}" ]; then export CUDA_VISIBLE_DEVICES=$GPU; fi
EXTRAS=${EXTRAS:-cuda12} KEEP_GOING=1 exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$@"

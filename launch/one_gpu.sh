#!/usr/bin/env bash
# One machine with an NVIDIA GPU; all of its GPUs with --config.mesh="(-1, 1, 1)".
#
#   ./launch/one_gpu.sh --config=configs/NAME.py --workdir=runs/mine
#   GPU=1 ./launch/one_gpu.sh --config=...        the second GPU alone
#   EXTRAS=cuda13 ./launch/one_gpu.sh --config=...    JAX for CUDA 13 instead of 12
#   DRY_RUN=1 ./launch/one_gpu.sh --config=...    print the command and run nothing
#
# On a spot machine put this line into its start-up script: after a preemption the same command goes on from what is saved.

set -euo pipefail

if [ -n "${GPU:-}" ]; then export CUDA_VISIBLE_DEVICES=$GPU; fi
EXTRAS=${EXTRAS:-cuda12} KEEP_GOING=1 exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$@"

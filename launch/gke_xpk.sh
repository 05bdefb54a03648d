#!/usr/bin/env bash
# One workload on a TPU cluster of Google Kubernetes Engine, through xpk (installed and signed in beforehand).
#
#   CLUSTER=my-cluster TYPE=v5p-32 ./launch/gke_xpk.sh --config=configs/NAME.py --workdir=/data/runs/mine
#
#   CLUSTER   the cluster's name, required        TYPE     chips of one slice (xpk's --tpu-type), v5p-32
#   WORKLOAD  r2m-<date>-<time>                   SLICES   how many slices, 1
#   IMAGE     python:3.12-slim, any image with Python 3.11 or later; the last commit is added to it
#   RESTARTS  how often the pods restart, 100: if one is lost, preempted (spot nodes) or ends with 75, all restart,
#             and the run resumes from the last checkpoint
#   GRACE     seconds from a preemption's SIGTERM to the end of a pod, 25
#   DRY_RUN=1 prints the commands and runs none
#
# PROJECT and ZONE default to gcloud's settings. Follow it with `xpk workload list`, end it with `xpk workload delete`.
#
# Pods keep no files, so --workdir must be on a volume that the cluster mounts in all of them, attached once beforehand:
#   xpk storage attach NAME --cluster=my-cluster --type=gcsfuse --bucket=BUCKET --size=1000 --mount-point=/data \
#     --auto-mount=true --readonly=false
# The program itself finds the other hosts (jax.distributed), so nothing about them is passed here.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

CLUSTER=${CLUSTER:?name the cluster: CLUSTER=... $0 --config=... --workdir=...}
WORKLOAD=${WORKLOAD:-r2m-$(date +%m%d-%H%M%S)}
TYPE=${TYPE:-v5p-32}
SLICES=${SLICES:-1}
IMAGE=${IMAGE:-python:3.12-slim}
if ! has_flag config "$@" || ! has_flag workdir "$@"; then
  echo "usage: CLUSTER=NAME $0 --config=configs/NAME.py --workdir=/data/FOLDER [--config.KNOB=VALUE ...]" >&2
  exit 2
fi
where=()
if [ -n "${PROJECT:-}" ]; then where+=("--project=$PROJECT"); fi
if [ -n "${ZONE:-}" ]; then where+=("--zone=$ZONE"); fi

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
pack_tree "$tree/r2m_jax.tar.gz"
run tar xzf "$tree/r2m_jax.tar.gz" -C "$tree"
run rm "$tree/r2m_jax.tar.gz"
run xpk workload create \
  --cluster="$CLUSTER" --workload="$WORKLOAD" --tpu-type="$TYPE" --num-slices="$SLICES" ${where[@]+"${where[@]}"} \
  --base-docker-image="$IMAGE" --script-dir="$tree" \
  --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=75 --termination-grace-period-seconds="${GRACE:-25}" \
  --command="EXTRAS=tpu bash launch/local.sh $(quoted "$@")"

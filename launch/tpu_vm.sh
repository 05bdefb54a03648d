#!/usr/bin/env bash
# One TPU VM or a pod slice of them, through gcloud. Every worker runs the same command.
#
#   export TPU=r2m ZONE=us-east5-a TYPE=v6e-16 IMAGE=v2-alpha-tpuv6e      (PROJECT too, or gcloud's default)
#   ./launch/tpu_vm.sh create
#   ./launch/tpu_vm.sh setup                                    send the last commit, install on every worker
#   ./launch/tpu_vm.sh start --config=configs/NAME.py --workdir=/mnt/shared/runs/mine
#   ./launch/tpu_vm.sh logs                                     follow worker 0; Ctrl-C leaves the run alone
#   ./launch/tpu_vm.sh stop                                     end the run; `start` with the same folder resumes it
#   ./launch/tpu_vm.sh delete
#
# On more than one worker --workdir has to be a place that all of them reach, such as a bucket mounted on each. How the
# workers find each other is the program's business (jax.distributed), so nothing about them is passed here.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

TPU=${TPU:-r2m}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v6e-16}
IMAGE=${IMAGE:-v2-alpha-tpuv6e}
WHERE=("--zone=$ZONE")
if [ -n "${PROJECT:-}" ]; then WHERE+=("--project=$PROJECT"); fi
# TPU images carry an older Python than the package needs; an image with a new one skips this.
PYTHON_SETUP=${PYTHON_SETUP:-'command -v python3.12 >/dev/null || (sudo add-apt-repository -y ppa:deadsnakes/ppa &&
  sudo apt-get -o DPkg::Lock::Timeout=300 install -y -q python3.12 python3.12-venv)'}

on() {  # on WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker="$1" --command="$2"
}

action=${1:-help}
shift || true
case $action in
  create)
    gcloud compute tpus tpu-vm create "$TPU" "${WHERE[@]}" --accelerator-type="$TYPE" --version="$IMAGE" "$@"
    ;;
  setup)
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    pack_tree "$tree/r2m_jax.tar.gz"
    gcloud compute tpus tpu-vm scp "$tree/r2m_jax.tar.gz" "$TPU:" "${WHERE[@]}" --worker=all
    on all "set -e; mkdir -p r2m_jax; tar xzf r2m_jax.tar.gz -C r2m_jax; $PYTHON_SETUP
      cd r2m_jax; set -u; . launch/env.sh; ensure_venv tpu"
    ;;
  start)
    on all "cd r2m_jax && EXTRAS=tpu setsid nohup ./launch/local.sh $(printf '%q ' "$@") >~/r2m.log 2>&1 </dev/null &
      sleep 1"
    ;;
  logs) on 0 "tail -n 100 -F r2m.log" ;;
  stop) on all "pkill -TERM -u \$USER -f 'python -m [r]2m_jax.main' || true" ;;
  delete) gcloud compute tpus tpu-vm delete "$TPU" "${WHERE[@]}" "$@" ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

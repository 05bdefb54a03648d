#!/usr/bin/env bash
# Runs on one TPU VM or a pod slice, through gcloud's queued resources. Every worker runs the same command.
#
#   export TPU=r2m ZONE=us-east5-a TYPE=v6e-16 IMAGE=v2-alpha-tpuv6e SPOT=1    (PROJECT too, or gcloud's default)
#   ./launch/tpu_vm.sh create                                   requests the slice and waits until it is ready
#   ./launch/tpu_vm.sh setup                                    send the last commit, install on every worker
#   ./launch/tpu_vm.sh start --config=configs/NAME.py --workdir=/mnt/shared/runs/mine
#   ./launch/tpu_vm.sh logs                                     follow worker 0; Ctrl-C does not stop the run
#   ./launch/tpu_vm.sh stop                                     save and end the run; `start` with the same folder resumes
#   ./launch/tpu_vm.sh delete
#   ./launch/tpu_vm.sh keep --config=... --workdir=...          all of these, until the run has ended: a preempted slice
#                                                               is requested again and the run resumes
#
# DRY_RUN=1 only prints the commands. SPOT=1 requests spot machines. A process that is killed, or that ends with 75
# ("resume me") because another one was killed, is restarted on its worker, at most RESTARTS times (100).
#
# With several workers --workdir must be a place that all of them can reach, such as a bucket mounted on each. The program
# itself finds the other workers (jax.distributed), so nothing about them is passed here.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

TPU=${TPU:-r2m}
TYPE=${TYPE:-v6e-16}
IMAGE=${IMAGE:-v2-alpha-tpuv6e}
WHERE=("--zone=${ZONE:=us-east5-a}")
if [ -n "${PROJECT:-}" ]; then WHERE+=("--project=$PROJECT"); fi
# TPU images have an older Python than the package needs; images with a newer one skip this.
PYTHON_SETUP=${PYTHON_SETUP:-'command -v python3.12 >/dev/null || (sudo add-apt-repository -y ppa:deadsnakes/ppa && '\
'sudo apt-get -o DPkg::Lock::Timeout=300 install -y -q python3.12 python3.12-venv)'}
POLL=${POLL:-60}  # seconds
ASK='if [ -e ~/r2m.status ]; then cat ~/r2m.status; elif kill -0 $(cat ~/r2m.pid); then echo running; else echo none; fi'

on() {  # on WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker="$1" --command="$2"
}

queued() {  # queued ACTION ARGS...
  local action=$1
  shift
  run gcloud compute tpus queued-resources "$action" "$TPU" "${WHERE[@]}" "$@"
}

state() { queued describe --format='value(state.state)' 2>/dev/null || echo NONE; }

create() {
  local spot=()
  if [ -n "${SPOT:-}" ]; then spot=(--spot); fi
  queued create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="$IMAGE" ${spot[@]+"${spot[@]}"} "$@"
  if [ -n "${DRY_RUN:-}" ]; then state; return; fi
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED | NONE) echo "$TPU is $(state)" >&2; return 1 ;; esac
    sleep "$POLL"
  done
}

setup() {
  local tree
  tree=$(mktemp -d)
  pack_tree "$tree/r2m_jax.tar.gz"
  run gcloud compute tpus tpu-vm scp "$tree/r2m_jax.tar.gz" "$TPU:" "${WHERE[@]}" --worker=all
  rm -rf "$tree"
  on all "set -e; mkdir -p r2m_jax; tar xzf r2m_jax.tar.gz -C r2m_jax; $PYTHON_SETUP; cd r2m_jax; set -u; $(
    )source launch/env.sh; ensure_venv tpu"
}

start() {
  # a separate session; its number is for `stop` and its final status for `keep`
  local shell="echo \$\$ >~/r2m.pid; exec ./launch/local.sh \"\$@\""
  on all "cd r2m_jax && rm -f ~/r2m.status && EXTRAS=tpu KEEP_GOING=1 RESTARTS=${RESTARTS:-100} $(
    )STATUS_FILE=\$HOME/r2m.status setsid nohup bash -c $(quoted "$shell") r2m $(quoted "$@") $(
    )>~/r2m.log 2>&1 </dev/null & sleep 1"
}

keep() {  # until the run has a status other than 75, whatever happens to the slice in between
  local status
  while :; do
    if [ -n "${DRY_RUN:-}" ] || [ "$(state)" != ACTIVE ]; then
      queued delete --force --quiet || true
      create || { sleep "$POLL"; continue; }
      setup && start "$@" || { sleep "$POLL"; continue; }
    fi
    status=$(on 0 "$ASK") || status=""
    if [ -n "${DRY_RUN:-}" ]; then echo "$status"; return; fi
    case ${status##*$'\n'} in
      "" | running) ;;  # unreachable at the moment, or running
      75 | none) start "$@" ;;
      *) return "${status##*$'\n'}" ;;
    esac
    sleep "$POLL"
  done
}

action=${1:-help}
shift || true
case $action in start | keep)
  if ! has_flag config "$@" || ! has_flag workdir "$@"; then
    echo "usage: $0 $action --config=configs/NAME.py --workdir=FOLDER [--config.KNOB=VALUE ...]" >&2
    exit 2
  fi ;;
esac
case $action in
  create | setup | start | keep) "$action" "$@" ;;
  logs) on 0 "tail -n 100 -F r2m.log" ;;
  stop) on all "kill -TERM \$(cat ~/r2m.pid) 2>/dev/null || true" ;;
  delete) queued delete --force "$@" ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

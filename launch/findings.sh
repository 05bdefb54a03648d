#!/usr/bin/env bash
# Runs everything behind docs/findings.md, one run after another; each resumes where it stopped.
#
#   ./launch/findings.sh runs/findings             the gold-reward task: laboratory, KL weights, the paper's figures
#   ./launch/findings.sh runs/findings DATA        and the task on real text; configs/real_small.py describes DATA
#   DRY_RUN=1 ./launch/findings.sh runs/findings   only print the commands
#
# A laboratory's processes divide its arms: to use more cores, start its command several times before this one. The
# settings, which were chosen on separate seeds, are in configs/lab.py; configs/lab.py:tune repeats the choice.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: $0 FOLDER [DATA]" >&2
  exit 2
fi
runs=$1 data=${2:-}
ensure_venv "${EXTRAS:-}"
fast_env
main() { (run_main "$@"); }

main --config=configs/lab.py --workdir="$runs/lab"
main --config=configs/lab.py:sweep --workdir="$runs/lab"
main --config=configs/quickstart.py --workdir="$runs/paper" --config.arms="('vanilla','scaled','r2m','noise')"
main --config=configs/quickstart.py --workdir="$runs/paper" --config.arms="('vanilla','scaled','r2m','noise')" \
  --config.task=analyse
if [ -n "$data" ]; then
  main --config=configs/real_small.py --workdir="$runs/real_small" --config.data.root="$data"
  main --config=configs/real_gold.py --workdir="$runs/real_gold" --config.data.root="$data" \
    --config.policy.path="$runs/real_small/models/sft"
fi

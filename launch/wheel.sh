#!/usr/bin/env bash
# Tests what `pip install` gives: builds the sdist and, from it, the wheel, installs the wheel in an empty environment, and
# runs the smallest quickstart there, outside the clone.
#
#   ./launch/wheel.sh              in a temporary folder, which is removed
#   ./launch/wheel.sh FOLDER       keeps FOLDER/dist (the two archives), FOLDER/env and FOLDER/run
#   DRY_RUN=1 ./launch/wheel.sh    only print the commands

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

folder=${1:-}
if [ -z "$folder" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
python=$(find_python)
fast_env
unset PYTHONPATH  # the wheel is tested

run mkdir -p "$folder/run"
run "$python" -m venv "$folder/tools"
run "$folder/tools/bin/python" -m pip install -q build
run "$folder/tools/bin/python" -m build --outdir "$folder/dist" "$ROOT"
run "$python" -m venv "$folder/env"
run "$folder/env/bin/python" -m pip install -q --no-compile "$folder"/dist/*.whl
run cd "$folder/run"
run ../env/bin/r2m --help
run ../env/bin/r2m --config=quickstart:test --workdir=quickstart

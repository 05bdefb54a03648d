#!/usr/bin/env bash
# Tests the lowest versions that setup.py allows: installs them in a separate environment and runs a core of the tests.
# Arguments go to pytest.
#
#   ./launch/lowest.sh                      the files below
#   ./launch/lowest.sh tests/test_ops.py    others
#   DRY_RUN=1 ./launch/lowest.sh            only print the commands
#
# R2M_LOWEST is the folder of the environment (default: .cache/lowest in the repository).

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# equations, whole steps, text, sampling, Hugging Face folders, checkpoints and resumed runs
CORE=(
  tests/test_ops.py tests/test_config.py tests/test_step.py tests/algorithm/test_advantages.py
  tests/algorithm/test_losses.py tests/models/test_reward.py tests/models/test_logprobs.py tests/models/test_lora.py
  tests/models/test_generate.py tests/data/test_data.py tests/data/test_text.py tests/data/test_tfds.py
  tests/hf/test_weights.py tests/run/test_checkpoint.py tests/run/test_resume.py tests/tasks/test_serve.py
)
venv=${R2M_LOWEST:-$ROOT/.cache/lowest}
python=$(find_python)
fast_env

run "$python" -m venv --clear "$venv"
run "$venv/bin/python" -m pip install -q uv
run "$venv/bin/python" -m uv pip install -q --python "$venv/bin/python" --resolution lowest-direct \
  --editable "$ROOT[test]"
run cd "$ROOT"
run "$venv/bin/python" -m uv pip list --python "$venv/bin/python"
if [ $# -eq 0 ]; then set -- -n auto --maxprocesses=2 --dist=loadfile "${CORE[@]}"; fi
run "$venv/bin/python" -m pytest --durations=15 "$@"

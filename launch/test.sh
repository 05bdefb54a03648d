#!/usr/bin/env bash
# The tests, on CPU (eight virtual devices), from a clean checkout. Arguments go to pytest.
#
#   ./launch/test.sh                       all tests that are not marked `long`
#   ./launch/test.sh --fast                the core, for the inner loop: under 90 seconds once compiled
#   ./launch/test.sh -m long               only those that are: slower checks, run before a release
#   ./launch/test.sh tests/algorithm/test_losses.py -k rloo
#   R2M_TEST_PLATFORM=cuda ./launch/test.sh    on an accelerator instead of the virtual devices
#
# Compiled programs are kept between runs, so the second run is faster than the first.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Files of a few seconds each. They cover the equations, whole steps, the config, rows and the rules of the house.
FAST=(
  tests/test_ops.py tests/test_house.py tests/test_config.py
  tests/algorithm/test_advantages.py tests/algorithm/test_losses.py tests/algorithm/test_schedules.py
  tests/models/test_reward.py tests/models/test_logprobs.py tests/parallel/test_rows.py
  tests/data/test_data.py tests/data/test_text.py tests/test_golden.py
)

ensure_venv test
fast_env
cd "$ROOT"
if [ "${1:-}" = --fast ]; then
  shift
  set -- -n auto --maxprocesses=2 --dist=loadfile "$@" "${FAST[@]}"
fi
# the suite spends more time compiling than computing, on one core each, so it uses several workers, a file each
if [ $# -eq 0 ]; then set -- -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder; fi
exec "$PY" -m pytest --durations=15 "$@"

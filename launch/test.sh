#!/usr/bin/env bash
# The tests, on CPU (eight virtual devices), from a clean checkout. Arguments go to pytest.
#
#   ./launch/test.sh                       everything that is not marked `long`
#   ./launch/test.sh -m long               only what is: slower checks, run before a release
#   ./launch/test.sh tests/algorithm/test_losses.py -k rloo
#   R2M_TEST_PLATFORM=cuda ./launch/test.sh    on an accelerator instead of the virtual devices
#
# Compiled programs are kept between runs, so the second run is faster than the first.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_venv test
fast_env
cd "$ROOT"
# the whole suite compiles more than it computes, on one core each: several workers, a file each
if [ $# -eq 0 ]; then set -- -n auto --maxprocesses=4 --dist=loadfile; fi
exec "$PY" -m pytest --durations=15 "$@"

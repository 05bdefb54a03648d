#!/usr/bin/env bash
# Checks lint, format and types, like continuous integration. Nothing is changed.
#
#   ./launch/lint.sh                       stops at the first check that fails
#   .venv/bin/ruff check --fix .           fixes what lint can fix
#   .venv/bin/ruff format .                formats
#
# The settings are in pyproject.toml.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_venv test
cd "$ROOT"
run "$PY" -m ruff check .
run "$PY" -m ruff format --check .
run "$PY" -m mypy

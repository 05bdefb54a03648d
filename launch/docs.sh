#!/usr/bin/env bash
# Builds the site of docs/ into docs/_build/html. A warning, such as a broken link between pages, is an error.
#
#   ./launch/docs.sh             builds it; open docs/_build/html/index.html
#   ./launch/docs.sh --links     also checks every link to other sites, which needs a network

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_venv docs
cd "$ROOT"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}  # docstrings come from the imported package
sphinx=("$PY" -m sphinx -W --keep-going -q)
run "${sphinx[@]}" -b html docs docs/_build/html
if has_flag links "$@"; then run "${sphinx[@]}" -b linkcheck docs docs/_build/links; fi
if [ -z "${DRY_RUN:-}" ]; then echo "site     $ROOT/docs/_build/html/index.html"; fi

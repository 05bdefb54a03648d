# shellcheck shell=bash
# Functions shared by the scripts of this folder. Source it; it only defines names.
#
#   ensure_venv EXTRAS      a virtual environment with this package and EXTRAS ("", "test", "tpu", ...), made once
#   fast_env                compilation cache, quiet logs and a memory allocator setting that suits JAX on CPU
#   has_flag NAME ARGS...   true if --NAME or --NAME=value is among ARGS
#   run_main ARGS...        python -m r2m_jax.main ARGS, from the repository root
#   pack_tree FILE          the committed tree as FILE (.tar.gz), for another machine
#   run COMMAND...          runs a command
#   quoted ARGS...          prints them quoted for a shell
#   keep_going COMMAND...   restarts it if it ends with 75 ("resume me") or is killed, at most RESTARTS times
#
# DRY_RUN=1  nothing is installed, sent or run: each command is printed instead, quoted for a shell
# KEEP_GOING=1  run_main restarts the program; SIGTERM or Ctrl-C to the script ends both
# RESTARTS   maximum number of restarts (default: 100)
# R2M_VENV   folder of the environment (default: .venv in the repository)
# R2M_PYTHON the interpreter for making it (default: the first of python3, python, python3.13 ... that is 3.11 or later)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${R2M_VENV:-$ROOT/.venv}
PY=$VENV/bin/python

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local name tried=""
  for name in ${R2M_PYTHON:-python3 python python3.13 python3.12 python3.11}; do
    if new_enough "$name"; then
      command -v "$name"
      return
    fi
    tried="$tried $name ($("$name" --version 2>/dev/null || echo "not there"))"
  done
  echo "r2m_jax needs Python 3.11 or later. Tried:$tried" >&2
  echo "Install one (for instance python3.11 with its venv module), or name it: R2M_PYTHON=/path/to/python $0" >&2
  return 1
}

ensure_venv() {
  local extras=${1:-} sum stamp python
  if [ -n "${DRY_RUN:-}" ]; then return; fi
  # The stamp records what was installed: for this setup.py, at this place. A later run then needs no network.
  sum=$( (cat "$ROOT/setup.py" && echo "$ROOT") | cksum)
  stamp=$VENV/.r2m-installed-${sum%% *}
  if installed "$stamp" "$extras"; then return; fi
  mkdir -p "$VENV"
  (
    if command -v flock >/dev/null 2>&1; then flock 9; fi  # if two start at once, the second waits and then finds the stamp
    if installed "$stamp" "$extras"; then exit 0; fi
    if ! new_enough "$PY" || ! "$PY" -m pip --version >/dev/null 2>&1; then
      python=$(find_python)
      echo "Making a virtual environment in $VENV ($("$python" --version))"
      if ! "$python" -m venv "$VENV"; then
        echo "$python cannot make a virtual environment: install its venv module (python3-venv on Debian and Ubuntu)." >&2
        exit 1
      fi
    fi
    echo "Installing r2m_jax${extras:+[$extras]} into $VENV: a minute or two the first time, nothing later"
    # The build tool is installed into the environment, so that a repeated install needs nothing from outside. Byte code
    # is left to the first import of each module: compiling all of it would double the time of the install.
    "$PY" -m pip install -qq --disable-pip-version-check "setuptools>=77"
    "$PY" -m pip install -qq --no-compile --disable-pip-version-check --no-build-isolation --use-pep517 \
      --editable "$ROOT${extras:+[$extras]}"
    touch "$stamp-${extras:-base}"
  ) 9>"$VENV/.r2m-lock"
}

installed() {  # installed STAMP EXTRAS; any extras include the base
  if [ -n "$2" ]; then [ -e "$1-$2" ]; else compgen -G "$1-*" >/dev/null; fi
}

fast_env() {
  local cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/r2m_jax/jax
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache}
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
  export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=${JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES:-0}
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
  export PYTHONUNBUFFERED=1
  unset PYTHONDONTWRITEBYTECODE  # the environment is installed without byte code, so each start would compile again
  # By default glibc returns large freed blocks to the kernel at once, and JAX on CPU then spends its time getting them again.
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1000000000000}
}

has_flag() {
  local name=$1 arg
  shift
  for arg in "$@"; do
    case $arg in --"$name" | --"$name"=* | -"$name" | -"$name"=*) return 0 ;; esac
  done
  return 1
}

run() {
  if [ -z "${DRY_RUN:-}" ]; then "$@"; return; fi
  quoted "$@"
  echo
}

quoted() {  # prints its arguments quoted for a shell
  local arg space="" mark="'\\''"
  for arg in "$@"; do
    case $arg in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) printf "%s'%s'" "$space" "${arg//\'/$mark}" ;;
      *) printf '%s%s' "$space" "$arg" ;;
    esac
    space=" "
  done
}

run_main() {
  cd "$ROOT"
  set -- "$PY" -m r2m_jax.main "$@"
  if [ -n "${DRY_RUN:-}" ]; then
    run "$@"
  elif [ -n "${KEEP_GOING:-}" ]; then
    keep_going "$@"
  else
    exec "$@"
  fi
}

keep_going() {
  local left=${RESTARTS:-100} status child stopping=""
  trap 'stopping=1; kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'stopping=1' INT  # a terminal also sends Ctrl-C to the program
  while :; do
    status=0
    "$@" &
    child=$!
    # a trapped signal ends `wait` before the program has ended
    while wait "$child" || status=$?; kill -0 "$child" 2>/dev/null; do status=0; done
    if [ "$status" != 75 ] && [ "$status" -lt 128 ] || [ -n "$stopping" ] || [ "$left" -le 0 ]; then
      return "$status"
    fi
    left=$((left - 1))
    echo "The program can be resumed (status $status): once more, $left times left" >&2
    sleep "${RESTART_DELAY:-10}"
  done
}

pack_tree() {
  if [ -n "${DRY_RUN:-}" ]; then
    run git -C "$ROOT" archive --format=tar.gz --output="$1" HEAD
    return
  fi
  if [ -n "$(git -C "$ROOT" status --porcelain)" ]; then
    echo "The working tree has uncommitted changes: what is sent is the last commit, without them." >&2
  fi
  git -C "$ROOT" archive --format=tar.gz --output="$1" HEAD
}

# Sourced by quickstart.sh and test.sh: a virtual environment with what requirement files ask for, made once.

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

find_python() {
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
       "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"; return 0
    fi
  done
  fail "Python 3.11 or newer is needed and was not found. On Debian or Ubuntu: apt-get install python3 python3-venv"
}

# ensure_venv STAMP FILE... : install the package and the requirements of FILE... into .venv, unless STAMP says that it is done.
ensure_venv() {
  stamp=".venv/$1.stamp"; shift
  python=$(find_python) || exit 1
  wanted=$(cat setup.py rdma_comm/*.[ch] "$@" | cksum)
  if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return 0; fi
  if [ ! -x .venv/bin/python ]; then
    printf 'making a virtual environment in .venv\n'
    "$python" -m venv .venv || { rm -rf .venv; fail "the venv module does not work. On Debian or Ubuntu: apt-get install python3-venv"; }
  fi
  printf 'installing packages (once; about 300 MB to download, 1 GB on disk) ...\n'
  requirements=""
  for file in "$@"; do requirements="$requirements -r $file"; done
  # shellcheck disable=SC2086  # the list is meant to be split
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $requirements ||
    fail "pip could not install the packages of $*. Is the package index reachable, and 2 GB of disk free?"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . ||
    fail "pip could not install this project"
  # On all cores, which pip does not; what is left out is compiled when it is imported, most of it never.
  .venv/bin/python -m compileall -q -j 0 -x '/(tests|testing|models)/' .venv/lib >/dev/null 2>&1 || true
  printf '%s' "$wanted" > "$stamp"
}

#!/bin/sh
# Installs what the tests need into .venv and runs all of them. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh

# What the RDMA tests need, a virtual machine with soft-RoCE, and Mooncake's engine. Without it they are skipped and say so.
packages="qemu-system-x86 kmod iproute2 xz-utils libibverbs1 libibverbs-dev ibverbs-providers libnuma1 libcurl4 python3-pyverbs"
machines=tests/rdma/test_in_vm.py
prepare_machines() {
  libraries=$(ldconfig -p 2>/dev/null | grep -cE 'lib(ibverbs\.so\.1|numa\.so\.1|curl\.so\.4) ' || true)
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v qemu-system-x86_64 && [ -e /usr/include/infiniband/verbs.h ] && [ "$libraries" -ge 3 ] && [ -e /usr/lib/python3/dist-packages/pyverbs ]; } >/dev/null; then
    printf 'installing %s (once) ...\n' "$packages"
    # shellcheck disable=SC2086  # the list is meant to be split
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } >/dev/null 2>&1 ||
      printf 'they cannot be installed here: tests that need them are skipped\n' >&2
  fi
  [ $# != 0 ] || tests/rdma/vm.sh --fetch >/dev/null 2>&1 || true # what it lacks the tests say
}
prepare_machines "$@" & # its downloads beside pip's
ensure_venv test requirements.txt requirements-test.txt
wait $!
.venv/bin/ruff check .
.venv/bin/mypy --no-error-summary
run() { .venv/bin/python -m pytest -q -p no:cacheprovider --durations=15 "$@"; }
[ $# = 0 ] || { run "$@"; exit; }

output=$(mktemp)
trap 'rm -f "$output"' EXIT
status=0

# Two emulated machines need both cores. Then two rows at once: what computes all the time, and the rest, which often waits.
acceptance=tests/acceptance
answers="$acceptance/test_equality.py $acceptance/test_ranks.py $acceptance/test_prefix_cache.py"
simulation=tests/engine/test_simulation.py
run "$machines" -k two_machines || status=1
# Beside another row, two of torch's threads wait for each other on two cores: acceptance tests get one.
{
  computing=0
  run "$machines" -k 'not two_machines' || computing=1
  run "$simulation" || computing=1
  # shellcheck disable=SC2086  # the list is meant to be split
  OMP_NUM_THREADS=1 run $answers || computing=1
  exit "$computing"
} >"$output" 2>&1 &
run tests --ignore "$machines" --ignore "$simulation" --ignore "$acceptance" || status=1
# shellcheck disable=SC2046,SC2086
OMP_NUM_THREADS=1 run "$acceptance" $(printf -- '--ignore %s ' $answers) || status=1
wait $! || status=1
cat "$output"
exit "$status"

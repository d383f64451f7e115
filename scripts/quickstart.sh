#!/bin/sh
# From a bare machine to a streamed answer: installs into .venv, starts Redis, a prefill and a decode instance, asks a question.
#   scripts/quickstart.sh          stays up until Ctrl-C
#   scripts/quickstart.sh --once   ends after the answer
# Further flags are those of `fastdeploy-pd up`.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh
ensure_venv run requirements.txt
exec .venv/bin/fastdeploy-pd up "$@"

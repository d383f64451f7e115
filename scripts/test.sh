#!/bin/sh
# Installs what the tests need into .venv and runs all of them. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh
ensure_venv test requirements.txt requirements-test.txt
.venv/bin/ruff check .
.venv/bin/mypy --no-error-summary
exec .venv/bin/python -m pytest -q "$@"

#!/usr/bin/env bash
# Runs the tests: bash tests/run.sh [pytest arguments]. Makes .venv first if there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1 # multi-rank tests run one thread per rank
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
exec "$VENV/bin/pytest" --numprocesses 2 --dist loadfile "$@"

#!/usr/bin/env bash
# Runs the checks and the tests, and makes .venv first if there is none:
#
#     bash tests/run.sh [pytest arguments]         # everything
#     bash tests/run.sh unit [pytest arguments]    # ruff, and the tests of one process: a minute
set -euo pipefail
# shellcheck source=SCRIPTDIR/../examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1 # multi-rank tests run one thread per rank
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
if [ "${1:-}" = unit ]; then
    shift
    exec "$VENV/bin/pytest" --numprocesses 2 --dist loadfile \
        -m "not distributed and not slow and not slurm and not gpu" "$@"
fi
"$VENV/bin/pyright"
"$VENV/bin/shellcheck" --external-sources examples/*.sh examples/*/*.sh slurm/*.sh tests/*.sh tests/*/*.sh .ci/run
exec "$VENV/bin/pytest" --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Runs the tests that depend on the version of megatron-core (marked `versions`) with the newest that
# is supported, under Python 3.12, and those of the Triton kernels, which torch for CUDA brings Triton
# for. Makes .venv-3.12 first, which takes 5 GB, if there is none:
#
#     bash tests/versions.sh [pytest arguments]
#
# PYTHON names the interpreter to build it from. Where there is none, a line says so and nothing runs.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv-3.12

find_python() { # a shim of pyenv may be there and not run
    local python
    for python in ${PYTHON:-} python3.12 "$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python; do
        if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

make_environment() {
    local python wanted
    wanted=$(cksum <"$ROOT/constraints-3.12.txt")
    if [ -f "$VENV/.complete" ] && [ "$(cat "$VENV/.complete")" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    if [ -z "$python" ]; then
        echo "no Python 3.12 on this machine: nothing is tested with the newest megatron-core" >&2
        exit 0
    fi
    echo "== installing the tested packages of Python 3.12 into $VENV"
    "$python" -m venv --clear "$VENV"
    "$VENV/bin/pip" install --quiet --disable-pip-version-check uv
    "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" \
        --requirements "$ROOT/constraints-3.12.txt"
    echo "$ROOT" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
    echo "$wanted" >"$VENV/.complete"
}

make_environment
cd "$ROOT"
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # uv compiles nothing: every rank would take three times as long to start
# What goes on under the other megatron-core and back.
export OTHER_PYTHON=$ROOT/.venv/bin/python
[ -x "$OTHER_PYTHON" ] || OTHER_PYTHON=$VENV/bin/python
mapfile -t files < <(grep -rl --include='test_*.py' 'mark.versions' tests)
exec "$VENV/bin/python" -m pytest -m versions -p no:cacheprovider "${files[@]}" "$@"

# shellcheck shell=bash
# Sourced by examples/quickstart.sh and tests/run.sh: makes .venv with the tested packages, once.
# Afterwards $ROOT is the project's directory and $VENV/bin holds python, torchrun and pytest.
# PYTHON names the interpreter to build .venv from (default: python3.11, else the next that works).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() { # shims of pyenv may be there and not run
    local python
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    fail "no Python of 3.11 or newer found as ${PYTHON:-python3}; install one or set PYTHON"
}

constraints_of() { # the versions that were tested with this interpreter
    if "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        echo "$ROOT/constraints-3.12.txt"
    else
        echo "$ROOT/constraints.txt"
    fi
}

# Modules are compiled when they are first imported: most never are, and all of them take a minute.
pip_install() { "$VENV/bin/pip" install --no-compile "$@"; }

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$1")
    # PyPI's Linux wheel brings gigabytes of CUDA; the CPU wheel has its own version and index.
    if [ "$(uname -s)" = Linux ]; then
        pip_install "torch==$version+cpu" 2>/dev/null ||
            pip_install "torch==$version" \
                --index-url https://download.pytorch.org/whl/cpu && return
        echo "== no wheel of torch for the CPU alone: the usual one brings gigabytes of CUDA"
    fi
    pip_install "torch==$version"
}

make_environment() {
    local python constraints wanted
    python=$VENV/bin/python
    [ -x "$VENV/bin/pip" ] || python=$(find_python) || exit 1
    constraints=$(constraints_of "$python")
    wanted=$(cat "$constraints" "$ROOT/setup.cfg" | cksum)
    if [ -f "$VENV/.complete" ] && [ "$(cat "$VENV/.complete")" = "$wanted" ]; then
        return
    fi
    "$python" -c 'import ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv"
    echo "== installing the tested packages into $VENV (once, a few minutes)"
    [ -x "$VENV/bin/pip" ] || "$python" -m venv --clear "$VENV"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install_torch "$constraints" || fail "torch could not be installed; see the message above"
    pip_install --constraint "$constraints" --editable "${ROOT}[report,test]" ||
        fail "the packages could not be installed; see the message above"
    echo "$wanted" >"$VENV/.complete"
}

unset PYTHONDONTWRITEBYTECODE # or every process compiles all that it imports
make_environment
export CUDA_VISIBLE_DEVICES= # the quickstart and the tests are for the CPU, whatever else there is

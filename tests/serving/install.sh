#!/usr/bin/env bash
# Installs the browser that tests of the server's page drive, on Debian; on Ubuntu it is a snap, which
# needs a running system.
set -euo pipefail

if ! command -v chromium > /dev/null; then
    ((EUID == 0)) || { echo "root must run tests/serving/install.sh: chromium is missing" >&2 && exit 1; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends chromium
fi

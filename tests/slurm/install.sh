#!/usr/bin/env bash
# Installs what the tests of slurm/ start a cluster with, on Debian and Ubuntu; starts no service.
set -euo pipefail

for program in munged slurmctld slurmd sbatch; do
    if ! command -v "$program" > /dev/null; then
        ((EUID == 0)) || { echo "root must run tests/slurm/install.sh: $program is missing" >&2 && exit 1; }
        export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # 1: packages start no services
        apt-get update -q
        apt-get install -q -y --no-install-recommends munge slurm-wlm
        break
    fi
done

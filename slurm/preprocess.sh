#!/bin/bash
# Preprocess a corpus on a Slurm cluster: a job array over partitions, then a job that merges; with
# --deduplicate, --hold-out N or --sample N a second array and a second merge.
#
#     bash slurm/preprocess.sh PARTITIONS [SBATCH OPTION ...] -- [TOOL OPTION ...]
#
#     bash slurm/preprocess.sh 64 --cpus-per-task=16 --mem=32G --time=8:00:00 -- \
#         --input /data/laion --format img2dataset --output /data/shards/laion --deduplicate image
#
# The tool is tools/preprocess_data.py. Run this where sbatch is, with the Python environment active:
# the jobs use that Python, and as many --workers as Slurm gives CPUs to a task. There are no more
# partitions than the input has splits. A merge waits for its array and is cancelled if a partition
# fails; whatever stopped the chain, the same command goes on from there.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    echo "usage: bash slurm/preprocess.sh PARTITIONS [SBATCH OPTION ...] -- [TOOL OPTION ...]" >&2
    exit 2
}

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "the first argument is the number of partitions, not '${1:-}'"
partitions=$1
shift
sbatch_options=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        -a* | --array* | -d* | --dependency* | --wrap*) fail "$1 is set by this script" ;;
    esac
    sbatch_options+=("$1")
    shift
done
(($#)) || fail "-- must stand before the options of the tool"
shift
for option in "$@"; do
    case ${option%%=*} in
        --partition | --merge | --plan | --workers) fail "$option is set by this script" ;;
    esac
done
command -v sbatch > /dev/null || fail "there is no sbatch on this machine"
python=$(command -v python) || fail "there is no python; activate the environment"
tool=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tools" && pwd)/preprocess_data.py

# The plan also proves that the options are right before anything waits in a queue.
plan=$("$python" "$tool" "$@" --plan) || exit 1
read -r splits _ readings _ <<< "$plan"
((splits > 0)) || fail "the input has no splits: $plan"
((partitions <= splits)) || partitions=$splits

call=$(printf '%q ' "$python" -u "$tool" "$@")
# submit COMMAND [SBATCH OPTION ...] prints the job's number.
submit() {
    local command=$1
    shift
    sbatch --parsable --job-name=preprocess --chdir="$PWD" --kill-on-invalid-dep=yes \
        "${sbatch_options[@]}" "$@" <<< $'#!/bin/bash\nexec '"$command" | cut -d ';' -f 1
}

# shellcheck disable=SC2016 # the job expands these
share='--partition "$SLURM_ARRAY_TASK_ID"/'"$partitions"' --workers "${SLURM_CPUS_PER_TASK:-1}"'
after=()
for ((reading = 1; reading <= readings; reading++)); do
    array=$(submit "$call $share" --array="0-$((partitions - 1))" "${after[@]}")
    merge=$(submit "$call --merge" --dependency="afterok:$array")
    after=(--dependency="afterok:$merge")
    echo "reading $reading of $readings: array $array of $partitions partitions, merge $merge"
done

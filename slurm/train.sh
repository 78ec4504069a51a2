# A training job, sourced by pretrain.sh and finetune.sh: train.sh CONFIG ARGUMENT ...
#
# Every life of a job starts one rank per GPU and goes on from the run's last checkpoint.
#
#   the ranks end with   because                              the job
#   0                    the run is finished                  ends
#   2                    configuration, data or checkpoint    ends: trying again does not help
#                        cannot be used
#   75                   SIGTERM, SIGUSR1 or SIGUSR2 came,    is requeued
#                        300 seconds before the time limit
#                        at the latest; a checkpoint is saved
#   130                  SIGINT came; a checkpoint is saved   ends
#   anything else        a crash                              is requeued, MAX_CRASHES (3) times in
#                                                             a row without a new checkpoint
#
# Where requeueing is not allowed, `sbatch --array=1-20%1 slurm/pretrain.sh ...` has as many lives:
# each element goes on where the one before it stopped, and the last one needed cancels the rest.
# A job that is cancelled stays so. `scancel --signal=USR1 JOB` asks for a checkpoint and a new life,
# `scancel --signal=INT JOB` for a checkpoint and the end.
#
# train.output is runs/<name of CONFIG> in the folder of sbatch, if neither CONFIG nor the arguments
# name it. Every rank has a log in train.output/logs/<job>-<restart>; rank 0's is in the
# job's own too.
# shellcheck shell=bash disable=SC2154 # the job script sets $project

set -uo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

config=$1
shift
if (($#)) && [[ $1 != *=* ]]; then
    config=$1
    shift
fi
overrides=("$@")
# shellcheck source=slurm/env.sh
source "$project/slurm/env.sh"

if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    scontrol show job "$SLURM_JOB_ID" | grep -q '^ *JobId=.* ArrayTaskThrottle=1\b' ||
        fail "two elements at a time would write the same run; submit with --array=1-20%1"
fi
if [[ ${SLURM_GPUS_ON_NODE:-$SLURM_NTASKS_PER_NODE} != "$SLURM_NTASKS_PER_NODE" ]]; then
    fail "a rank needs a GPU: --ntasks-per-node=$SLURM_NTASKS_PER_NODE, but Slurm gave" \
        "$SLURM_GPUS_ON_NODE GPUs of a node; submit with equal --ntasks-per-node and --gpus-per-node"
fi

# Slurm's signals reach this shell too. It lives on to read how the ranks ended.
trap : INT TERM USR1 USR2

# srun takes --export=NONE and not --cpus-per-task from the job, and --gpus-per-node from the script
# even if the job has its GPUs by --gres; without it a step has all of the job's. Every rank sees all
# GPUs of its node, which NCCL needs to go over NVLink, and takes the one of LOCAL_RANK; blocks put
# neighbouring ranks on the CPUs of one socket, where their GPUs are.
unset SLURM_GPUS_PER_NODE
start() {
    srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --gpu-bind=none \
        --distribution=block:block --input=none "${container[@]}" "$@"
}

# Another life for the run.
again() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        return
    fi
    case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r') in
        RUNNING* | *TimeLimit)
            scontrol requeue "$SLURM_JOB_ID" ||
                echo "error: Slurm does not requeue this job; submit it with --array=1-20%1" >&2
            ;;
        *) echo "slurm: the job was cancelled" ;;
    esac
}

# No other life.
enough() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
    fi
}

# Proves the configuration on one node, and says where the run is.
output=$(start --nodes=1 --ntasks=1 --ntasks-per-node=1 "${python[@]}" -c '
import sys
from megatron_owl2 import Owl2Error, load_config
try:
    print(load_config(sys.argv[1], sys.argv[2:]).train.output)
except Owl2Error as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
' "$config" "${overrides[@]}")
status=$?
case $status in
    0) ;;
    2 | 130)
        enough
        exit "$status"
        ;;
    138 | 140 | 143) # SIGUSR1, SIGUSR2, SIGTERM, before a rank could hear of it
        echo "slurm: the run was stopped before it began and goes on later"
        again
        exit 75
        ;;
    *)
        echo "error: the configuration could not be read (exit code $status)" >&2
        exit "$status"
        ;;
esac
if [[ -z $output ]]; then
    output=runs/$(basename "${config%.*}")
    overrides+=("train.output=$output")
fi
logs=$output/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
crashes=$output/logs/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}.crashes
mkdir -p "$logs" && : > "$logs/rank-00000.log" || exit 1

newest() {
    cat "$output/checkpoints/latest" 2> /dev/null
}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
# Below what Linux gives to clients; another one for each job of a node, and for each life of a job,
# as the first may have been somebody else's.
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 997 * ${SLURM_RESTART_COUNT:-0}) % 20000))

before=$(newest)
echo "slurm: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NTASKS ranks on" \
    "$SLURM_JOB_NODELIST, logs in $logs, last checkpoint: ${before:-none}"
(
    trap '' INT TERM USR1 USR2
    exec tail --lines=+1 --follow --pid=$$ "$logs/rank-00000.log"
) &
# A rank that dies takes the job with it; ranks that are done wait 10 minutes for those that are not.
start --ntasks="$SLURM_NTASKS" --kill-on-bad-exit=1 --wait=600 bash "$project/slurm/rank.sh" "$logs" \
    "${python[@]}" -m megatron_owl2.train --config "$config" "${overrides[@]}"
status=$?
sleep 2 # for the last lines to be shown
for code in 75 130 2; do
    [[ ! -e $logs/exit-$code ]] || status=$code
done

case $status in
    0)
        echo "slurm: the run is finished"
        enough
        ;;
    2)
        echo "slurm: the run cannot go on like this: $(grep --no-filename '^error: ' "$logs"/* | head -n 1)"
        enough
        ;;
    130)
        echo "slurm: the run was interrupted, last checkpoint: $(newest)"
        enough
        ;;
    75)
        echo "slurm: the run was stopped and goes on later, last checkpoint: $(newest)"
        rm -f "$crashes"
        again
        ;;
    *)
        [[ $(newest) == "$before" ]] || rm -f "$crashes"
        echo "$logs" >> "$crashes"
        count=$(wc -l < "$crashes")
        echo "slurm: crash $count without a new checkpoint (exit code $status), see $logs"
        if ((count > ${MAX_CRASHES:-3})); then
            echo "slurm: no further start after $count crashes in a row"
            enough
        else
            again
        fi
        ;;
esac
exit "$status"

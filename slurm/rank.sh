#!/bin/bash
# One rank of a job, started by srun: rank.sh FOLDER COMMAND ... runs COMMAND as the rank that Slurm
# says it is, with FOLDER/rank-00000.log as its output, and leaves FOLDER/exit-CODE if it ends with a
# code that srun would not tell.
set -uo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# Slurm signals every process of a job step. This shell has a code to pass on; a signal that is
# handled, rather than ignored, has its default effect in COMMAND again.
trap : INT TERM USR1 USR2

folder=$1
shift
# Here, as srun would take a % or a backslash in the path for something else.
exec > "$folder/rank-$(printf %05d "$RANK").log" 2>&1 || exit 1
"$@"
status=$?
case $status in
    2) touch "$folder/exit-2" ;; # srun tells the greatest code, which is that of the ranks it kills
    75 | 130) # a success for srun, or it would kill the ranks that are still on their way out
        touch "$folder/exit-$status"
        exit 0
        ;;
esac
exit "$status"

#!/bin/bash
# Stage 2 on a Slurm cluster, one rank per GPU:
#
#     sbatch slurm/finetune.sh [CONFIG] [section.key=value ...]
#
#     sbatch slurm/finetune.sh data.tokenizer=start/tokenizer.model \
#         stage.initial_checkpoint=runs/pretrain 'data.sources=[{path: /data/llava, weight: 1}]'
#
# CONFIG is examples/7b/finetune.yaml if none is given. What sbatch is told on the command line wins
# over the lines below. How a run goes on after signals, time limits and crashes: slurm/train.sh.
#SBATCH --job-name=owl2-finetune
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300

# Slurm runs a copy of this file from another folder; it remembers where the original lies.
command=$(scontrol show job "${SLURM_JOB_ID:-}" 2> /dev/null | sed -n 's/^ *Command=//p' | head -n 1)
project=${command%%/slurm/finetune.sh*}
if [[ -z ${SLURM_JOB_ID:-} || $project == "$command" ]]; then
    echo "error: this is a job script; submit it: sbatch slurm/finetune.sh ..." >&2
    exit 2
fi
source "$project/slurm/train.sh" "$project/examples/7b/finetune.yaml" "$@"

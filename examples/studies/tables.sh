#!/usr/bin/env bash
# The paper's ablations, small: Tables 5 (modality split x data), 6 (ViT), 7 (queries), 8 (resolution).
#
#     bash examples/studies/tables.sh [QUICKSTART]      (default: runs/quickstart)
#
# QUICKSTART is the folder of a quickstart, whose corpus, shards and vision start are used; the results
# lie in its studies/tables. The language start has told scenes again and never answered: questions are
# learned in stage 2, from texts and from images. SEEDS is taken from the environment (default: "1 2 3").
# Two runs go side by side, one thread each; runs that are done are not done again.
set -euo pipefail
QUICKSTART=${1:-}
[ -z "$QUICKSTART" ] || QUICKSTART=$(realpath -m "$QUICKSTART")
# shellcheck source=SCRIPTDIR/../environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
QUICKSTART=${QUICKSTART:-$ROOT/runs/quickstart}
[ -f "$QUICKSTART/done/parts" ] ||
    fail "$QUICKSTART holds no quickstart; run bash examples/quickstart.sh $QUICKSTART first"
CONFIGS=$ROOT/examples/studies/tables
TOOLS=$ROOT/tools
SEEDS=${SEEDS:-1 2 3}
DIRECTORY=$QUICKSTART/studies/tables
mkdir -p "$DIRECTORY/done" "$DIRECTORY/logs" "$DIRECTORY/scores" "$DIRECTORY/start"
cd "$DIRECTORY"
for part in corpus shards start/clip; do
    ln -sfn "$QUICKSTART/$part" $part
done
export PATH="$VENV/bin:$PATH" QUICKSTART CONFIGS TOOLS OMP_NUM_THREADS=1

run_once() { # run_once NAME COMMAND...: with a log, unless it is done
    local name=$1
    shift
    [ ! -f "done/$name" ] || return 0
    # A shell of its own: within `if` a function goes on after a command that fails.
    if bash -euo pipefail -c '"$@"' run_once "$@" >"logs/$name" 2>&1; then
        touch "done/$name"
        echo "$(date +%H:%M) $name"
    else
        tail -n 20 "logs/$name" >&2
        return 1
    fi
}

language_start() {
    rm -rf start/llama
    python "$TOOLS/convert_to_hf.py" --checkpoint "$QUICKSTART/runs/text" --layout llama \
        --output start/llama
}

train() { # train SEED OUTPUT START FILES...: files of settings go one over the other
    local seed=$1 output=$2 start=$3
    shift 3
    torchrun --standalone --nproc-per-node 1 -m megatron_owl2.train --config "$@" \
        "train.output=$output" "stage.initial_checkpoint=$start" \
        "train.seed=$seed" "data.seed=$seed"
}

pretrain() { # pretrain SEED VARIANT
    local run=runs/pretrain-$2-$1 files=("$CONFIGS/pretrain.yaml")
    [ "$2" = base ] || files+=("$CONFIGS/$2.yaml")
    rm -rf "$run-start"
    python "$TOOLS/convert_from_hf.py" --vision-model start/clip --language-model start/llama \
        --config "${files[@]}" "train.seed=$1" --output "$run-start"
    train "$1" "$run" "$run-start" "${files[@]}"
    rm -rf "$run-start"
}

finetune() { # finetune SEED NAME VARIANT-OF-STAGE-1 VARIANTS...
    local seed=$1 name=$2 start=runs/pretrain-$3-$1 run=runs/$2-$1
    local files=("$CONFIGS/finetune.yaml") set
    shift 3
    for variant in "$@"; do files+=("$CONFIGS/$variant.yaml"); done
    train "$seed" "$run" "$start" "${files[@]}"
    for set in seen heldout; do
        python "$TOOLS/evaluate.py" --checkpoint "$run" --task vqav2 --data corpus/eval/$set \
            --output "scores/$name-$seed-$set" --min-new-tokens 1
    done
    python "$TOOLS/evaluate.py" --checkpoint "$run" --task text --data corpus/eval/text \
        --output "scores/$name-$seed-text" --min-new-tokens 1
}
export -f run_once language_start train pretrain finetune

runs_two_at_a_time() { # each line: NAME COMMAND ARGUMENTS
    xargs -P 2 -L 1 bash -euo pipefail -c 'run_once "$@"' run_once
}

# A run's name, its variant of stage 1, and its settings of stage 2.
RUNS="base base
text base text_only
multimodal base multimodal_only
no_split no_split_pretrain no_split
no_split_text no_split_pretrain no_split text_only
no_split_multimodal no_split_pretrain no_split multimodal_only
frozen_vit frozen_vit frozen_vit
layer_decay layer_decay layer_decay
queries_2 queries_2 queries_2
queries_4 queries_4 queries_4
queries_8 queries_8 queries_8
queries_32 queries_32 queries_32
resolution_28 base resolution_28
resolution_42 base resolution_42"

run_once language_start language_start
for seed in $SEEDS; do
    cut -d' ' -f2 <<<"$RUNS" | sort -u | while read -r variant; do
        echo "pretrain-$variant-$seed pretrain $seed $variant"
    done
done | runs_two_at_a_time
for seed in $SEEDS; do
    while read -r name stage_1 variants; do
        echo "$name-$seed finetune $seed $name $stage_1${variants:+ $variants}"
    done <<<"$RUNS"
done | runs_two_at_a_time
python "$ROOT/examples/studies/tables.py" . "$SEEDS"

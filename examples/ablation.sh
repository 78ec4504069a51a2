#!/usr/bin/env bash
# Table 5 of the paper, small: the modality split on and off x instruction tuning on text alone,
# on images alone, and on both jointly, each with several seeds.
#
#     bash examples/ablation.sh [DIRECTORY]           (default: runs/quickstart)
#
# DIRECTORY is that of a quickstart, whose corpus, shards and starts are used. SEEDS and STEPS are
# taken from the environment (default: "1 2 3", 300 of the instruction tuning). Runs that are done
# are not done again. The table lies in DIRECTORY/ablation/table.md, its picture beside it.
set -euo pipefail
DIRECTORY=${1:-}
[ -z "$DIRECTORY" ] || DIRECTORY=$(realpath -m "$DIRECTORY")
# shellcheck source=SCRIPTDIR/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
DIRECTORY=${DIRECTORY:-$ROOT/runs/quickstart}
CONFIGS=$ROOT/examples/tiny
TOOLS=$ROOT/tools
SEEDS=${SEEDS:-1 2 3}
STEPS=${STEPS:-300}
[ -f "$DIRECTORY/done/parts" ] ||
    fail "$DIRECTORY holds no quickstart; run bash examples/quickstart.sh $DIRECTORY first"
cd "$DIRECTORY"
export PATH="$VENV/bin:$PATH" CONFIGS TOOLS STEPS
export OMP_NUM_THREADS=1 # two runs side by side, one thread each
mkdir -p ablation/done ablation/logs ablation/scores

run_once() { # run_once NAME COMMAND...: with a log, unless it is done
    local name=$1
    shift
    [ ! -f "ablation/done/$name" ] || return 0
    if "$@" >"ablation/logs/$name" 2>&1; then
        touch "ablation/done/$name"
        echo "$name"
    else
        tail -n 20 "ablation/logs/$name" >&2
        return 1
    fi
}

train() { # train CONFIG OUTPUT SEED SPLIT OVERRIDES...
    local config=$1 output=$2 seed=$3 split=()
    [ "$4" = on ] || split=("model.decoder.modality_split=[]")
    shift 4
    torchrun --standalone --nproc-per-node 1 -m megatron_owl2.train --config "$CONFIGS/$config.yaml" \
        "train.output=$output" "train.seed=$seed" "data.seed=$seed" train.log_interval=50 \
        validation.interval=0 "${split[@]}" "$@"
}

import_start() { # import_start SPLIT
    local split=()
    [ "$1" = on ] || split=("model.decoder.modality_split=[]")
    rm -rf "ablation/start-$1"
    python "$TOOLS/convert_from_hf.py" --vision-model start/clip --language-model start/llama \
        --config "$CONFIGS/pretrain.yaml" "${split[@]}" --output "ablation/start-$1"
}

pretrain() { # pretrain SPLIT SEED
    local trainable=()
    [ "$1" = on ] || trainable=("stage.trainable=['vision_model.*','abstractor.*']")
    train pretrain "ablation/pretrain-$1-$2" "$2" "$1" parallel.tensor=1 \
        "stage.initial_checkpoint=ablation/start-$1" "${trainable[@]}"
}

finetune() { # finetune SPLIT DATA SEED
    local name=$1-$2-$3 questions='{path: shards/questions, weight: 6}'
    local captions='{path: shards/captions, weight: 2}' two='{path: shards/two_images, weight: 1}'
    local text='{path: shards/text, weight: 3}' sources=()
    case $2 in
        text) sources=("$text") ;;
        images) sources=("$questions" "$captions" "$two") ;;
        joint) sources=("$questions" "$captions" "$two" "$text") ;;
    esac
    train finetune "ablation/$name" "$3" "$1" "train.steps=$STEPS" \
        "stage.initial_checkpoint=ablation/pretrain-$1-$3" \
        "data.sources=[$(IFS=,; echo "${sources[*]}")]"
    python "$TOOLS/evaluate.py" --checkpoint "ablation/$name" --task vqav2 \
        --data corpus/eval/seen --output "ablation/scores/$name-vqav2" --min-new-tokens 1
    python "$TOOLS/evaluate.py" --checkpoint "ablation/$name" --task text \
        --data corpus/eval/text/sharegpt_text.json --output "ablation/scores/$name-text" \
        --min-new-tokens 1
}
export -f run_once train import_start pretrain finetune

two_at_a_time() { # each line: NAME COMMAND ARGUMENTS
    xargs -P 2 -L 1 bash -euo pipefail -c 'run_once "$@"' run_once
}

printf '%s\n' "start-on import_start on" "start-off import_start off" | two_at_a_time
for seed in $SEEDS; do
    for split in on off; do echo "pretrain-$split-$seed pretrain $split $seed"; done
done | two_at_a_time
for seed in $SEEDS; do
    for data in text images joint; do
        for split in on off; do echo "$split-$data-$seed finetune $split $data $seed"; done
    done
done | two_at_a_time
python "$ROOT/examples/ablation_table.py" ablation "$SEEDS"

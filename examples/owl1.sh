#!/usr/bin/env bash
# mPLUG-Owl, version 1, small, on two CPU cores: both stages, export to Hugging Face, answers, scores.
# It takes corpus, shards, vision start and language start of the quickstart, which comes before.
#
#     bash examples/owl1.sh [DIRECTORY] [QUICKSTART]      (default: runs/owl1 runs/quickstart)
#
# Steps that are done are not done again; a step that was interrupted goes on or starts over. To
# start from the beginning, remove DIRECTORY.
set -euo pipefail
DIRECTORY=${1:-}
QUICKSTART=${2:-}
[ -z "$DIRECTORY" ] || DIRECTORY=$(realpath -m "$DIRECTORY")
[ -z "$QUICKSTART" ] || QUICKSTART=$(realpath -m "$QUICKSTART")
# shellcheck source=SCRIPTDIR/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
DIRECTORY=${DIRECTORY:-$ROOT/runs/owl1}
QUICKSTART=${QUICKSTART:-$ROOT/runs/quickstart}
[ -f "$QUICKSTART/done/parts" ] ||
    fail "$QUICKSTART has no corpus and no starts yet; run bash examples/quickstart.sh first"
CONFIGS=$ROOT/examples/owl1_tiny
TOOLS=$ROOT/tools
STEPS=7
mkdir -p "$DIRECTORY/done" "$DIRECTORY/logs"
cd "$DIRECTORY"
for part in corpus shards start; do
    ln -sfn "$QUICKSTART/$part" $part
done
export PATH="$VENV/bin:$PATH"
# shellcheck source=SCRIPTDIR/steps.sh
source "$ROOT/examples/steps.sh"

import_parts() {
    rm -rf checkpoints/start
    python "$TOOLS/convert_from_hf.py" --vision-model start/clip --language-model start/llama \
        --config "$CONFIGS/pretrain.yaml" --output checkpoints/start
}

pretrain() { run_stage 2 pretrain; }

finetune() { run_stage 2 finetune; }

export_model() {
    rm -rf model adapter checkpoints/merged scores # which are of the model before
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/finetune --output model
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/finetune --output adapter --adapter
    # The run has its adapters apart; the export is held against the model with them inside.
    python "$TOOLS/convert_from_hf.py" --owl1 model --output checkpoints/merged
    python "$TOOLS/verify_checkpoint.py" --checkpoint checkpoints/merged --against model
}

answer() {
    ask 000000000001 "Provide a one-sentence caption for the provided image."
    ask 000000000003 "how many shapes are there ?"
}

evaluate() {
    local set task
    for set in seen heldout; do
        for task in vqav2 pope caption; do
            echo --task $task --data corpus/eval/$set --output scores/$set-$task
        done
    done | two_at_a_time evaluate.py --checkpoint model --min-new-tokens 1
}

report() {
    local set task arguments=(--run pretrain=runs/pretrain --run finetune=runs/finetune)
    for task in vqav2 pope caption; do
        for set in seen heldout; do
            arguments+=(--evaluation "$set=scores/$set-$task")
        done
    done
    python "$TOOLS/report.py" "${arguments[@]}" --output . \
        --title "mPLUG-Owl (version 1), tiny, on two CPU cores"
}

step import "import the quickstart's CLIP and LLaMA as the first checkpoint of version 1" import_parts
step pretrain "stage 1: ViT and abstractor learn, language model frozen, tensor parallel" pretrain
step finetune "stage 2: adapters learn from texts and images, half of each in every step" finetune
step export "export to Hugging Face, and prove the export with transformers" export_model
step answer "ask the exported model about new images" answer
step evaluate "score it on new images" evaluate
rm -f done/report
step report "report" report

echo
echo "HF model     $PWD/model"
echo "adapter      $PWD/adapter"
echo "scores       $PWD/scores.json"
echo "picture      $PWD/report.png"

#!/usr/bin/env bash
# mPLUG-Owl2's whole life, small, on two CPU cores: corpus, shards, a vision and a language start,
# pre-training, instruction tuning, export to Hugging Face, answers, scores.
#
#     bash examples/quickstart.sh [DIRECTORY]        (default: runs/quickstart)
#     SEED=7 bash examples/quickstart.sh runs/seven  (another start and another order of the data)
#
# Steps that are done are not done again; a step that was interrupted goes on or starts over. To
# start from the beginning, remove DIRECTORY.
set -euo pipefail
DIRECTORY=${1:-}
[ -z "$DIRECTORY" ] || DIRECTORY=$(realpath -m "$DIRECTORY")
# shellcheck source=SCRIPTDIR/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
DIRECTORY=${DIRECTORY:-$ROOT/runs/quickstart}
CONFIGS=$ROOT/examples/tiny
TOOLS=$ROOT/tools
STEPS=11
mkdir -p "$DIRECTORY/done" "$DIRECTORY/logs"
cd "$DIRECTORY"
export PATH="$VENV/bin:$PATH"
# shellcheck source=SCRIPTDIR/steps.sh
source "$ROOT/examples/steps.sh"

make_corpus() { python "$ROOT/data_prep/shapes.py" --output corpus --workers 2; }

make_shards() {
    local set images="--images corpus/instructions"
    # What is packed into rows is measured with the tokenizer.
    local measure="--tokenizer corpus/tokenizer/tokenizer.model"
    {
        shard pairs img2dataset pairs "$measure"
        instructions questions instructions/llava_shapes.json "$measure $images"
        instructions captions instructions/llava_captions.json "$measure $images"
        instructions two_images instructions/llava_two_images.json "$measure $images"
        instructions text text/sharegpt_instructions.json "$measure"
        shard retellings conversations text/sharegpt_retellings.json "$measure"
        shard text_start conversations text/sharegpt_start.json "$measure"
        for set in seen heldout; do
            shard $set coco eval/$set/captions_val.json "--images corpus/eval/$set/images"
        done
    } | two_at_a_time preprocess_data.py
}

shard() { # shard NAME FORMAT INPUT OPTIONS
    echo "--format $2 --input corpus/$3 --output shards/$1 $4"
}

instructions() { # instructions NAME INPUT OPTIONS: for training, and 200 samples for validation
    shard "$1" conversations "$2" "$3 --hold-out 200"
    shard "validation/$1" conversations "$2" "$3 --hold-out 200 --only-held-out"
}

start_parts() {
    start_stage 1 vision
    run_stage 1 text
    finish_stage vision
    run_stage 2 chat
}

write_parts() { # as the published CLIP and LLaMA-2 directories look
    rm -rf start
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/vision --layout clip --output start/clip
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/chat --layout llama --output start/llama
}

import_parts() {
    rm -rf checkpoints/start
    python "$TOOLS/convert_from_hf.py" --vision-model start/clip --language-model start/llama \
        --config "$CONFIGS/pretrain.yaml" --output checkpoints/start
}

pretrain() { run_stage 2 pretrain; }

finetune() { run_stage 2 finetune; }

export_model() {
    rm -rf model scores # which are of the model before
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/finetune --output model
    python "$TOOLS/verify_checkpoint.py" --checkpoint runs/finetune --against model
}

answer() { # the exported model, on images it has never seen
    ask 000000000001 "Provide a one-sentence caption for the provided image."
    ask 000000000002 "Provide a one-sentence caption for the provided image."
    ask 000000000003 "how many shapes are there ?"
}

evaluate() { # "heldout" has colour-shape pairs that no training image has
    local set
    {
        for set in seen heldout; do
            for task in vqav2 pope caption; do
                echo --task $task --data corpus/eval/$set --output scores/$set-$task
                echo --task $task --data corpus/eval/$set --output scores/$set-$task-blind --blind
            done
        done
        echo --task text --data corpus/eval/text/sharegpt_text.json --output scores/text
    } | two_at_a_time evaluate.py --checkpoint model --min-new-tokens 1
}

report() {
    local task arguments=()
    for stage in vision text chat pretrain finetune; do arguments+=(--run "$stage=runs/$stage"); done
    for task in vqav2 pope caption; do
        for set in seen heldout; do
            arguments+=(--evaluation "$set=scores/$set-$task")
            arguments+=(--evaluation "$set=scores/$set-$task-blind")
        done
    done
    python "$TOOLS/report.py" "${arguments[@]}" --evaluation text=scores/text --output . \
        --title "mPLUG-Owl2, tiny, on two CPU cores"
}

step corpus "render the corpus, in the formats that real data sets publish" make_corpus
step shards "write webdataset shards" make_shards
step starts "vision start and text start, side by side (they stand for CLIP and LLaMA-2)" start_parts
step parts "write them as Hugging Face CLIP and LLaMA directories" write_parts
step import "import both as the first mPLUG-Owl2 checkpoint" import_parts
step pretrain "stage 1: pre-training, language model frozen, tensor parallel over 2 ranks" pretrain
step finetune "stage 2: joint instruction tuning, everything trains, data parallel over 2 ranks" finetune
step export "export to Hugging Face, and prove the export with transformers" export_model
step answer "ask the exported model about new images" answer
step evaluate "score it on new images, seeing and blind" evaluate
rm -f done/report
step report "report" report

echo
echo "corpus       $PWD/corpus"
echo "shards       $PWD/shards"
echo "checkpoints  $PWD/runs/*/checkpoints"
echo "HF model     $PWD/model"
echo "scores       $PWD/scores.json"
echo "picture      $PWD/report.png"
echo
echo "To talk with it in a browser:"
echo "    $VENV/bin/python $TOOLS/serve.py --checkpoint $PWD/model"

#!/usr/bin/env bash
# mPLUG-Owl2's whole life, small, on two CPU cores: corpus, shards, a vision and a language start,
# pre-training, instruction tuning, export to Hugging Face, answers, scores.
#
#     bash examples/quickstart.sh [DIRECTORY]        (default: runs/quickstart)
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

shard() { # shard NAME FORMAT INPUT [options]
    local name=$1 format=$2 input=$3
    shift 3
    python "$TOOLS/preprocess_data.py" --format "$format" --input "corpus/$input" \
        --output "shards/$name" "$@"
}

make_corpus() { python "$ROOT/data_prep/shapes.py" --output corpus; }

make_shards() {
    local set images=(--images corpus/instructions)
    shard pairs img2dataset pairs
    shard documents documents text/documents.jsonl
    shard text_start conversations text/sharegpt_start.json
    for set in seen heldout; do
        shard "$set" coco "eval/$set/captions_val.json" --images "corpus/eval/$set/images"
    done
    instructions questions instructions/llava_shapes.json "${images[@]}"
    instructions captions instructions/llava_captions.json "${images[@]}"
    instructions two_images instructions/llava_two_images.json "${images[@]}"
    instructions text text/sharegpt_instructions.json
}

instructions() { # instructions NAME INPUT [options]: for training, and 200 samples for validation
    local name=$1 input=$2
    shift 2
    # What instruction tuning packs into rows is measured with the tokenizer.
    set -- "$@" --tokenizer corpus/tokenizer/tokenizer.model --hold-out 200
    shard "$name" conversations "$input" "$@"
    shard "validation/$name" conversations "$input" "$@" --only-held-out
}

start_parts() { run_stages 1 vision text; }

write_parts() { # as the published CLIP and LLaMA-2 directories look
    rm -rf start
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/vision --layout clip --output start/clip
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/text --layout llama --output start/llama
}

import_parts() {
    rm -rf checkpoints/start
    python "$TOOLS/convert_from_hf.py" --vision-model start/clip --language-model start/llama \
        --config "$CONFIGS/pretrain.yaml" --output checkpoints/start
}

pretrain() { run_stages 2 pretrain; }

finetune() { run_stages 2 finetune; }

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

evaluate() { # two at a time; "heldout" has colour-shape pairs that no training image has
    local set
    {
        for set in seen heldout; do
            for task in vqav2 pope caption; do
                echo --task $task --data corpus/eval/$set --output scores/$set-$task
                echo --task $task --data corpus/eval/$set --output scores/$set-$task-blind --blind
            done
        done
        echo --task text --data corpus/eval/text/sharegpt_text.json --output scores/text
    } | xargs -P 2 -L 1 python "$TOOLS/evaluate.py" --checkpoint model --min-new-tokens 1 \
        2>logs/evaluate.stderr >logs/evaluate.stdout || {
        cat logs/evaluate.stderr >&2
        return 1
    }
}

report() {
    local task arguments=()
    for stage in vision text pretrain finetune; do arguments+=(--run "$stage=runs/$stage"); done
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

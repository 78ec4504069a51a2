#!/usr/bin/env bash
# Where two things in one image get mixed up: the same small mPLUG-Owl2 on three language starts, asked
# about texts and about images, and linear probes of what its ViT and its abstractor know.
#
#     bash examples/studies/binding.sh [QUICKSTART]      (default: runs/quickstart)
#
# QUICKSTART is the folder of a finished quickstart; the results lie in its studies/binding. Steps that
# are done are not done again.
set -euo pipefail
QUICKSTART=${1:-}
[ -z "$QUICKSTART" ] || QUICKSTART=$(realpath -m "$QUICKSTART")
# shellcheck source=SCRIPTDIR/../environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
QUICKSTART=${QUICKSTART:-$ROOT/runs/quickstart}
[ -f "$QUICKSTART/done/report" ] ||
    fail "$QUICKSTART holds no finished quickstart; run bash examples/quickstart.sh $QUICKSTART first"
CONFIGS=$ROOT/examples/studies
TOOLS=$ROOT/tools
STEPS=7
DIRECTORY=$QUICKSTART/studies/binding
mkdir -p "$DIRECTORY/done" "$DIRECTORY/logs" "$DIRECTORY/start" "$DIRECTORY/runs"
cd "$DIRECTORY"
ln -sfn "$QUICKSTART/corpus" corpus
ln -sfn "$QUICKSTART/shards" shards
ln -sfn "$QUICKSTART/start/clip" start/clip
ln -sfn "$QUICKSTART/runs/chat" runs/chat
export PATH="$VENV/bin:$PATH" PYTHONPATH="$ROOT"
# shellcheck source=SCRIPTDIR/../steps.sh
source "$ROOT/examples/steps.sh"

language_starts() {
    start_stage 1 dialogues_alone
    start_stage 1 mixed
    finish_stage dialogues_alone
    finish_stage mixed
}

ask_texts() {
    local start
    for start in chat mixed dialogues_alone; do
        echo --checkpoint runs/$start --output scores/text-$start
    done | two_at_a_time evaluate.py --task text --data corpus/eval/text --min-new-tokens 1
    python "$TOOLS/report.py" --output texts --title "Language start, asked about texts" \
        --run "retellings=$QUICKSTART/runs/text" --run "then dialogues=runs/chat" \
        --run mixed=runs/mixed --run "dialogues alone=runs/dialogues_alone" \
        --evaluation "retellings first=scores/text-chat" \
        --evaluation mixed=scores/text-mixed \
        --evaluation "dialogues alone=scores/text-dialogues_alone"
}

import_parts() {
    rm -rf start/llama checkpoints/start
    python "$TOOLS/convert_to_hf.py" --checkpoint runs/dialogues_alone --layout llama \
        --output start/llama
    python "$TOOLS/convert_from_hf.py" --vision-model start/clip --language-model start/llama \
        --config "$ROOT/examples/tiny/pretrain.yaml" --output checkpoints/start
}

both_stages() { # as in the quickstart
    CONFIGS=$ROOT/examples/tiny run_stage 2 pretrain
    CONFIGS=$ROOT/examples/tiny run_stage 2 finetune
}

finetune_long() { run_stage 2 finetune_long; }

ask_images() {
    local run task quickstart=() once=() twice=()
    for run in finetune finetune_long; do
        for task in vqav2 pope caption; do
            echo --checkpoint runs/$run --task $task --output scores/$run-$task
        done
    done | two_at_a_time evaluate.py --data corpus/eval/seen --min-new-tokens 1
    for task in vqav2 pope caption; do
        quickstart+=(--evaluation "retellings first=$QUICKSTART/scores/seen-$task")
        once+=(--evaluation "dialogues alone=scores/finetune-$task")
        twice+=(--evaluation "dialogues alone, twice the steps=scores/finetune_long-$task")
    done
    python "$TOOLS/report.py" --output images --title "Language start, asked about images" \
        --run "retellings first=$QUICKSTART/runs/finetune" \
        --run "dialogues alone=runs/finetune" --run "twice the steps=runs/finetune_long" \
        "${quickstart[@]}" "${once[@]}" "${twice[@]}"
}

probe() { python "$CONFIGS/probes.py" "$QUICKSTART" probes; }

step starts "two other language starts: dialogues alone, and retellings mixed with them" language_starts
step texts "ask all three about texts" ask_texts
step probes "linear probes of ViT and abstractor" probe
step import "import the start of dialogues alone" import_parts
step stages "both stages on it" both_stages
step long "stage 2 for twice the steps" finetune_long
step images "ask about images" ask_images

echo
echo "about texts    $PWD/texts/report.png"
echo "probes         $PWD/probes/probes.png"
echo "about images   $PWD/images/report.png"

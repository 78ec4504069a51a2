#!/usr/bin/env bash
# Where two things in one image get mixed up: three language starts are asked about texts, and linear probes
# tell what ViT and abstractor know.
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
STEPS=3
DIRECTORY=$QUICKSTART/studies/binding
mkdir -p "$DIRECTORY/done" "$DIRECTORY/logs" "$DIRECTORY/runs"
cd "$DIRECTORY"
ln -sfn "$QUICKSTART/corpus" corpus
ln -sfn "$QUICKSTART/shards" shards
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

probe() { python "$CONFIGS/probes.py" "$QUICKSTART" probes; }

step starts "two other language starts: dialogues alone, and retellings mixed with them" language_starts
step texts "ask all three about texts" ask_texts
step probes "linear probes of ViT and abstractor" probe

echo
echo "about texts    $PWD/texts/report.png"
echo "probes         $PWD/probes/probes.png"

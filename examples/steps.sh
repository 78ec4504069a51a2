# shellcheck shell=bash
# Sourced by the scripts beside it, in the directory of their results: steps that are done only once,
# and what several scripts do in them. It needs $TOOLS, $CONFIGS and $STEPS, the number of steps.

export OMP_NUM_THREADS=1 # one thread per process, two processes: the fastest way on two cores
end_jobs() { # those that this script has started
    local pids
    pids=$(jobs -p)
    # shellcheck disable=SC2086 # several numbers
    [ -z "$pids" ] || kill $pids 2>/dev/null || true
}
trap end_jobs EXIT

number=0
step() { # step NAME WHAT FUNCTION: run FUNCTION unless it is done, and note the seconds
    local name=$1 what=$2 work=$3 started=$SECONDS
    number=$((number + 1))
    if [ -f "done/$name" ]; then
        echo "== $number/$STEPS $what: done before in $(cat "done/$name") s"
        return
    fi
    echo "== $number/$STEPS $what"
    $work
    echo $((SECONDS - started)) >"done/$name"
    echo "   $(cat "done/$name") s"
}

run_stages() { # run_stages PROCESSES NAME...: stages side by side, each from its last checkpoint
    local processes=$1 name failed=0
    declare -A running
    shift
    for name in "$@"; do
        (exec torchrun --standalone --nproc-per-node "$processes" -m megatron_owl2.train \
            --config "$CONFIGS/$name.yaml" 2>"logs/$name.stderr") &
        running[$name]=$!
    done
    for name in "$@"; do
        wait "${running[$name]}" || {
            failed=1
            tail -n 40 "logs/$name.stderr" >&2
        }
    done
    return $failed
}

ask() { # ask IMAGE QUESTION: the exported model, about an image it has never seen
    local image=corpus/eval/seen/images/$1.jpg
    printf '%s\n  %s\n' "$PWD/$image" "$2"
    python "$TOOLS/generate.py" --checkpoint model --image "$image" --prompt "$2" | sed 's/^/  > /'
}

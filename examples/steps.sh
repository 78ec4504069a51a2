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

declare -A running # processes of stages by name
start_stage() { # start_stage PROCESSES NAME: in the background, from its last checkpoint
    (exec torchrun --standalone --nproc-per-node "$1" -m megatron_owl2.train \
        --config "$CONFIGS/$2.yaml" ${SEED:+train.seed=$SEED data.seed=$SEED} \
        2>"logs/$2.stderr") &
    running[$2]=$!
}

finish_stage() { # finish_stage NAME
    wait "${running[$1]}" || {
        tail -n 40 "logs/$1.stderr" >&2
        return 1
    }
}

run_stage() { # run_stage PROCESSES NAME
    start_stage "$1" "$2"
    finish_stage "$2"
}

two_at_a_time() { # two_at_a_time TOOL OPTIONS: a tool for each line of the input, its further options
    local tool=$1
    shift
    xargs -P 2 -L 1 python "$TOOLS/$tool" "$@" 2>"logs/$tool.stderr" >"logs/$tool.stdout" || {
        cat "logs/$tool.stderr" >&2
        return 1
    }
}

ask() { # ask IMAGE QUESTION: the exported model, about an image it has never seen
    local image=corpus/eval/seen/images/$1.jpg
    printf '%s\n  %s\n' "$PWD/$image" "$2"
    python "$TOOLS/generate.py" --checkpoint model --image "$image" --prompt "$2" | sed 's/^/  > /'
}

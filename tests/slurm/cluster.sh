#!/bin/bash
# A Slurm cluster of two nodes on this machine, for tests; no systemd, no cgroups, nothing outside DIR.
#
#     bash tests/slurm/cluster.sh start DIR [PID]    # a new folder; exits 77 and says why where there
#                                                    # can be no cluster, which ends with process PID
#     SLURM_CONF=DIR/slurm.conf sbatch ...
#     bash tests/slurm/cluster.sh stop DIR
#
# Needs root (slurmd starts jobs as their users) and what tests/slurm/install.sh installs. The nodes
# are 127.0.0.2 and 127.0.0.3, names that every machine resolves; each claims eight CPUs and four GPUs.
set -euo pipefail

action=${1:?start or stop} folder=$(realpath -m "${2:?a folder}") owner=${3:-}

skip() {
    echo "no Slurm cluster here: $1"
    exit 77
}

start() {
    ((EUID == 0)) || skip "it takes root to start one"
    local program ports
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" > /dev/null || skip "$program is missing; run tests/slurm/install.sh"
    done
    mkdir -p "$folder"/{state,log,munge,spool/127.0.0.2,spool/127.0.0.3}
    chmod 700 "$folder/munge"
    # Above those of the jobs and below those that Linux gives to whoever asks for any.
    read -ra ports < <(python3 -c 'import contextlib, random, socket
free = []
for port in random.sample(range(30000, 32700), 200):
    with contextlib.suppress(OSError):
        free.append(socket.create_server(("127.0.0.1", port)))
print(*(s.getsockname()[1] for s in free[:3]))')
    cat > "$folder/slurm.conf" << END
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
# Jobs make ports of their numbers; those of another cluster on this machine have others.
FirstJobId=$((1 + SRANDOM % 1000000))
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 120 seconds without this.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/completed
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=20
GresTypes=gpu
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=8 Gres=gpu:4
NodeName=127.0.0.3 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=8 Gres=gpu:4
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=2
END
    # GPUs in name only: files that are there, and no CUDA_VISIBLE_DEVICES for the jobs.
    echo "Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/random Flags=no_gpu_env" > "$folder/gres.conf"
    export SLURM_CONF=$folder/slurm.conf
    head -c 1024 /dev/urandom > "$folder/munge/key"
    chmod 400 "$folder/munge/key"
    # --force: the folders above are the test's own, whoever may write in them.
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
        --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" \
        --seed-file="$folder/munge/seed" --num-threads=2
    slurmctld -i
    for node in 127.0.0.2 127.0.0.3; do
        slurmd -N "$node"
    done
    for ((tries = 0; tries < 100; tries++)); do
        if [[ $(sinfo --noheader --format=%D --states=idle 2> /dev/null) == 2 ]]; then
            if [[ $owner ]]; then
                guard &> /dev/null < /dev/null &
            fi
            return
        fi
        sleep 0.2
    done
    tail -n 20 "$folder"/log/* >&2
    stop
    echo "error: the cluster did not come up" >&2
    exit 1
}

# Ends what the owner could not end: it was killed.
guard() {
    while kill -0 "$owner" && kill -0 "$(< "$folder/slurmctld.pid")"; do
        sleep 1
    done
    stop
}

# The processes of this cluster: its daemons, and what jobs started, which has a job's number. A
# shell that only talks to the cluster has its SLURM_CONF too and is none of them.
ours() {
    local file pid
    grep -lsz "^SLURM_CONF=$folder/slurm.conf$" /proc/[0-9]*/environ | while read -r file; do
        pid=${file//[!0-9]/}
        if grep -qsz '^SLURM_JOB_ID=' "$file" || grep -qs '^munged\|^slurm' "/proc/$pid/comm"; then
            echo "$pid"
        fi
    done
}

# Without mercy: a job's daemon that loses its controller first would wait for it to come back.
stop() {
    local pid
    for ((tries = 0; tries < 50; tries++)); do
        for pid in $(ours); do
            kill -KILL "$pid" 2> /dev/null || true
        done
        [[ $(ours) ]] || return 0
        sleep 0.1
    done
    echo "error: processes of the cluster cannot be killed: $(ours)" >&2
    exit 1
}

case $action in
    start) start ;;
    stop) stop ;;
    *) echo "usage: cluster.sh start DIR [PID] | stop DIR" >&2 && exit 2 ;;
esac

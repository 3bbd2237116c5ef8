#!/usr/bin/env bash
# A real Slurm of two nodes on one machine, for tests: slurm_pair.sh up FOLDER [NUMBER] | crash FOLDER 1|2 | boot FOLDER 1|2 | down FOLDER
#
# slurmctld and two slurmd. Each node is a network namespace with a host name and a hosts file of its own, so that they
# reach each other by address alone, as two machines do that share a disk. Clients run outside: SLURM_CONF=FOLDER/slurm.conf
# NUMBER (0 to 99, default 0) gives the names, ports and addresses, so that several pairs can be up at once. Needs root and
# `make cluster-tools`. Nothing is written outside FOLDER.
#
# Each node has two "GPUs": character devices, because for anything else Slurm does not set CUDA_VISIBLE_DEVICES.
set -euo pipefail
command=${1:?up or down} folder=$(realpath -m "${2:?a folder}") number=${3:-0}
[ -e "$folder/number" ] && number=$(cat "$folder/number")
net=10.79.$number port=$((16000 + 10 * number)) bridge=tunesl$number
space() { echo "tunesl$number-$1"; }
export SLURM_CONF=$folder/slurm.conf PATH=$PATH:/usr/sbin:/sbin

# Every daemon and step that was started here has this variable; nothing else is ever signalled. Jobs have it not, and
# are known by SLURM_CONF beside a job id, which a shell that exports SLURM_CONF has not.
export SLURM_PAIR=$folder
owned() {
    local file
    for file in $(grep -lzxF -e "SLURM_PAIR=$folder" -e "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null); do
        if grep -qzxF "SLURM_PAIR=$folder" "$file" || grep -qz '^SLURM_JOB_ID=' "$file"; then
            file=${file#/proc/}
            [ "${file%/environ}" = $$ ] || echo "${file%/environ}"
        fi
    done 2>/dev/null
}

machine() { # HOSTNAME SPACE|- COMMAND...: with this host name and our hosts file, in this network
    local name=$1 where=$2 enter=()
    shift 2
    [ "$where" = - ] || enter=(nsenter "--net=/run/netns/$where")
    "${enter[@]}" unshare --mount --uts --propagation private \
        bash -c 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' - "$name" "$folder/hosts" "$@"
}

configure() {
    printf '%s\n' '127.0.0.1 localhost' "$net.254 ctl" "$net.1 node1" "$net.2 node2" >"$folder/hosts"
    cat >"$folder/slurm.conf" <<END
ClusterName=pair
SlurmctldHost=ctl($net.254)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=4
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=${SLURMD_TIMEOUT:-30}
SlurmctldTimeout=30
KillWait=${KILL_WAIT:-30}
MinJobAge=600
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=node1 NodeAddr=$net.1 Port=$((port + 1)) CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=node2 NodeAddr=$net.2 Port=$((port + 2)) CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE
END
    echo "NodeName=node[1-2] Name=gpu File=$folder/dev/gpu[0-1]" >"$folder/gres.conf"
}

network() {
    ip link add "$bridge" type bridge
    ip address add "$net.254/24" dev "$bridge"
    ip link set "$bridge" up
    local name
    for name in 1 2; do
        ip netns add "$(space $name)"
        ip link add "$bridge$name" type veth peer name eth0 netns "$(space $name)"
        ip link set "$bridge$name" master "$bridge" up
        ip -n "$(space $name)" address add "$net.$name/24" dev eth0
        ip -n "$(space $name)" link set eth0 up
        ip -n "$(space $name)" link set lo up
    done
}

up() {
    local tool name
    for tool in munged slurmctld slurmd sbatch nsenter ip; do
        command -v $tool >/dev/null || { echo "$tool is missing: make cluster-tools" >&2; exit 3; }
    done
    mkdir -p "$folder"/{log,state,spool.node1,spool.node2,dev,munge}
    chmod 755 "$folder" "$folder/munge"
    echo "$number" >"$folder/number"
    configure
    network
    for name in 0 1; do mknod "$folder/dev/gpu$name" c 1 3; done
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
    munged --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" --seed-file="$folder/munge/seed" \
        --pid-file="$folder/munge/pid" --log-file="$folder/log/munged"
    machine ctl - slurmctld -i
    for name in 1 2; do node "$name"; done
    for _ in $(seq 200); do
        kill -0 "$(cat "$folder/slurmctld.pid")" || break
        [ "$(timeout 2 sinfo -h -N -o %T 2>/dev/null | grep -c idle)" = 2 ] && return
        sleep 0.1
    done
    tail -n 5 "$folder"/log/* >&2
    exit 1
}

node() { machine "node$1" "$(space "$1")" slurmd -N "node$1"; }

down() {
    local pids
    for signal in TERM KILL; do
        pids=$(owned)
        # shellcheck disable=SC2086  one word a process
        [ -z "$pids" ] || kill -$signal $pids 2>/dev/null || true
        for _ in $(seq 30); do [ -z "$(owned)" ] && break; sleep 0.1; done
    done
    for name in 1 2; do ip netns delete "$(space $name)" 2>/dev/null || true; done
    ip link delete "$bridge" 2>/dev/null || true
    rm -rf "$folder"
}

# A power failure: nothing of the node is said to anybody any more, then its processes are gone.
crash() {
    ip -n "$(space "$1")" link set eth0 down
    # shellcheck disable=SC2046  one word a process
    kill -KILL $(ip netns pids "$(space "$1")")
}

boot() {
    ip -n "$(space "$1")" link set eth0 up
    node "$1"
}

case $command in
up) up ;;
down) down ;;
crash | boot) $command "${3:?1 or 2}" ;; # of a node
*) sed -n 2,10p "$0" >&2; exit 2 ;;
esac

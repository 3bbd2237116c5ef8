"""`launch slurm`: create and submit the batch script of a run, and read the state of its job.

srun starts one node agent per node. The script finds the address of the first node with Slurm's
commands, asks the ranks to save before the time limit, and requeues its job. The environment of the
submitting shell is not passed to the job, because Slurm stores it on the controller's disk, and it
may contain tokens. Only the variables that the script sets are passed.
"""

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config.dump import dump
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.files import write_atomically
from tunesmith.host.packages import installed_versions
from tunesmith.host.shell import shell_command
from tunesmith.launch.job import FOLDER, POLL, save_job, state_folder
from tunesmith.launch.jobs import safe_value, write_recipe
from tunesmith.launch.slurm_job import SlurmJob, run_slurm
from tunesmith.tools.launch.inputs import hub_sources, passed_variables, recipe_inputs

# Names of files in the folder `launch` of the run directory.
SCRIPT_NAME = "slurm.sh"
LOG_NAME = "slurm"
# Slurm's reasons of a pending job that asks for more nodes than the partition has.
NEVER_STARTS = re.compile("PENDING: Partition(NodeLimit|Config)")
REASON_SECONDS = 5.0
# Default number of seconds between the signal that makes the run save and the job's time limit, but
# at most a quarter of the limit. The first is for adapters, whose checkpoints are small. In the
# second, a disk that writes 0.5 GB/s saves 900 GB, which is more than a model of 70B needs.
WARNING_SECONDS = (300, 1800)
# Variables of the submitting shell that are passed to the job. A variable is left out if its name
# or value looks like a secret.
PASSED_TO_JOB = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|XDG_CACHE_HOME"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|TOKEN_PATH|ENDPOINT)"
    r"|WANDB_(PROJECT|ENTITY|MODE|BASE_URL|NAME)"
    r"|TUNESMITH_(CACHE|DEBUG|HEARTBEAT_SECONDS)|(NCCL|GLOO|UCX)_[A-Z0-9_]+"
)

# Part of the script that is the same for every job. The lines above it in the script set the values
# of its variables.
BODY = r"""
say() { echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }
newest() { ls -d "$run"/checkpoint-*/manifest.json 2>/dev/null | sort -V | tail -n 1; }
# An earlier, shorter run may have left final/. The container's Python is not on this node.
has_finished() {
    [ -e "$run/final/manifest.json" ] || return
    [ "${#container[@]}" -gt 0 ] || "$python" -c "
from sys import argv
from tunesmith.checkpoint.resume import finished_step
from tunesmith.config.load import load_recipe
raise SystemExit(finished_step(load_recipe(argv[1])) is None)" "$run/launch/recipe.yaml"
}
address_of() {
    local name
    name=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    getent ahostsv4 "$name" | awk 'NR == 1 {print $1}'
}

export SLURM_EXPORT_ENV=ALL PYTHONUNBUFFERED=1  # pass all variables to every node
attempt=${SLURM_RESTART_COUNT:-0}
stop_file=$run/launch/stop-$SLURM_JOB_ID  # created by `tunesmith stop`
log=$run/launch/slurm-$SLURM_JOB_ID.log
# Check the number of restarts: Slurm itself requeues after a lost node, without a maximum.
if [ "$attempt" -gt "$max_requeues" ]; then
    say "requeued $attempt times, more than $max_requeues: giving up"
    exit 1
fi
if [ -e "$stop_file" ]; then
    rm -f "$stop_file"
    say "not started: 'tunesmith stop' was called before the start"
    exit 75
fi

host=127.0.0.1 port=$((20000 + SLURM_JOB_ID % 10000))
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    host=$(address_of "${nodes[0]}")
    # A loopback address comes from the node's own hosts file. Use the address of the route to the
    # second node instead: the other nodes can reach it.
    case $host in 127.*)
        host=$(ip -4 route get "$(address_of "${nodes[1]}")" |
            sed -n 's/.* src \([^ ]*\).*/\1/p') ;;
    esac
fi

# With this variable, a run that is stopped by the warning prints that it is requeued.
if [ "$attempt" -lt "$max_requeues" ]; then export TUNESMITH_REQUEUE=1; fi

say "start $attempt on $SLURM_JOB_NODELIST, GPUs per node: ${SLURM_GPUS_ON_NODE:-none}," \
    "rendezvous $host:$port"
previous=$(newest) requeue= stopped_by= srun=
# srun forwards SIGUSR1 to the node agents.
trap 'requeue=1; say "the time limit is near: the run saves and stops"
    [ -z "$srun" ] || kill -USR1 "$srun"' USR1
# Slurm also sends SIGTERM to the job steps. After the warning, SIGTERM means the time limit.
# Otherwise it comes from scancel, and the job must not be requeued.
trap '[ -n "$requeue" ] || stopped_by=scancel; say "SIGTERM: the run saves and stops"' TERM
# Nodes that do not share the folder need the recipe too. srun sends its input to every node.
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! srun --mpi=none --ntasks-per-node=1 bash -c '
    new=$1/recipe.$SLURM_NODEID
    mkdir -p "$1" && cat >"$new" && mv "$new" "$1/recipe.yaml" && exit
    echo "error: $SLURMD_NODENAME cannot write $1"
    echo "  fix: set output_dir to a folder that exists or can be created on every node"
    exit 2' bash "$run/launch" <"$run/launch/recipe.yaml"; then
    say "exit code 2"
    exit 2
fi
log_bytes=$(stat -c %s "$log")
srun --kill-on-bad-exit=1 --wait=120 --mpi=none --ntasks-per-node=1 "${container[@]}" \
    "$python" -m tunesmith.launch.node --nodes "$SLURM_JOB_NUM_NODES" --ranks "$ranks" \
    --endpoint "$host:$port" --id "$SLURM_JOB_ID" "${debug[@]}" \
    -- train "$run/launch/recipe.yaml" &
srun=$!
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
wait "$srun"
code=$?
# Use the code of the node that ended first: srun returns 143 if it has ended the other nodes.
first=$(tail -c "+$((log_bytes + 1))" "$log" |
    sed -n 's/^srun: error: .*Exited with exit code \([0-9]*\)$/\1/p' | head -n 1)
code=${first:-$code}
# After a lost node, srun may exit with 0 although the run has not finished.
if [ "$code" -eq 0 ] && ! has_finished; then code=1; fi

trap '' TERM
if [ -e "$stop_file" ]; then
    rm -f "$stop_file"
    stopped_by=stop
fi
# A lost node or a killed process makes the run fail with 1. The code is 137 or 143 if a node agent
# was killed by SIGKILL or SIGTERM. Requeue only if this start has saved a new checkpoint: otherwise
# the run would probably fail at the same step again.
now=$(newest)
case $code in
1 | 137 | 143) if [ -n "$now" ] && [ "$now" != "$previous" ]; then requeue=1; fi ;;
# Only a rank was stopped: by a signal, or because of low memory. The user did not ask for it.
75) grep -qs '"reason": "file"' "$run/stopped.json" || requeue=1 ;;
esac
how=
case $code in
137) how=" (a process was killed by SIGKILL: by a user, or out of memory)" ;;
143) how=" (a process was killed by SIGTERM)" ;;
esac
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ -n "$requeue" ] && [ -z "$stopped_by" ] \
    && [ "$attempt" -lt "$max_requeues" ]; then
    say "exit code $code$how; requeued, $((attempt + 1)) of at most $max_requeues times"
    scontrol requeue "$SLURM_JOB_ID"
else
    say "exit code $code$how"
fi
exit "$code"
"""

# Fields of `JobRequest` that become options of sbatch with the same name.
DIRECTIVES = ("partition", "account", "qos", "time", "constraint", "mem", "cpus_per_task")


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """The options of a Slurm job, from the flags of `launch slurm`.

    None means the default of the cluster.

    Attributes:
        setup: lines that are copied into the script before the run.
        sbatch: additional options of sbatch, which are copied into the script.
        max_requeues: maximum number of times that the job is requeued.
        warning: seconds between the signal that makes the run save and the time limit. None means
            one of WARNING_SECONDS, but at most a quarter of the time limit.
        debug: whether ranks and NCCL write more details to the log.
    """

    nodes: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    mem: str | None = None
    cpus_per_task: str | None = None
    gpus_per_node: str | None = None
    container: str | None = None
    exclusive: bool = False
    setup: Sequence[str] = ()
    sbatch: Sequence[str] = ()
    max_requeues: int = 5
    warning: int | None = None
    debug: bool = False


def render_script(run: Run, request: JobRequest, *, holds_recipe: bool = False) -> str:
    """Return the text of the batch script.

    Every value from a recipe or a flag is quoted, in an #SBATCH line or in an assignment.

    Args:
        holds_recipe: include the recipe in the script. The script then writes the recipe file
            itself, and `write_recipe` is not needed.
    """
    version = installed_versions().get("tunesmith", "")
    lines = [
        "#!/bin/bash -l",
        f"# Written by tunesmith {version}: tunesmith launch slurm --help",
    ]
    lines += [f"#SBATCH {directive}" for directive in _directives(run, request)]
    lines.append("")
    # Set the variables before the lines of `setup`, which may change them.
    variables = sorted(_job_environment(request).items())
    lines += [f"export {key}={_shell_word(value, key)}" for key, value in variables]
    lines += [safe_value(line, "--setup") for line in request.setup]
    # Use the interpreter of the container if there is one.
    python = "python3" if request.container else sys.executable
    lines.append(f"python={shlex.quote(python)}")
    lines.append(f"run={_shell_word(run.output_dir, 'output_dir')}")
    if holds_recipe:
        # No line of a YAML file equals the end marker of this here-document.
        lines += [
            f'mkdir -p "$run/{FOLDER}"',
            f"cat > \"$run/{FOLDER}/recipe.yaml\" <<'END-OF-RECIPE'",
            dump(run).rstrip(),
            "END-OF-RECIPE",
        ]
    lines += [
        f"ranks={ranks_of(request)}",
        f"max_requeues={request.max_requeues}",
        f"debug=({'--debug' if request.debug else ''})",
        f"container=({' '.join(_container_words(run, request))})",
        BODY,
    ]
    return "\n".join(lines)


def _directives(run: Run, request: JobRequest) -> list[str]:
    """Return the options of sbatch, one per #SBATCH line."""
    if "\\" in run.output_dir:
        raise UsageError(
            "the path of the log contains a backslash, which Slurm treats as an escape character",
            where="output_dir",
            fix="use a path without a backslash, such as output_dir=runs/my-run",
        )
    # Escape "%" as "%%" in the folder name, because Slurm replaces patterns such as %j by values.
    folder = run.output_dir.replace("%", "%%")
    options: dict[str, str | None] = {
        "job-name": Path(run.output_dir).name,
        "output": f"{folder}/{FOLDER}/{LOG_NAME}-%j.log",
        # A requeued job appends to the log of its first start.
        "open-mode": "append",
        "nodes": str(request.nodes),
        # Slurm starts one node agent per node, which starts the ranks.
        "ntasks-per-node": "1",
        "export": "NONE",
    }
    options |= {key.replace("_", "-"): vars(request)[key] for key in DIRECTIVES}
    if request.gpus_per_node != "0":
        options["gpus-per-node"] = request.gpus_per_node
    # With "B:", Slurm sends the signal only to the batch script, which forwards it to the ranks.
    options["signal"] = f"B:USR1@{warning_of(run, request)}"
    lines = [
        f"--{key}={_directive_word(value, f'--{key}')}"
        for key, value in options.items()
        if value is not None
    ]
    # Always pass --requeue or --no-requeue, because the default depends on the cluster.
    lines.append("--requeue" if request.max_requeues else "--no-requeue")
    if request.exclusive:
        lines.append("--exclusive")
    return lines + [safe_value(line, "--sbatch-arg") for line in request.sbatch]


def _job_environment(request: JobRequest) -> dict[str, str]:
    """Return the environment variables of this process that are passed to the job."""
    environment = passed_variables(PASSED_TO_JOB)
    if request.container:
        # Remove variables with paths of the host, which do not exist in the container. Set HF_HOME,
        # because the home folder differs in the container.
        environment = {key: value for key, value in environment.items() if "PATH" not in key}
        environment["HF_HOME"] = hub_home()
    return environment


def ranks_of(request: JobRequest) -> int:
    """Return the number of ranks per node: one per GPU, or one without GPUs.

    Raise UsageError if the number of GPUs is missing or does not have the form `8` or `h100:8`.
    """
    gpus = request.gpus_per_node or ""
    # Match `8` or `h100:8`, with an optional GPU type.
    match = re.fullmatch(r"(?:[\w.-]+:)?(\d{1,3})", gpus, re.ASCII)
    if not match:
        raise UsageError(
            f"{gpus} is not a number of GPUs" if gpus else "the number of GPUs per node is missing",
            where="--gpus-per-node",
            fix="use --gpus-per-node 8, or h100:8, or 0 to train on CPUs",
        )
    return max(int(match[1]), 1)


def warning_of(run: Run, request: JobRequest) -> int:
    """Return how many seconds before the time limit the ranks are asked to save.

    Raise UsageError if the user's value is more than half of the time limit.
    """
    # 0 means that the job sets no time limit. Then the limit of the partition applies, which is
    # unknown here.
    limit = limit_seconds(request.time) if request.time else 0
    default = WARNING_SECONDS[run.adapter.kind == "none"]
    seconds = request.warning or min(default, limit // 4 or default)
    if limit and seconds > limit // 2:
        raise UsageError(
            f"the run would stop {seconds} s before its time limit of {limit} s",
            where="--warn-before",
            why="at least half of the time limit must remain for training",
            fix=f"use a longer --time, or --warn-before {limit // 4}",
        )
    return seconds


def limit_seconds(text: str) -> int:
    """Convert a time limit of Slurm to seconds.

    The formats are `90` (minutes), `2:30` (minutes and seconds), `2:30:00`, `1-12` (days and hours)
    and `1-12:30:00`. Raise UsageError for any other text.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if not match:
        raise UsageError(
            f"{text} is not a time limit",
            where="--time",
            fix="use --time 90 (minutes), 12:00:00 or 2-00:00:00",
        )
    # Two parts are minutes and seconds, but after a number of days they are hours and minutes.
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] or match[4]:
        return (days * 24 + first) * 3600 + second * 60 + third
    return first * 60 + second


def check_reach(run: Run, request: JobRequest, words: Sequence[str]) -> None:
    """Raise UsageError if the job lacks files or a login that it needs.

    Otherwise the job would fail only after it has waited in the queue. The error names the command
    that downloads the files or logs in.

    Args:
        words: the recipe and its overrides as the user typed them.
    """
    recipe_inputs(run)
    from tunesmith.hub.fetch import cached_model, local_model, repo_cache

    # Remove duplicates, because training and validation rows may be splits of the same data set.
    datasets = dict.fromkeys(source.source for source in hub_sources(run))
    missing = [name for name in datasets if not repo_cache(name, "dataset").exists()]
    if local_model(run.model) is None and cached_model(run.model) is None:
        missing.insert(0, run.model.name)
    # If a line of `setup` sets the cache folder, do not check the cache of this machine, because
    # the nodes use another cache.
    has_own_cache = re.search(r"\bHF_(HOME|HUB_CACHE)=", "\n".join(request.setup))
    if missing and not has_own_cache:
        raise UsageError(
            f"the run needs files of the Hub that are not in the cache: {', '.join(missing)}",
            where="the Hub's cache",
            why="nodes often cannot reach the Hub, and the job gets no token, because "
            "Slurm would store the token on its disk",
            fix=f"run `tunesmith fetch {shell_command(words)}`; the nodes must be able to read "
            f"{hub_home()}",
        )
    netrc = Path(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    if run.log.wandb and os.environ.get("WANDB_API_KEY") and not netrc.is_file():
        raise UsageError(
            "WANDB_API_KEY is not sent to the job",
            where="log.wandb",
            why="Slurm would store the key on its controller's disk",
            fix="run `wandb login`, which writes ~/.netrc for the nodes, or "
            "`export WANDB_MODE=offline`, or set log.wandb=false",
        )


def hub_home() -> str:
    """Return the folder that contains the Hub's cache and the stored token."""
    from huggingface_hub import constants

    return constants.HF_HOME


def submit(run: Run, request: JobRequest) -> SlurmJob:
    """Write the recipe and the script, submit the script, and save the job file.

    Raises:
        UsageError: if another job of the run directory is queued or running.
        MachineError: if sbatch fails, with its message.
    """
    text = render_script(run, request)
    # Create the folder of the job file first. If this fails, no job is submitted.
    state_folder()
    script = write_recipe(run).with_name(SCRIPT_NAME)
    write_atomically(script, text)
    # Pass --export=NONE on the command line too, because the variable SBATCH_EXPORT would override
    # the line in the script.
    code, out, errors = run_slurm("sbatch", "--parsable", "--export=NONE", str(script))
    if code:
        raise MachineError(
            "sbatch rejects the job",
            where=script,
            why=errors,
            fix="check partitions and limits with `sinfo`, and the cluster with `tunesmith doctor "
            "--slurm`",
        )
    # sbatch prints "ID" or "ID;CLUSTER".
    id_ = out.strip().partition(";")[0]
    log = Path(run.output_dir, FOLDER, f"{LOG_NAME}-{id_}.log")
    job = SlurmJob(f"slurm-{id_}", run.output_dir, log=str(log), details={"id": id_})
    save_job(job)
    # The scheduler finds the reason of a pending job some seconds later.
    deadline = time.monotonic() + REASON_SECONDS
    while "PENDING: None" in (state := job.state()).text and time.monotonic() < deadline:
        time.sleep(POLL)
    if NEVER_STARTS.search(state.text):
        job.stop()
        raise MachineError(
            "the job can never start, so it was removed from the queue",
            where=script,
            why=state.text,
            fix="compare --nodes and --time with the limits that `sinfo` shows",
        )
    return job


def _directive_word(value: str, where: str) -> str:
    """Quote a value as one word of an #SBATCH line.

    Slurm's parser of these lines supports quotes and backslashes, but does not expand $ or `.
    """
    safe_value(value, where)
    # A value with only these characters needs no quotes.
    if re.fullmatch(r"[\w./:=,%@+-]+", value):
        return value
    escaped = re.sub(r'([\\"])', r"\\\1", value)
    return f'"{escaped}"'


def _shell_word(value: str, where: str) -> str:
    return shlex.quote(safe_value(value, where))


def _container_words(run: Run, request: JobRequest) -> list[str]:
    """Return the quoted flags of srun for Pyxis: the container image and the mounts.

    The paths that the run reads and writes are mounted at the same paths as on the host. Return []
    if the request has no container.
    """
    if not request.container:
        return []
    paths = [*map(str, recipe_inputs(run)), str(Path(run.output_dir).parent), hub_home()]
    for path in paths:
        if ":" in path or "," in path:
            raise UsageError(
                f"Pyxis cannot mount {path}",
                where="--container",
                fix="rename the folder so that the path has no : and no ,",
            )
    mounts = ",".join(f"{path}:{path}" for path in dict.fromkeys(paths))
    flags = [f"--container-image={request.container}", f"--container-mounts={mounts}"]
    return [*(_shell_word(flag, "--container") for flag in flags), "--no-container-mount-home"]

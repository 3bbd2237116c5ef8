"""`launch slurm`: a batch script for one run; submitted, and looked up again.

Each node starts one node agent. The script names the head node by Slurm's own means, asks the ranks
to save before the time limit, and puts itself back into the queue. Nothing of the submitting
shell's environment enters the job but the variables that the script shows: Slurm keeps a job's
environment on the controller's disk, where a token would stay.
"""

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.config.dump import dump
from tunesmith.config.schema import Parallel, Run
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.child_output import last_line
from tunesmith.host.files import write_atomically
from tunesmith.host.packages import installed_versions
from tunesmith.host.shell import shell_command, shell_word
from tunesmith.launch.jobs import (
    FOLDER,
    Job,
    JobState,
    last_step,
    safe_value,
    save_job,
    state_folder,
    step_and_time_left,
    write_recipe,
)
from tunesmith.launch.ssh import NO_COMMAND, try_on
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.safetensors_files import read_json
from tunesmith.model.shapes import config_of_model
from tunesmith.run_dir import STOP_FILE, RunState
from tunesmith.tools.launch.inputs import hub_sources, passed_variables, recipe_inputs

# Names in the folder `launch` of the run directory
SCRIPT_NAME = "slurm.sh"
LOG_NAME = "slurm"
# Seconds before the time limit at which the run gets the signal to save, at least; a short limit
# has less
MIN_WARNING_SECONDS = 300
# Of them for the step under way, and for Slurm's clock, which goes by the minute
STEP_AND_CLOCK_SECONDS = 60
# Bytes/s of a checkpoint on a shared disk that several nodes write to
ASSUMED_BYTES_PER_SECOND = 1e9
# States of a job. Slurm has more, which are those of a job that runs.
WAITING_JOBS = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
}
ENDED_JOBS = {
    "BOOT_FAIL": RunState.FAILED,
    "CANCELLED": RunState.KILLED,
    "COMPLETED": RunState.FINISHED,
    "DEADLINE": RunState.KILLED,
    "FAILED": RunState.FAILED,
    "NODE_FAIL": RunState.KILLED,
    "OUT_OF_MEMORY": RunState.KILLED,
    "PREEMPTED": RunState.KILLED,
    "TIMEOUT": RunState.KILLED,
}
# Variables of the submitting shell that the job gets, but for those with the name or the form of a
# secret.
PASSED_TO_JOB = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|XDG_CACHE_HOME"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|TOKEN_PATH|ENDPOINT)"
    r"|WANDB_(PROJECT|ENTITY|MODE|BASE_URL|NAME)"
    r"|TUNESMITH_(CACHE|DEBUG|HEARTBEAT_SECONDS)|(NCCL|GLOO|UCX)_[A-Z0-9_]+"
)

# The same for every job: the values are above it in the script.
BODY = r"""
say() { echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }
newest() { ls -d "$run"/checkpoint-*/manifest.json 2>/dev/null | sort -V | tail -n 1; }
address_of() {
    local name
    name=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    getent ahostsv4 "$name" | awk 'NR == 1 {print $1}'
}

export SLURM_EXPORT_ENV=ALL PYTHONUNBUFFERED=1  # what is above is for every node
attempt=${SLURM_RESTART_COUNT:-0}
stop_file=$run/launch/stop-$SLURM_JOB_ID  # of `tunesmith stop`
# Slurm itself requeues after a lost node, without a bound.
if [ "$attempt" -gt "$max_requeues" ]; then
    say "requeued $attempt times, more than $max_requeues: giving up"
    exit 1
fi
if [ -e "$stop_file" ]; then
    rm -f "$stop_file"
    say "tunesmith stop came before the start: not started"
    exit 75
fi

host=127.0.0.1 port=$((20000 + SLURM_JOB_ID % 10000))
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    host=$(address_of "${nodes[0]}")
    # From the node's own hosts file: what the other nodes reach is the address of the route to
    # them.
    case $host in 127.*)
        host=$(ip -4 route get "$(address_of "${nodes[1]}")" |
            sed -n 's/.* src \([^ ]*\).*/\1/p') ;;
    esac
fi

# A run that the warning stops says then that it is requeued.
if [ "$attempt" -lt "$max_requeues" ]; then export TUNESMITH_REQUEUE=1; fi

say "start $attempt on $SLURM_JOB_NODELIST, GPUs of a node: ${SLURM_GPUS_ON_NODE:-none}," \
    "rendezvous $host:$port"
previous=$(newest) requeue= stopped_by= srun=
# srun hands the signal on.
trap 'requeue=1; say "the time limit is near: the run saves and stops"; kill -USR1 $srun' USR1
# Slurm sends SIGTERM to the steps too. After the warning it is the time limit; else scancel, after
# which no job starts again.
trap '[ -n "$requeue" ] || stopped_by=scancel; say "SIGTERM: the run saves and stops"' TERM
srun --kill-on-bad-exit=1 --wait=120 --mpi=none --ntasks-per-node=1 "${container[@]}" \
    "$python" -m tunesmith.launch.node --nodes "$SLURM_JOB_NUM_NODES" --ranks "$ranks" \
    --endpoint "$host:$port" --id "$SLURM_JOB_ID" "${debug[@]}" \
    -- train "$run/launch/recipe.yaml" &
srun=$!
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
wait "$srun"
code=$?
# After a lost node srun itself may end with 0.
if [ "$code" -eq 0 ] && [ ! -e "$run/final/manifest.json" ]; then code=1; fi

trap '' TERM
if [ -e "$stop_file" ]; then
    rm -f "$stop_file"
    stopped_by=stop
fi
# A lost node or a killed process fails the run (1; 137 and 143 where a launcher itself was killed
# by SIGKILL or SIGTERM). One that had come further before it failed is worth another start: at the
# same place it would fail again.
now=$(newest)
case $code in 1 | 137 | 143)
    if [ -n "$now" ] && [ "$now" != "$previous" ]; then requeue=1; fi ;;
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

# Keys of `Request` that are passed on to sbatch
DIRECTIVES = ("partition", "account", "qos", "time", "constraint", "mem", "cpus_per_task")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The requests of a job to Slurm: the flags of `launch slurm`; None: no request.

    Attributes:
        setup: lines of the script before the run, as they are.
        sbatch: further directives, as they are.
        warning: seconds before the time limit at which all ranks get the signal to save; None: 300,
            or more where saving takes longer, but no more than a quarter of the limit.
        saving: seconds that a checkpoint takes.
        debug: ranks and NCCL say more in the log.
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
    saving: float = 0.0
    debug: bool = False


class SlurmJob(Job):
    """A job. `details`: its `id`."""

    def state(self) -> JobState:
        id_ = self.details["id"]
        form = "--format=%T|%r|%M|%l|%N"
        # `--states=all`: without it a job that has just ended is not listed.
        code, out, errors = _slurm("squeue", "--noheader", "--states=all", "--jobs", id_, form)
        # Slurm forgets a job some minutes after its end.
        if code and "Invalid job id" not in errors:
            fix = "tunesmith doctor --slurm, on a login node of the cluster"
            raise MachineError("Slurm does not respond", where="squeue", why=errors, fix=fix)
        if not out.strip():
            return super().state()
        name, reason, elapsed, limit, nodes = out.splitlines()[-1].split("|")
        if name in WAITING_JOBS:
            # A requeued job goes on from there.
            run = super().state()
            done = run.text if run.state is RunState.STOPPED else last_step(self.run_dir)
            return JobState(RunState.QUEUED, "; ".join(filter(None, (f"{name}: {reason}", done))))
        if name in ENDED_JOBS:
            return super().state().after(ENDED_JOBS[name], name)
        step = step_and_time_left(self.run_dir) or "before the first step"
        return JobState(RunState.RUNNING, f"{step}; {name} for {elapsed} of {limit} on {nodes}")

    def stop(self) -> str:
        id_ = self.details["id"]
        state = self.state().state
        if state is RunState.QUEUED:
            _cancel(id_)
            return "removed from the queue"
        if state is not RunState.RUNNING:
            return "it has already ended"
        # The first is for the script, which does not requeue; the second tells a stop from Slurm's
        # own SIGTERM.
        out = Path(self.run_dir)
        for file in (out / FOLDER / f"{STOP_FILE}-{id_}", out / STOP_FILE):
            # The folder may be on a disk that this machine does not see: SIGTERM reaches the job
            # all the same.
            with suppress(OSError):
                file.touch()
        # To the job's steps alone: the script waits for them.
        _cancel("--signal=TERM", id_)
        return "stop requested: saves, then stops"


def _cancel(*words: str) -> None:
    """Run scancel; MachineError where it fails. The last word is the job's id."""
    code, _, errors = _slurm("scancel", *words)
    if code:
        id_ = words[-1]
        fix = f"scancel {shell_word(id_)}"
        raise MachineError("scancel failed", where=id_, why=errors, fix=fix)


def render_script(run: Run, request: Request, *, holds_recipe: bool = False) -> str:
    """Return the batch script.

    Every value from a recipe or flag stands in a quoted word of a directive or of an assignment.

    holds_recipe: the script contains and writes the recipe, in place of `write_recipe`.
    """
    version = installed_versions().get("tunesmith", "")
    lines = [
        "#!/bin/bash -l",
        f"# Written by tunesmith {version}: tunesmith launch slurm --help",
    ]
    lines += [f"#SBATCH {directive}" for directive in _directives(run, request)]
    lines.append("")
    # `setup` may change the variables of this shell.
    for key, value in sorted(_job_environment(request).items()):
        lines.append(f"export {key}={_shell_word(value, key)}")
    lines += [safe_value(line, "--setup") for line in request.setup]
    # A container has its own interpreter.
    python = "python3" if request.container else sys.executable
    debug = "--debug" if request.debug else ""
    recipe = []
    if holds_recipe:
        # No line of YAML equals the end mark.
        recipe = [
            f'mkdir -p "$run/{FOLDER}"',
            f"cat > \"$run/{FOLDER}/recipe.yaml\" <<'END-OF-RECIPE'",
            dump(run).rstrip(),
            "END-OF-RECIPE",
        ]
    lines += [
        f"python={shlex.quote(python)}",
        f"run={_shell_word(run.output_dir, 'output_dir')}",
        *recipe,
        f"ranks={ranks_of(request)}",
        f"max_requeues={request.max_requeues}",
        f"debug=({debug})",
        f"container=({' '.join(_container_words(run, request))})",
    ]
    return "\n".join([*lines, BODY])


def _directives(run: Run, request: Request) -> list[str]:
    """The options of sbatch, each one line."""
    if "\\" in run.output_dir:
        raise UsageError(
            "the log path contains a backslash, which Slurm interprets",
            where="output_dir",
            fix="output_dir=runs/my-run",
        )
    # Slurm fills in %j.
    # Without a `%%` a name such as `50%job` would become something else.
    folder = run.output_dir.replace("%", "%%")
    options: dict[str, str | None] = {
        "job-name": Path(run.output_dir).name,
        "output": f"{folder}/{FOLDER}/{LOG_NAME}-%j.log",
        # A requeued job goes on in the log of its first start.
        "open-mode": "append",
        "nodes": str(request.nodes),
        # The agent starts the ranks: Slurm starts one agent a node.
        "ntasks-per-node": "1",
        "export": "NONE",
    }
    for key in DIRECTIVES:
        options[key.replace("_", "-")] = vars(request)[key]
    if request.gpus_per_node != "0":
        options["gpus-per-node"] = request.gpus_per_node
    # B: to the script alone
    options["signal"] = f"B:USR1@{warning_of(request)}"
    lines = [
        f"--{key}={_directive_word(value, f'--{key}')}"
        for key, value in options.items()
        if value is not None
    ]
    # --requeue is said, as the cluster's default may be either.
    lines.append("--requeue" if request.max_requeues else "--no-requeue")
    if request.exclusive:
        lines.append("--exclusive")
    return lines + [safe_value(line, "--sbatch-arg") for line in request.sbatch]


def _job_environment(request: Request) -> dict[str, str]:
    """The variables of this environment that the job gets."""
    environment = passed_variables(PASSED_TO_JOB)
    if request.container:
        # Paths of this system do not exist in the container, and its home is another.
        environment = {key: value for key, value in environment.items() if "PATH" not in key}
        environment["HF_HOME"] = hub_home()
    # A shell that starts shells repeats entries; of equal ones the first is searched.
    if "PATH" in environment:
        entries = environment["PATH"].split(os.pathsep)
        environment["PATH"] = os.pathsep.join(dict.fromkeys(entries))
    return environment


def ranks_of(request: Request) -> int:
    """Ranks of a node: one a GPU, without GPUs one.

    UsageError where the GPUs are not `8` or `h100:8`.
    """
    gpus = request.gpus_per_node or ""
    # `8`, `h100:8`: the type of a GPU may stand in front.
    match = re.fullmatch(r"(?:[\w.-]+:)?(\d{1,3})", gpus, re.ASCII)
    if match:
        return max(int(match[1]), 1)
    what = f"{gpus} is not a number of GPUs" if gpus else "the number of GPUs per node is missing"
    fix = "--gpus-per-node 8, or h100:8, or 0 to train on CPUs"
    raise UsageError(what, where="--gpus-per-node", fix=fix)


def warning_of(request: Request) -> int:
    """Seconds before the time limit at which the ranks get the signal to save."""
    # 0: the partition's limit, which is not known here.
    limit = limit_seconds(request.time) if request.time else 0
    seconds = request.warning
    if not seconds:
        # Saving must end before the limit, but most of the time belongs to the training. A disk may
        # be half as fast as assumed.
        seconds = max(MIN_WARNING_SECONDS, STEP_AND_CLOCK_SECONDS + math.ceil(2 * request.saving))
        if limit >= 4:
            seconds = min(seconds, limit // 4)
    if limit and seconds > limit // 2:
        raise UsageError(
            f"the run would reserve {seconds} s of {limit} s for saving",
            where="--warn-before",
            fix=f"a longer --time, or --warn-before {limit // 4}",
        )
    return seconds


def saving_seconds(run: Run) -> float:
    """Seconds that writing a checkpoint of the run takes, at ASSUMED_BYTES_PER_SECOND.

    0 for an adapter, and where the model's shape is not at hand.
    """
    if run.adapter.kind != "none":
        return 0.0
    file = Path(run.model.name, "config.json")
    config = read_json(file) if file.is_file() else config_of_model(run.model.name)
    if config is None:
        return 0.0
    from tunesmith.planning.resolve import checkpoint_bytes  # loads torch

    spec = model_spec(config, where=run.model.name, trust_remote_code=run.model.trust_remote_code)
    base = file.parent if file.is_file() else None
    if run.model.dtype == "auto":
        run = replace(run, model=replace(run.model, dtype="bf16"))  # as on most GPUs
    size, _ = checkpoint_bytes(run, spec.parameters, base)
    return size / ASSUMED_BYTES_PER_SECOND


def limit_seconds(text: str) -> int:
    """Seconds of a time limit in Slurm's forms.

    They are `90` minutes, `2:30` minutes, `2:30:00`, `1-12`, `1-12:30:00`.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if not match:
        fix = "--time 90 (minutes), 12:00:00 or 2-00:00:00"
        raise UsageError(f"{text} is not a time limit", where="--time", fix=fix)
    has_days = match[1] is not None
    has_three_parts = match[4] is not None
    # Without days two parts are minutes and seconds; with days they are hours and minutes.
    days, first, second, third = (int(part or 0) for part in match.groups())
    if has_days or has_three_parts:
        return (days * 24 + first) * 3600 + second * 60 + third
    return first * 60 + second


def check_reach(run: Run, request: Request, words: Sequence[str]) -> None:
    """UsageError for what the job would fail on after it has waited in the queue.

    It says what to fetch or log in to; `words` are the recipe and its overrides as they were typed.
    """
    recipe_inputs(run)
    from tunesmith.hub.fetch import cached_model, local_model, repo_cache

    # Rows to train on and held-out ones may be splits of one data set.
    datasets = dict.fromkeys(source.source for source in hub_sources(run))
    missing = [name for name in datasets if not repo_cache(name, "dataset").exists()]
    if local_model(run.model) is None and cached_model(run.model) is None:
        missing.insert(0, run.model.name)
    # The nodes may have another cache, which this machine does not see.
    has_own_cache = re.search(r"\bHF_(HOME|HUB_CACHE)=", "\n".join(request.setup))
    if missing and not has_own_cache:
        raise UsageError(
            f"not fetched yet: {', '.join(missing)}",
            where="the Hub's cache",
            why="nodes often cannot reach the Hub, and the job gets no token: "
            "Slurm would store it on its disk",
            fix=f"tunesmith fetch {shell_command(words)}, "
            f"into {hub_home()}, which the nodes must be able to read",
        )
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if run.log.wandb and os.environ.get("WANDB_API_KEY") and not netrc.is_file():
        raise UsageError(
            "WANDB_API_KEY is not sent to the job",
            where="log.wandb",
            why="Slurm would store it on its controller's disk",
            fix="wandb login, which writes ~/.netrc for the nodes; "
            "or export WANDB_MODE=offline; or log.wandb=false",
        )


def check_mesh_of_job(run: Run, request: Request) -> None:
    """RecipeError where the recipe's mesh does not fit the ranks of the job."""
    if run.parallel != Parallel():
        from tunesmith.parallel.mesh import possible_shapes  # loads torch

        possible_shapes(run.parallel, request.nodes * ranks_of(request))


def hub_home() -> str:
    """The folder of the Hub's cache and of the stored token."""
    from huggingface_hub import constants

    return constants.HF_HOME


def submit(run: Run, request: Request) -> SlurmJob:
    """Write recipe and script, submit it, and note the job.

    UsageError where another job of the run directory waits or runs; MachineError in sbatch's words
    where it refuses.
    """
    text = render_script(run, request)
    # A job that cannot be noted is not submitted.
    state_folder()
    script = write_recipe(run).with_name(SCRIPT_NAME)
    write_atomically(script, text)
    # The flag too, because SBATCH_EXPORT of the environment wins over the script.
    code, out, errors = _slurm("sbatch", "--parsable", "--export=NONE", str(script))
    if code:
        fix = "sinfo shows partitions and limits; tunesmith doctor --slurm checks the cluster"
        raise MachineError("sbatch rejects the job", where=str(script), why=errors, fix=fix)
    # ID, or ID;CLUSTER
    id_ = out.strip().partition(";")[0]
    log = Path(run.output_dir, FOLDER, f"{LOG_NAME}-{id_}.log")
    job = SlurmJob(f"slurm-{id_}", run.output_dir, log=str(log), details={"id": id_})
    save_job(job)
    return job


def _slurm(*command: str) -> tuple[int, str, str]:
    """Run one of Slurm's commands: exit code, what it printed, and the last line of its errors."""
    done = try_on("", *command)
    if done.returncode == NO_COMMAND:
        fix = "run it on a login node of the cluster"
        raise MachineError(f"this machine has no {command[0]}", where="PATH", fix=fix)
    return done.returncode, done.stdout, last_line(done.stderr)


def _directive_word(value: str, where: str) -> str:
    """A value as one word of an #SBATCH line.

    Its reader knows quotes and the backslash, but neither $ nor `.
    """
    safe_value(value, where)
    # These characters mean nothing to the reader of directives; all else is quoted.
    if re.fullmatch(r"[\w./:=,%@+-]+", value):
        return value
    escaped = re.sub(r'([\\"])', r"\\\1", value)
    return f'"{escaped}"'


def _shell_word(value: str, where: str) -> str:
    return shlex.quote(safe_value(value, where))


def _container_words(run: Run, request: Request) -> list[str]:
    """Flags of Pyxis for srun, quoted: the image, and what the run reads and writes.

    The paths in the container are the same.
    """
    if not request.container:
        return []
    paths = [*map(str, recipe_inputs(run)), str(Path(run.output_dir).parent), hub_home()]
    for path in paths:
        if ":" in path or "," in path:
            fix = "rename it: Pyxis separates mounts by these"
            raise UsageError(
                f"a path with : or , cannot be mounted: {path}", where="--container", fix=fix
            )
    mounts = ",".join(f"{path}:{path}" for path in dict.fromkeys(paths))
    flags = [f"--container-image={request.container}", f"--container-mounts={mounts}"]
    return [*(_shell_word(flag, "--container") for flag in flags), "--no-container-mount-home"]

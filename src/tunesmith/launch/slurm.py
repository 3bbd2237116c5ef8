"""`launch slurm`: a batch script for one run; submitted, and found again.

Each node starts one node agent. The script names the head node by Slurm's own means, asks the ranks to save before the time
limit, and puts itself back into the queue. Nothing of the submitting shell's environment enters the job but the variables that
the script shows: Slurm keeps a job's environment on the controller's disk, where a token would stay.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith import __version__
from tunesmith.checkpoint.manifest import list_checkpoints, seconds_to_write
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, UsageError, is_secret_name, mask
from tunesmith.host.files import write_atomically
from tunesmith.host.shell import shell_word
from tunesmith.launch.inputs import hub_sources, recipe_inputs
from tunesmith.launch.jobs import (
    FOLDER,
    Job,
    State,
    all_jobs,
    last_step,
    safe_value,
    save_job,
    write_recipe,
)
from tunesmith.launch.sites import DIRECTIVES, Site
from tunesmith.model.safetensors_files import read_json
from tunesmith.model.shapes import config_of_model
from tunesmith.model.spec import read_spec
from tunesmith.run_dir import STOP_FILE

SCRIPT, LOG = "slurm.sh", "slurm"  # names in the folder `launch` of the run directory
WARNING = 300  # seconds before the time limit at which the run is asked to save, at least; a short limit has less
STEP_AND_CLOCK = (
    60  # of them for the step under way, and for Slurm's clock, which goes by the minute
)
# Bytes/s of a checkpoint where none of the run is there to be measured: a shared disk that several nodes write to.
ASSUMED_DISK = 1e9
WAITING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)
ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
# Variables of the submitting shell that the job gets, but for those with the name or the form of a secret.
EXPORTED = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|XDG_CACHE_HOME|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|TOKEN_PATH|ENDPOINT)"
    r"|WANDB_(PROJECT|ENTITY|MODE|BASE_URL|NAME)|TUNESMITH_(CACHE|DEBUG|HEARTBEAT_SECONDS)|(NCCL|GLOO|UCX)_[A-Z0-9_]+"
)

# The same for every job: the values are above it in the script.
BODY = r"""
say() { echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }
newest() { ls -d "$run"/checkpoint-*/manifest.json 2>/dev/null | sort -V | tail -n 1; }
address_of() { getent ahostsv4 "$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')" | awk 'NR == 1 {print $1}'; }

export SLURM_EXPORT_ENV=ALL PYTHONUNBUFFERED=1  # what is above is for every node
attempt=${SLURM_RESTART_COUNT:-0}
stop_file=$run/launch/stop-$SLURM_JOB_ID  # of `tunesmith stop`
if [ "$attempt" -gt "$max_requeues" ]; then  # Slurm itself requeues after a lost node, without a bound
    say "requeued $attempt times, which is more than $max_requeues: it ends here"
    exit 1
fi
if [ -e "$stop_file" ]; then
    rm -f "$stop_file"
    say "tunesmith stop came before the start: it ends here"
    exit 75
fi

host=127.0.0.1 port=$((20000 + SLURM_JOB_ID % 10000))
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    host=$(address_of "${nodes[0]}")
    case $host in 127.*)  # the node's own hosts file: what the other nodes reach is the address of the route to them
        host=$(ip -4 route get "$(address_of "${nodes[1]}")" | sed -n 's/.* src \([^ ]*\).*/\1/p') ;;
    esac
fi

say "start $attempt on $SLURM_JOB_NODELIST, GPUs of a node: ${SLURM_GPUS_ON_NODE:-none}, rendezvous $host:$port"
before=$(newest) requeue= asked= srun=
trap 'requeue=1; say "the time limit is near: the run saves and ends"; kill -USR1 $srun' USR1  # srun hands it on
# Slurm sends SIGTERM to the steps too. After the warning it is the time limit; else scancel, after which no job starts again.
trap '[ -n "$requeue" ] || asked=scancel; say "SIGTERM: the run saves and ends"' TERM
srun --kill-on-bad-exit=1 --wait=120 --mpi=none --ntasks-per-node=1 "${container[@]}" "$python" -m tunesmith.launch.node \
    --nodes "$SLURM_JOB_NUM_NODES" --ranks "$ranks" --endpoint "$host:$port" --id "$SLURM_JOB_ID" "${debug[@]}" \
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
    asked=stop
fi
# A lost node or a killed process fails the run (1; 137 and 143 where a launcher itself was killed by SIGKILL or SIGTERM). One
# that had come further before it failed is worth another start: at the same place it would fail again.
now=$(newest)
case $code in 1 | 137 | 143)
    if [ -n "$now" ] && [ "$now" != "$before" ]; then requeue=1; fi ;;
esac
how=
case $code in
137) how=" (a process was killed by SIGKILL: by somebody, or for want of memory)" ;;
143) how=" (a process was killed by SIGTERM)" ;;
esac
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ -n "$requeue" ] && [ -z "$asked" ] && [ "$attempt" -lt "$max_requeues" ]; then
    say "exit code $code$how; back into the queue, $((attempt + 1)) of at most $max_requeues times"
    scontrol requeue "$SLURM_JOB_ID"
else
    say "exit code $code$how"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Request:
    """One submission: a run, on so many nodes.

    `warning`: seconds before the time limit at which all ranks are asked to save; None: 300, or more where saving takes
    longer, but no more than a quarter of the limit. `saving`: seconds that a checkpoint takes, as far as that is known.
    `debug`: the agents collect what ranks and NCCL say.
    """

    site: Site
    nodes: int = 1
    max_requeues: int = 5
    warning: int | None = None
    saving: float = 0.0
    debug: bool = False


class SlurmJob(Job):
    """A job. `details`: its `id`."""

    def state(self) -> State:
        id_ = self.details["id"]
        code, text, why = _slurm(
            "squeue", "--noheader", "--states=all", "--jobs", id_, "--format=%T|%r|%M|%l|%N"
        )
        if code and "Invalid job id" not in why:
            fix = "sinfo, on a login node of the cluster"
            raise MachineError("Slurm does not answer", where="squeue", why=why, fix=fix)
        found = (text.splitlines() or [""])[-1].split("|")
        if found[0] in WAITING:
            return State("waiting", f"{found[0]}: {found[1]}")
        if found[0] and found[0] not in ENDED:
            step = last_step(self.run_dir) or "before the first step"
            return State(
                "running", f"{step}; {found[0]} for {found[2]} of {found[3]} on {found[4]}"
            )
        phase, said = super().state()
        return State("ended" if found[0] else phase, f"{found[0]} {said}".strip())

    def stop(self, say: Callable[[str], None] = lambda text: None) -> str:
        id_, state = self.details["id"], self.state()
        if not state.at_work:
            return "it has ended already"
        if state.phase == "running":
            # The first is for the script, which does not requeue; the second tells a stop from Slurm's own SIGTERM.
            out = Path(self.run_dir)
            for file in (out / FOLDER / f"{STOP_FILE}-{id_}", out / STOP_FILE):
                with suppress(OSError):
                    file.touch()
        # To a running job's steps alone: the script waits for them.
        code, _, why = _slurm("scancel", *["--signal=TERM"] * (state.phase == "running"), id_)
        if code:
            raise MachineError(
                "scancel failed", where=id_, why=why, fix=f"scancel {shell_word(id_)}"
            )
        return "asked to save and end" if state.phase == "running" else "taken out of the queue"


def render_script(run: Run, request: Request) -> str:
    """The batch script. Every value from a recipe or flag stands in a quoted word of a directive or of an assignment."""
    site = request.site
    if "\\" in run.output_dir:
        fix = "output_dir=runs/my-run"
        raise UsageError(
            "a backslash in the path of the log means something to Slurm",
            where="output_dir",
            fix=fix,
        )
    folder = run.output_dir.replace("%", "%%")  # Slurm fills in %
    name = f"{folder}/{FOLDER}/{LOG}-%j.log"
    directives = {
        "job-name": Path(run.output_dir).name, "output": name, "open-mode": "append", "nodes": str(request.nodes),
        "ntasks-per-node": "1", "export": "NONE", **{key.replace("_", "-"): vars(site)[key] for key in DIRECTIVES},
        "gpus-per-node": site.gpus_per_node if site.gpus_per_node != "0" else None,
        "signal": f"B:USR1@{warning_of(request)}",
    }  # fmt: skip
    lines = [
        f"--{key}={_directive_word(value, f'--{key}')}"
        for key, value in directives.items()
        if value is not None
    ]
    lines += [
        "--requeue" if request.max_requeues else "--no-requeue",
        *["--exclusive"] * site.exclusive,
    ]
    lines += [safe_value(line, "--sbatch-arg") for line in site.sbatch]
    values = {
        "python": shlex.quote("python3" if site.container else sys.executable), "run": _shell_word(run.output_dir, "output_dir"),
        "ranks": str(ranks_of(site)), "max_requeues": str(request.max_requeues),
        "debug": "(--debug)" if request.debug else "()",
        "container": f"({' '.join(_container_words(run, site))})",
    }  # fmt: skip
    environment = {}
    for key, value in os.environ.items():
        is_of_this_system = site.container and "PATH" in key
        is_secret = is_secret_name(key) or mask(value) != value
        if EXPORTED.fullmatch(key) and not is_of_this_system and not is_secret:
            environment[key] = value
    if site.container:  # its home is another
        environment["HF_HOME"] = hub_home()
    exports = (environment | site.environment).items()
    return "\n".join([
        "#!/bin/bash -l", f"# Written by tunesmith {__version__}: tunesmith launch slurm --help",
        *(f"#SBATCH {line}" for line in lines), "",
        *(f"export {key}={_shell_word(value, key)}" for key, value in sorted(exports)),
        *(safe_value(line, "setup of the site") for line in site.setup),
        *(f"{key}={value}" for key, value in values.items()), BODY,
    ])  # fmt: skip


def ranks_of(site: Site) -> int:
    """Ranks of a node: one a GPU, without GPUs one. UsageError where the GPUs are not `8` or `h100:8`."""
    found = re.fullmatch(r"(?:[\w.-]+:)?(\d{1,3})", site.gpus_per_node or "", re.ASCII)
    if not found:
        what = (
            f"{site.gpus_per_node} is not a number of GPUs"
            if site.gpus_per_node
            else "how many GPUs of each node?"
        )
        fix = "--gpus-per-node 8, or h100:8, or 0 to train on CPUs"
        raise UsageError(what, where="--gpus-per-node", fix=fix)
    return max(int(found[1]), 1)


def warning_of(request: Request) -> int:
    """Seconds before the time limit at which the ranks are asked to save."""
    limit = limit_seconds(request.site.time) if request.site.time else 0
    by_size = max(WARNING, seconds_to_save(request))
    wanted = request.warning or min(by_size, limit // 4 or by_size)
    if limit and wanted > limit // 2:
        what = f"of {limit} s the run would save for {wanted} s"
        raise UsageError(
            what, where="--warn-before", fix=f"a longer --time, or --warn-before {limit // 4}"
        )
    return wanted


def seconds_to_save(request: Request) -> int:
    """Seconds that the run needs before the limit, 0 where that is not known: a disk may be half as fast the next time."""
    return STEP_AND_CLOCK + math.ceil(2 * request.saving) if request.saving else 0


def warn_of_short_limit(request: Request) -> str:
    """A line for the user where the last checkpoint may not be whole before the time limit; empty where it will be."""
    needed, wanted = seconds_to_save(request), warning_of(request)
    if needed <= wanted:
        return ""
    limit = limit_seconds(request.site.time) if request.site.time else 0
    longer = f"--time {math.ceil(2 * needed / 60)}"  # minutes: half of it may be left for saving
    fix = (
        f"--warn-before {needed}"
        if not limit or needed <= limit // 2
        else f"{longer} --warn-before {needed}"
    )
    return f"warning: saving may take {needed} s, and the run is asked to save {wanted} s before the time limit; fix: {fix}"


def saving_seconds(run: Run) -> float:
    """Seconds that writing a checkpoint of the run takes: as many as the newest one in its directory took, else by its
    bytes at ASSUMED_DISK; 0 for an adapter, and where the model's shape is not at hand."""
    for checkpoint in list_checkpoints(Path(run.output_dir)):
        if (seconds := seconds_to_write(checkpoint.path)) is not None:
            return seconds
    if run.adapter.kind != "none":
        return 0.0
    file = Path(run.model.name, "config.json")
    config = read_json(file) if file.is_file() else config_of_model(run.model.name)
    if config is None:
        return 0.0
    from tunesmith.planning.resolve import checkpoint_bytes  # loads torch

    spec = read_spec(config, where=run.model.name, trust_remote_code=run.model.trust_remote_code)
    size, _ = checkpoint_bytes(run, spec.parameters)
    return size / ASSUMED_DISK


def limit_seconds(text: str) -> int:
    """A time limit in Slurm's forms, in seconds: `90` minutes, `2:30` minutes, `2:30:00`, `1-12`, `1-12:30:00`."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if not found:
        raise UsageError(
            f"{text} is no time limit",
            where="--time",
            fix="--time 90 (minutes), 12:00:00 or 2-00:00:00",
        )
    days, *parts = (int(part) if part else None for part in found.groups())
    first, second, third = (part or 0 for part in parts)
    if days is not None or parts[2] is not None:  # hours come first
        return ((days or 0) * 24 + first) * 3600 + second * 60 + third
    return first * 60 + second


def check_reach(run: Run, site: Site) -> None:
    """Refuse now what the job would fail on after it has waited in the queue: UsageError says what to fetch or log in to."""
    recipe_inputs(run)
    from tunesmith.hub.fetch import cached_model, local_model, repo_cache

    # Another cache, which this machine may not see
    own = {"HF_HOME", "HF_HUB_CACHE"} & {*site.environment}
    missing = [s.source for s in hub_sources(run) if not repo_cache(s.source, "dataset").exists()]
    if local_model(run.model) is None and cached_model(run.model) is None:
        missing.insert(0, run.model.name)
    if missing and not own:
        why = "nodes often have no way to the Hub, and the job gets no token: Slurm would keep it on its disk"
        fix = f"tunesmith fetch RECIPE, into {hub_home()}, which the nodes must see"
        raise UsageError(
            f"not fetched yet: {', '.join(missing)}", where="the Hub's cache", why=why, fix=fix
        )
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if run.log.wandb and os.environ.get("WANDB_API_KEY") and not netrc.is_file():
        why = "Slurm would keep it on its controller's disk"
        fix = "wandb login, which writes ~/.netrc for the nodes; or export WANDB_MODE=offline; or log.wandb=false"
        raise UsageError(
            "WANDB_API_KEY is not sent to the job", where="log.wandb", why=why, fix=fix
        )


def hub_home() -> str:
    """The folder of the Hub's cache and of the stored token."""
    from huggingface_hub import constants

    return constants.HF_HOME


def submit(run: Run, request: Request) -> SlurmJob:
    """Write recipe and script, submit it, and note the job; MachineError in sbatch's words where it refuses."""
    for job in all_jobs():
        if isinstance(job, SlurmJob) and job.run_dir == run.output_dir:
            job.check_ended()
    text = render_script(run, request)
    script = write_recipe(run).with_name(SCRIPT)
    write_atomically(script, text)
    # The flag too, because SBATCH_EXPORT of the environment wins over the script.
    code, told, why = _slurm("sbatch", "--parsable", "--export=NONE", str(script))
    if code:
        fix = "sinfo shows partitions and limits"
        raise MachineError("sbatch refuses the job", where=str(script), why=why, fix=fix)
    id_ = told.strip().partition(";")[0]
    log = Path(run.output_dir, FOLDER, f"{LOG}-{id_}.log")
    job = SlurmJob(f"slurm-{id_}", run.output_dir, log=str(log), details={"id": id_})
    save_job(job)
    return job


def _slurm(*command: str) -> tuple[int, str, str]:
    """Run one of Slurm's commands: exit code, what it printed, and the last line of its errors."""
    if shutil.which(command[0]) is None:
        fix = "run it on a login node of the cluster"
        raise MachineError(f"this machine has no {command[0]}", where="PATH", fix=fix)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]


def _directive_word(value: str, where: str) -> str:
    """A value as one word of an #SBATCH line, whose reader knows quotes and the backslash, but neither $ nor `."""
    safe_value(value, where)
    return (
        value
        if re.fullmatch(r"[\w./:=,%@+-]+", value)
        else '"' + re.sub(r'([\\"])', r"\\\1", value) + '"'
    )


def _shell_word(value: str, where: str) -> str:
    return shlex.quote(safe_value(value, where))


def _container_words(run: Run, site: Site) -> list[str]:
    """Flags of Pyxis for srun, quoted: the image, and what the run reads and writes mounted at the same paths."""
    if not site.container:
        return []
    paths = [*map(str, recipe_inputs(run)), str(Path(run.output_dir).parent), hub_home()]
    for path in paths:
        if ":" in path or "," in path:
            fix = "rename it: Pyxis separates mounts by these"
            raise UsageError(
                f"a path with : or , cannot be mounted: {path}", where="--container", fix=fix
            )
    mounts = ",".join(f"{path}:{path}" for path in dict.fromkeys(paths))
    flags = [
        f"--container-image={site.container}",
        f"--container-mounts={mounts}",
        "--no-container-mount-home",
    ]
    return [_shell_word(flag, "--container") for flag in flags]

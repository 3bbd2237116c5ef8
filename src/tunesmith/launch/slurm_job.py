"""A run in the queue of a Slurm cluster, as a job."""

from contextlib import suppress
from pathlib import Path

from tunesmith.errors import EXIT_STOPPED, MachineError
from tunesmith.host.child_output import last_line
from tunesmith.host.shell import shell_word
from tunesmith.launch.job import (
    FOLDER,
    Job,
    JobState,
    last_step,
    search_log,
    step_and_time_left,
)
from tunesmith.launch.ssh import NO_COMMAND, try_on
from tunesmith.run_dir import STOP_FILE, RunState

# Slurm's states of queued jobs and of ended jobs. A job in any other state is running.
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


class SlurmJob(Job):
    """A job of Slurm. `details["id"]` is the id of the job."""

    def state(self) -> JobState:
        id_ = self.details["id"]
        form = "--format=%T|%r|%M|%l|%N"
        # Use `--states=all`, because squeue otherwise does not list a job that has just ended.
        code, out, errors = run_slurm("squeue", "--noheader", "--states=all", "--jobs", id_, form)
        # "Invalid job id" means that the job has ended, because Slurm deletes a job's record some
        # minutes after its end.
        if code and "Invalid job id" not in errors:
            raise MachineError(
                "Slurm does not respond",
                where="squeue",
                why=errors,
                fix="run `tunesmith doctor --slurm` on a login node of the cluster",
            )
        if not out.strip():
            return super().state()
        name, reason, elapsed, limit, nodes = out.splitlines()[-1].split("|")
        if name in WAITING_JOBS:
            # Show the progress of a queued job that has already run. It will resume from its last
            # checkpoint.
            run = super().state()
            done = run.text if run.state is RunState.STOPPED else last_step(self.run_dir)
            return JobState(RunState.QUEUED, "; ".join(filter(None, (f"{name}: {reason}", done))))
        if name in ENDED_JOBS:
            words = name if reason == "None" else f"{name}: {reason} on {nodes}"
            # The exit code of the job's last start
            last_code = search_log(self.log, rf"(?s).*job {id_}: exit code (\d+)")
            ending = RunState.STOPPED if last_code == str(EXIT_STOPPED) else ENDED_JOBS[name]
            return super().state().after(ending, words)
        step = step_and_time_left(self.run_dir) or "before the first step"
        return JobState(RunState.RUNNING, f"{step}; {name} for {elapsed} of {limit} on {nodes}")

    def stop(self) -> str:
        id_ = self.details["id"]
        state = self.state().state
        if state is RunState.QUEUED:
            _cancel(id_)
            return "removed from the queue"
        if state is not RunState.RUNNING:
            return "the job has already ended"
        # If the first file exists, the script does not requeue the job. If the second file exists,
        # the run treats SIGTERM as a request of `tunesmith stop`, not of Slurm.
        out = Path(self.run_dir)
        request = out / FOLDER / f"{STOP_FILE}-{id_}"
        if request.exists():
            return "a stop was already requested"
        for file in (request, out / STOP_FILE):
            # Ignore an error: the folder may be on a disk that this machine cannot access, and
            # SIGTERM below stops the job even without the files.
            with suppress(OSError):
                file.touch()
        # scancel sends this signal only to the job steps. The script waits for their end.
        _cancel("--signal=TERM", id_)
        return "stop requested: the run saves, then stops"


def _cancel(*words: str) -> None:
    """Run scancel. Raise MachineError if it fails.

    Args:
        words: the arguments of scancel. The last one is the id of the job.
    """
    code, _, errors = run_slurm("scancel", *words)
    if code:
        id_ = words[-1]
        raise MachineError(
            "scancel failed", where=id_, why=errors, fix=f"scancel {shell_word(id_)}"
        )


def run_slurm(*command: str) -> tuple[int, str, str]:
    """Run a command of Slurm.

    Return its exit code, its output, and the last line of its error output. Raise MachineError if
    the command is not installed.
    """
    done = try_on("", *command)
    if done.returncode == NO_COMMAND:
        raise MachineError(
            f"{command[0]} is not installed",
            where="PATH",
            fix="run the command on a login node of the cluster",
        )
    # The last line may only say: Try "sbatch --help".
    errors = last_line(done.stderr.partition("\nTry ")[0])
    return done.returncode, done.stdout, errors

"""A launched run ("job"): its state, its log and its end, and the file in which it is saved.

A launch writes one small file to the user's state folder: the kind of launch, the run directory,
the log file, and the data with which this kind of launch finds the job again. The file contains no
token. A run that was started without `launch` has no such file, but is found by its run directory.
"""

import fcntl
import io
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tunesmith.checkpoint.claim import LAUNCH
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.files import in_home, write_atomically
from tunesmith.host.shell import shell_path
from tunesmith.metrics.record import newest_record, newest_records
from tunesmith.metrics.run_figures import RECENT_STEPS
from tunesmith.run_dir import (
    FAILURE,
    FINAL,
    IDENTITY,
    LOCK,
    LOG,
    METRICS,
    RECIPE,
    STOP_FILE,
    STOPPED,
    RunState,
    ended_state,
    open_regular,
    read_failure,
    read_manifest,
    read_part,
    read_recipe,
    read_stopped,
    share_done,
)
from tunesmith.units import format_seconds

# Name of a folder in the run directory. Only `launch` writes files to this folder.
FOLDER = LAUNCH
LAUNCHED_RECIPE = "recipe.yaml"  # in FOLDER
# Files that are written by a run. If one of them exists, the run has started. The first of them is
# written within seconds.
WRITTEN_BY_RUNS = (METRICS, RECIPE, IDENTITY, LOG)
# Seconds between two reads of a log while a command waits for new text.
POLL = 0.5


class JobState(NamedTuple):
    """The state of a job, with a description in words."""

    state: RunState
    text: str

    @property
    def at_work(self) -> bool:
        return self.state in (RunState.QUEUED, RunState.RUNNING)

    def after(self, ending: RunState, words: str) -> "JobState":
        """Combine this state, which was read from the run directory, with the state in a job queue.

        If the run directory says that the run was stopped or failed, its state is used, because the
        queue may call such a job "completed" or "cancelled". Otherwise the state of the queue is
        used, because this machine may not have access to the run directory.

        Args:
            ending: the state that the job queue reports.
            words: a description of `ending`.
        """
        if self.state in (RunState.STOPPED, RunState.FAILED):
            ending = self.state
        return JobState(ending, f"{words}; {self.text}")


@dataclass(frozen=True)
class Job:
    """A run that is identified by its run directory. Each kind of launch has a subclass.

    Attributes:
        name: the name, such as `local-4711` or `slurm-123`. The first word is the kind of launch.
            "" if the run was started without `launch`.
        run_dir: the absolute path of the run directory.
        host: the host on which the run was launched.
        log: the file with the output of the run.
        details: the data that this kind of launch needs to find the job.
    """

    name: str
    run_dir: str
    host: str = field(default_factory=socket.gethostname)
    log: str = ""
    details: dict[str, str] = field(default_factory=dict)

    def state(self) -> JobState:
        """Read the state of the job from its run directory.

        The state is UNKNOWN if a later job was launched in the same run directory.
        """
        later = self.later_job()
        if later:
            return JobState(
                RunState.UNKNOWN, f"the newer job {later.name} uses the same run directory"
            )
        out = Path(self.run_dir)
        # Check the lock first, because the directory of a running process may still have files of
        # earlier starts, such as failure.json.
        if is_locked(out):
            return JobState(RunState.RUNNING, step_and_time_left(out) or "before the first step")
        failure = read_failure(out).value if self.has_written(FAILURE) else None
        stopped = read_stopped(out).value if self.has_written(STOPPED) else None
        final = read_part(out / FINAL, read_manifest).value
        record = newest_record(out)
        state, step = ended_state(record.get("step"), failure, stopped, final)
        # Compute the total number of steps from the step and epoch of one record. Do not use the
        # saved step, which may be one step later than the record.
        total = _total_steps(out, record)
        texts = [_describe_step({**record, "step": step}, total) or "before the first step"]
        if failure:
            texts.insert(0, failure.get("what") or "")
        elif stopped and stopped.get("step"):
            texts.insert(0, "saved")
        # If the job failed before it wrote any file, only the log contains its error.
        if self.log and not (failure or stopped or any(map(self.has_written, WRITTEN_BY_RUNS))):
            error = first_error(self.log)
            if error:
                return JobState(RunState.FAILED, error)
            if search_log(self.log, r"^(stopped by|rank \d.* was stopped by) SIG"):
                return JobState(RunState.STOPPED, "before the first step")
        if state is RunState.KILLED:
            # If the nodes share no disk, only the node of rank 0 has the log.
            if self.name and self.host != socket.gethostname() and not (out / LOG).exists():
                return JobState(RunState.UNKNOWN, f"the log is on {self.host}")
            if not holds_run(out):
                return JobState(RunState.UNKNOWN, "the run directory contains no run yet")
            texts.append("this machine has no process of the run; the same command resumes the run")
        if state is RunState.FINISHED and final and final["step"] != step:
            texts.append(f"{FINAL}/ has the weights of step {final['step']}")
        return JobState(state, ", ".join(filter(None, texts)))

    def is_alive(self) -> bool:
        """Return whether a process of this job is known to run on this machine."""
        return False

    def read_log(self, *, follow: bool) -> Iterator[str]:
        """Yield the text of the log file in pieces.

        Args:
            follow: wait for new text until the job has ended.
        """
        log = Path(self.log or Path(self.run_dir, LOG))
        while follow and not log.exists() and self.state().at_work:
            time.sleep(POLL)
        try:
            file = io.TextIOWrapper(open_regular(log), encoding="utf-8", errors="replace")
        except OSError as error:
            state = self.state()
            status = f"tunesmith status {shell_path(self.name or self.run_dir)}"
            raise MachineError(
                "the log cannot be opened",
                where=log,
                why=f"{error.strerror}; the job is {state.state}: {state.text}",
                fix=f"check with `{status}` whether the job has started",
            ) from None
        with file:
            is_over = not follow
            while True:
                text = file.read()
                if text:
                    yield text
                elif is_over:
                    return
                else:
                    time.sleep(POLL)
                    # If the job has ended, read the log once more to get its last lines.
                    is_over = not self.state().at_work

    def has_written(self, name: str) -> bool:
        """Return whether the run directory has a file `name` that is newer than the launch of the
        job.
        """
        file = Path(self.run_dir, name)
        try:
            launched_at = (_notes() / f"{self.name}.json").stat().st_mtime
            return file.stat().st_mtime >= launched_at
        except OSError:
            # If this machine has no file of the job, the time of the launch is unknown. Therefore
            # accept a file `name` of any age.
            return file.is_file()

    def is_in(self, run_dir: str) -> bool:
        """Return whether `run_dir` is the run directory. Symbolic links are resolved."""
        return os.path.realpath(self.run_dir) == os.path.realpath(run_dir)

    def later_job(self) -> "Job | None":
        """Return the newest job of this run directory if it is newer than this job, else None."""
        jobs = [job for job in saved_jobs() if job.is_in(self.run_dir)]
        return jobs[-1] if self.name in [job.name for job in jobs[:-1]] else None

    def stop(self) -> str:
        """Ask the run to save and end, by creating the file `stop` in its run directory.

        Returns:
            A message for the user.
        """
        if self.later_job() or not is_locked(Path(self.run_dir)):
            state = self.state()
            return f"there is nothing to stop: the state is {state.state}, {state.text}"
        Path(self.run_dir, STOP_FILE).touch()
        return "stop requested by the file `stop` in the run directory: the run saves, then stops"

    def check_ended(self) -> None:
        """Raise UsageError if the job is queued or running, so that no second job is launched."""
        state = self.state()
        if state.at_work:
            raise UsageError(
                f"{self.name or 'a run'} is already running",
                where=self.run_dir,
                why=state.text,
                fix=f"run `tunesmith stop {shell_path(self.name or self.run_dir)}`, "
                "or set output_dir=runs/another-name",
            )


def holds_run(run_dir: Path) -> bool:
    """Return whether a folder contains a run: a file of a run, or the lock of a running process."""
    return any((run_dir / name).is_file() for name in WRITTEN_BY_RUNS) or is_locked(run_dir)


def search_log(log: str, pattern: str) -> str:
    """Return the first group of a pattern's first match in a job's log, or "" if there is none."""
    with suppress(OSError), open_regular(Path(log)) as file:
        match = re.search(pattern, file.read().decode(errors="replace"), re.MULTILINE)
        return match[1] if match else ""
    return ""


def first_error(log: str) -> str:
    """Return the first error of tunesmith or Slurm in a job's log, or "" if there is none."""
    # Match the error message and its continuation lines, which are indented by at least three
    # spaces. The lines after the message, such as "  fix: ...", are indented by two spaces.
    # Slurm writes "error: *** JOB 7 CANCELLED" and the exit code of each task.
    error = r"(?!\*\*\*|.*Exited with exit code)(.+(?:\n {3,}.+)*)"
    return " ".join(search_log(log, rf"^(?:\w+: )?error: {error}").split())


def is_locked(run_dir: Path) -> bool:
    """Return whether a process of this machine has locked the run directory."""
    try:
        # Use O_NONBLOCK, because opening a named pipe would otherwise block.
        handle = os.open(run_dir / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # A running run has the exclusive lock, so that this shared lock fails. The lock is shared,
        # because several readers may check it at the same time.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def last_step(run_dir: str | Path) -> str:
    """Describe the newest metrics record, as in `step 120 of 400, loss 1.234`.

    Return "" if there is no record yet. Only the end of metrics.jsonl is read.
    """
    record = newest_record(Path(run_dir))
    return _describe_step(record, _total_steps(Path(run_dir), record))


def step_and_time_left(run_dir: str | Path) -> str:
    """Describe the newest record of a running run, with an estimate of the remaining time.

    The estimate uses the mean duration of the newest steps.
    """
    records = list(itertools.islice(newest_records(Path(run_dir)), RECENT_STEPS))
    if not records:
        return ""
    total = _total_steps(Path(run_dir), records[0])
    text = _describe_step(records[0], total)
    seconds = list(filter(None, (record.get("step_seconds") for record in records)))
    if not text or not seconds or total is None:
        return text
    left = max(0.0, total - (records[0].get("step") or 0)) * fmean(seconds)
    return f"{text}, {format_seconds(left)} left"


def _describe_step(record: Mapping[str, int | float | None], total: int | None) -> str:
    """Describe a record, as in `step 120 of 400, loss 1.234`. Return "" if it has no loss."""
    if record.get("loss") is None:
        return ""
    total_text = f" of {total}" if total else ""
    return f"step {record['step']}{total_text}, loss {record['loss']:.4g}"


def _total_steps(run_dir: Path, record: Mapping[str, int | float | None]) -> int | None:
    """Estimate the total number of steps of a run.

    Return None if it is unknown, for example because the duration is a time.
    """
    step = record.get("step") or 0
    # The run replaces its recipe only when it starts. A launch may have set another duration.
    files = [run_dir / RECIPE, run_dir / FOLDER / LAUNCHED_RECIPE]
    file = max(filter(Path.exists, files), key=lambda path: path.stat().st_mtime, default=files[0])
    share = share_done(read_recipe(file).value, step, record.get("epoch") or 0)
    return round(step / share) if share else None


def _notes() -> Path:
    """Return the user's folder of job files, in `$XDG_STATE_HOME` or `~/.local/state`."""
    return in_home(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "tunesmith" / "jobs"


def state_folder() -> Path:
    """Return the user's folder of job files. Create it if needed, readable only by the user."""
    folder = _notes()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def save_job(job: Job) -> None:
    """Write the file of a job. It replaces the file of an earlier job with the same name."""
    write_atomically(state_folder() / f"{job.name}.json", json.dumps(asdict(job), indent=1))


def saved_jobs() -> list[Job]:
    """Return all saved jobs, the newest last. Files that cannot be read are skipped."""
    jobs = []
    for file in sorted(_notes().glob("*.json"), key=lambda path: path.stat().st_mtime):
        # Skip a file of another user or of another version.
        with suppress(OSError, ValueError, TypeError):
            jobs.append(Job(**json.loads(file.read_bytes())))
    return jobs

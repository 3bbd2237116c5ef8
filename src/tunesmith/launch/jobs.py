"""Registry of launched runs ("jobs"), which `status`, `logs` and `stop` look up by name or by run
directory.

A launch writes one small file to the user's state folder: the kind of launch, the run directory,
the log file, and the data with which this kind of launch finds the job again. The file contains no
token. A run that was started without `launch` has no such file, but is found by its run directory.
"""

import fcntl
import getpass
import hashlib
import io
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tunesmith.checkpoint.claim import LAUNCH, check_run_dir, is_run
from tunesmith.config.dump import dump
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.files import find_similar_path, write_atomically
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
    SWEEP,
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

# Name of the job class for each kind of launch. The class is in tools/launch/<kind>.py.
JOB_CLASSES = {"local": "LocalJob", "docker": "DockerJob", "slurm": "SlurmJob", "swarm": "SwarmJob"}
# Name of a folder in the run directory. Only `launch` writes files to this folder.
FOLDER = LAUNCH
# Files that are written by a run. If one of them exists, the run has started. The first of them is
# written within seconds.
WRITTEN_BY_RUNS = (METRICS, RECIPE, IDENTITY, LOG)
# Number of bytes at the start of a job's log in which the first error is searched.
LOG_BYTES = 1 << 20
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
            text = f"the newer job {later.name} uses the same run directory"
            return JobState(RunState.UNKNOWN, text)
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
            error = first_error(Path(self.log))
            if error:
                return JobState(RunState.FAILED, error)
        if state is RunState.KILLED:
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
            status = f"tunesmith status {shell_path(self.name or self.run_dir)}"
            fix = f"check with `{status}` whether the job has started"
            raise MachineError(
                "the log cannot be opened", where=str(log), why=error.strerror or "", fix=fix
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

    def later_job(self) -> "Job | None":
        """Return the newest job of this run directory if it is newer than this job, else None."""
        jobs = jobs_of(self.run_dir)
        is_earlier = self.name in [job.name for job in jobs[:-1]]
        return jobs[-1] if is_earlier else None

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


def first_error(log: Path) -> str:
    """Return the first error of tunesmith or Slurm in a job's log, or "" if there is none."""
    with suppress(OSError), open_regular(log) as file:
        text = file.read(LOG_BYTES).decode(errors="replace")
        # Match the error message and its continuation lines, which are indented by at least three
        # spaces. The lines after the message, such as "  fix: ...", are indented by two spaces.
        match = re.search(r"^(?:\w+: )?error: (.+(?:\n {3,}.+)*)", text, re.MULTILINE)
        return " ".join(match[1].split()) if match else ""
    return ""


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the run directories in a folder. Subfolders that are not runs are searched too."""
    for path in sorted([*folder.glob("*/"), *folder.glob("*/*/")]):
        if holds_run(path) and (path.parent == folder or not holds_run(path.parent)):
            yield path


def with_runs_of_folders(words: Sequence[str]) -> list[str]:
    """Replace each folder that contains runs by its run directories.

    Other words are kept. The order is kept, and duplicates are removed.
    """
    named = []
    for word in words:
        folder = Path(word)
        # The folder of a sweep contains runs but is not a run itself, although a running sweep
        # locks it.
        is_run_itself = holds_run(folder) and not (folder / SWEEP).is_file()
        runs = () if is_run_itself else run_folders(folder)
        named += [*map(str, runs)] or [word]
    return list(dict.fromkeys(named))


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


def is_at_work(run_dir: Path) -> bool:
    """Return whether a process of this machine trains in the run directory.

    Also return True if a process was launched but has not locked the directory yet.
    """
    if is_locked(run_dir):
        return True
    if not (run_dir / FOLDER).is_dir():
        return False  # nothing was launched here
    return any(job.is_alive() for job in jobs_of(str(run_dir)))


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
    share = share_done(read_recipe(run_dir).value, step, record.get("epoch") or 0)
    return round(step / share) if share else None


def safe_value(value: str, where: str) -> str:
    """Return the value if it can be written to a shell script or a Docker stack file.

    Raise UsageError if the value has a control character. A newline would end the line of the
    script, and other control characters would change how a terminal shows the script.
    """
    if not value.isprintable():
        what = f"{value!r} contains a line break or another control character"
        raise UsageError(what, where=where, fix="remove the character from the value")
    return value


def name_of_run(kind: str, run_dir: str) -> str:
    """Return a job name that is unique for a run directory, such as `swarm-my-run-1f3a5c`."""
    # Use only lowercase letters, digits and "-", which are allowed in all Docker names.
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(run_dir).lower())[:30].strip("-")
    digest = hashlib.sha256(os.fsencode(run_dir)).hexdigest()
    return "-".join(filter(None, (kind, slug, digest[:6])))


def agent_words(recipe: Path, *, debug: bool = False, **flags: object) -> list[str]:
    """Return the arguments of `python` that start the node agent with a recipe.

    Args:
        flags: flags of the node agent with their values.
    """
    words = ["-m", "tunesmith.launch.node"]
    for flag, value in flags.items():
        words += [f"--{flag}", str(value)]
    if debug:
        words.append("--debug")
    return [*words, "--", "train", str(recipe)]


def recipe_file(run_dir: str) -> Path:
    """Return the path to which `write_recipe` writes the recipe of a run directory."""
    return Path(run_dir, FOLDER, "recipe.yaml")


def write_recipe(run: Run) -> Path:
    """Write the resolved recipe to the run directory, where all nodes read it.

    Raise UsageError if a run is active in the directory, because a rank of this run may still read
    the file.
    """
    file = recipe_file(safe_value(run.output_dir, "output_dir"))
    check_free(run.output_dir)
    check_run_dir(Path(run.output_dir), inputs_of(run).values())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump(run))
    return file


def check_free(run_dir: str) -> None:
    """Raise UsageError if a job is queued or running in the run directory, or if it is locked."""
    for job in (*jobs_of(run_dir), Job("", run_dir)):
        # If the job queue or daemon does not answer, `check_ended` raises MachineError, because the
        # state of the job is unknown. Ignore this error. The last `Job` of the loop still checks
        # whether a process has locked the run directory.
        with suppress(MachineError):
            job.check_ended()


def _notes() -> Path:
    """Return the user's folder of job files, in `$XDG_STATE_HOME` or `~/.local/state`."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "tunesmith" / "jobs"


def state_folder() -> Path:
    """Return the user's folder of job files. Create it if needed, readable only by the user."""
    folder = _notes()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def save_job(job: Job) -> None:
    """Write the file of a job. It replaces the file of an earlier job with the same name."""
    write_atomically(state_folder() / f"{job.name}.json", json.dumps(asdict(job), indent=1))


def all_jobs() -> list[Job]:
    """Return all saved jobs, the newest last. Files that cannot be read are skipped."""
    jobs = []
    for file in sorted(_notes().glob("*.json"), key=lambda path: path.stat().st_mtime):
        # The kind is the first word of the name: `swarm-my-run-1f3a5c`.
        kind = file.stem.partition("-")[0]
        # Skip a file of another user, of another version or of a launch tool that is not installed.
        with suppress(OSError, ValueError, TypeError, KeyError, ModuleNotFoundError):
            job_class = JOB_CLASSES[kind]
            # Import the module of a kind only if there is a job of this kind.
            module = import_module(f"tunesmith.tools.launch.{kind}")
            jobs.append(vars(module)[job_class](**json.loads(file.read_bytes())))
    return jobs


def jobs_of(run_dir: str) -> list[Job]:
    """Return the saved jobs of a run directory, the newest last."""
    # Resolve symbolic links, because different paths can lead to the same directory.
    place = os.path.realpath(run_dir)
    return [job for job in all_jobs() if os.path.realpath(job.run_dir) == place]


def find_job(word: str) -> Job:
    """Return the job whose name is `word`, or the newest job of the run directory `word`.

    Raise UsageError if there is no such job and no such run.
    """
    jobs = all_jobs()
    named = [job for job in jobs if job.name == word] or jobs_of(word)
    if named:
        return named[-1]
    if is_run(Path(word)) or is_locked(Path(word)):
        return Job("", os.path.realpath(word))
    newest = ", ".join(job.name for job in jobs[-5:]) or "none"
    near = find_similar_path(Path(word))
    fix = (
        f"did you mean {near}?"
        if near and holds_run(near)
        else "list all jobs with `tunesmith status`"
    )
    raise UsageError(
        f"{word} is neither a job of {getpass.getuser()} nor a run directory",
        where="command line",
        why=f"known jobs: {newest}",
        fix=fix,
    )

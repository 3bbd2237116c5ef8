"""Launched runs, as `status`, `logs` and `stop` find them again: by name, or by run directory.

A launch leaves one small file in the user's state folder: which kind it is, where the run directory
and its log are, and what that kind needs to find it. It holds no token. A run that nobody launched
is recognized by its directory all the same.
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
from tunesmith.host.files import near_path, write_atomically
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
    how_far,
    open_regular,
    read_failure,
    read_manifest,
    read_part,
    read_recipe,
    read_stopped,
    share_done,
)
from tunesmith.units import format_seconds

# kind -> its class, in tools/launch/<kind>.py
JOB_CLASSES = {"local": "LocalJob", "docker": "DockerJob", "slurm": "SlurmJob", "swarm": "SwarmJob"}
# In the run directory: what launches write there; runs do not touch it.
FOLDER = LAUNCH
# Of these a run writes the first within seconds.
WRITTEN_BY_RUNS = (METRICS, RECIPE, IDENTITY, LOG)
LOG_BYTES = 1 << 20  # of a job's log, in which its first error is looked for
POLL = 0.5  # seconds between two looks at a log that is followed


class JobState(NamedTuple):
    """The state of a job, and more of it in words."""

    state: RunState
    text: str

    @property
    def at_work(self) -> bool:
        return self.state in (RunState.QUEUED, RunState.RUNNING)

    def after(self, ending: RunState, words: str) -> "JobState":
        """This state of a run directory, with what a queue says of how the job ended.

        The run directory knows better of a stop and a failure: a job that was stopped may be
        "completed" or "cancelled". It says nothing where this machine does not see its disk.
        """
        if self.state in (RunState.STOPPED, RunState.FAILED):
            ending = self.state
        return JobState(ending, f"{words}; {self.text}")


@dataclass(frozen=True)
class Job:
    """A run, identified by its directory alone; each kind of launch is a subclass with more.

    Attributes:
        name: `local-4711`, `slurm-123`; the first word is the kind. Empty: nobody launched it.
        run_dir: absolute.
        host: where it was launched.
        log: the file of its output.
        details: what this kind needs to find it.
    """

    name: str
    run_dir: str
    host: str = field(default_factory=socket.gethostname)
    log: str = ""
    details: dict[str, str] = field(default_factory=dict)

    def state(self) -> JobState:
        """Read what the run directory says; if another job was launched there since, that alone."""
        later = self.later_job()
        if later:
            text = f"{later.name} was later launched in the same run directory"
            return JobState(RunState.UNKNOWN, text)
        out = Path(self.run_dir)
        # The lock first: while a process trains here, files of earlier starts do not describe this
        # one.
        if is_locked(out):
            return JobState(RunState.RUNNING, step_and_time_left(out) or "before the first step")
        failure = read_failure(out).value if self.has_written(FAILURE) else None
        stopped = read_stopped(out).value if self.has_written(STOPPED) else None
        final = read_part(out / FINAL, read_manifest).value
        record = newest_record(out)
        state, step = how_far(record.get("step"), failure, stopped, final)
        # By the step and the epoch of one record; what is saved may be a step further.
        total = _total_steps(out, record)
        texts = [_describe_step({**record, "step": step}, total) or "before the first step"]
        if failure:
            texts.insert(0, failure.get("what") or "")
        elif stopped and stopped.get("step"):
            texts.insert(0, "saved")
        # A start that ended before it wrote anything left its error in its log alone.
        if self.log and not (failure or stopped or any(map(self.has_written, WRITTEN_BY_RUNS))):
            error = first_error(Path(self.log))
            if error:
                return JobState(RunState.FAILED, error)
        if state is RunState.KILLED:
            if not holds_run(out):
                return JobState(RunState.UNKNOWN, "its run directory contains no run yet")
            texts.append("no process is running here; the same command resumes")
        if state is RunState.FINISHED and final and final["step"] != step:
            texts.append(f"{FINAL}/ is of step {final['step']}")
        return JobState(state, ", ".join(filter(None, texts)))

    def is_alive(self) -> bool:
        """Tell whether a process of it is known to run on this machine."""
        return False

    def read_log(self, *, follow: bool) -> Iterator[str]:
        """The log's text, in pieces; `follow`: until the job has ended."""
        log = Path(self.log or Path(self.run_dir, LOG))
        while follow and not log.exists() and self.state().at_work:
            time.sleep(POLL)
        try:
            file = io.TextIOWrapper(open_regular(log), encoding="utf-8", errors="replace")
        except OSError as error:
            fix = f"tunesmith status {shell_path(self.name or self.run_dir)}"
            raise MachineError(
                "there is no log yet", where=str(log), why=error.strerror or "", fix=fix
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
                    # The end of the log is read once more after the job has ended.
                    is_over = not self.state().at_work

    def has_written(self, name: str) -> bool:
        """Tell whether the run directory has this file, and it is not from before the launch."""
        file = Path(self.run_dir, name)
        try:
            launched_at = (_notes() / f"{self.name}.json").stat().st_mtime
            return file.stat().st_mtime >= launched_at
        except OSError:
            # Nobody launched the job, or on another machine: there is no note of it here.
            return file.is_file()

    def later_job(self) -> "Job | None":
        """The newest job of this run directory, where this one is an earlier job of it."""
        jobs = jobs_of(self.run_dir)
        is_earlier = self.name in [job.name for job in jobs[:-1]]
        return jobs[-1] if is_earlier else None

    def stop(self) -> str:
        """Ask it to save and end, by the file `stop` in its directory.

        Returns:
            A line for the user about it.
        """
        if self.later_job() or not is_locked(Path(self.run_dir)):
            state = self.state()
            return f"nothing to stop: {state.state}, {state.text}"
        Path(self.run_dir, STOP_FILE).touch()
        return "stop requested by the file `stop` in its run directory: saves, then stops"

    def check_ended(self) -> None:
        """UsageError where the job waits or runs: no second one is launched beside it."""
        state = self.state()
        if state.at_work:
            raise UsageError(
                f"{self.name or 'a run'} is already running",
                where=self.run_dir,
                why=state.text,
                fix=f"tunesmith stop {shell_path(self.name or self.run_dir)}; "
                "or output_dir=runs/another-name",
            )


def holds_run(run_dir: Path) -> bool:
    """Tell whether there is a run to read: some file of it, or a process that has begun one."""
    return any((run_dir / name).is_file() for name in WRITTEN_BY_RUNS) or is_locked(run_dir)


def first_error(log: Path) -> str:
    """Find the first error in a job's log, ours or one of Slurm's; empty if there is none."""
    with suppress(OSError), open_regular(log) as file:
        text = file.read(LOG_BYTES).decode(errors="replace")
        # The rest of a long line is indented; the lines below it have a name in front.
        match = re.search(r"^(?:\w+: )?error: (.+(?:\n {3,}.+)*)", text, re.MULTILINE)
        return " ".join(match[1].split()) if match else ""
    return ""


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the run directories in a folder and in those of its folders that are not runs."""
    for path in sorted([*folder.glob("*/"), *folder.glob("*/*/")]):
        if holds_run(path) and (path.parent == folder or not holds_run(path.parent)):
            yield path


def with_runs_of_folders(words: Sequence[str]) -> list[str]:
    """Run directories, in place of a folder that holds runs these; each once, in their order."""
    named = []
    for word in words:
        folder = Path(word)
        # The folder of a sweep is no run, even while it trains.
        is_run_itself = holds_run(folder) and not (folder / SWEEP).is_file()
        runs = () if is_run_itself else run_folders(folder)
        named += [*map(str, runs)] or [word]
    return list(dict.fromkeys(named))


def is_locked(run_dir: Path) -> bool:
    """Tell whether a process of this machine has locked the run directory."""
    try:
        # To open a pipe of that name would wait for its other end.
        handle = os.open(run_dir / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # A shared lock is refused where a run has the exclusive one; two readers do not disturb
        # each other.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def is_at_work(run_dir: Path) -> bool:
    """Tell whether a process of this machine trains here, or was launched to and has not locked."""
    if is_locked(run_dir):
        return True
    if not (run_dir / FOLDER).is_dir():
        return False  # nothing was launched here
    return any(job.is_alive() for job in jobs_of(str(run_dir)))


def last_step(run_dir: str | Path) -> str:
    """`step 120 of 400, loss 1.234` of the newest record; empty before the first.

    It reads the end of the file alone.
    """
    record = newest_record(Path(run_dir))
    return _describe_step(record, _total_steps(Path(run_dir), record))


def step_and_time_left(run_dir: str | Path) -> str:
    """`last_step` of a run that is at work, with the time that is left by its newest steps."""
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
    """`step 120 of 400, loss 1.234`; empty without a loss."""
    if record.get("loss") is None:
        return ""
    of_total = f" of {total}" if total else ""
    return f"step {record['step']}{of_total}, loss {record['loss']:.4g}"


def _total_steps(run_dir: Path, record: Mapping[str, int | float | None]) -> int | None:
    """The steps of the whole run by its recipe; None where it ends by the clock."""
    step = record.get("step") or 0
    share = share_done(read_recipe(run_dir).value, step, record.get("epoch") or 0)
    return round(step / share) if share else None


def safe_value(value: str, where: str) -> str:
    """The value, if it may stand in a script or a stack file.

    UsageError where it holds a control character: a newline would end the line that quotes it; the
    others change what a terminal shows of the script.
    """
    if not value.isprintable():
        what = f"a line break or control character in {value!r}"
        raise UsageError(what, where=where, fix="write the value without it")
    return value


def name_of_run(kind: str, run_dir: str) -> str:
    """A job's name for a run directory, which no other directory has: `swarm-my-run-1f3a5c`."""
    # Docker takes few characters in a name: small letters, digits and - are always among them.
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(run_dir).lower())[:30].strip("-")
    digest = hashlib.sha256(os.fsencode(run_dir)).hexdigest()
    return "-".join(filter(None, (kind, slug, digest[:6])))


def agent_words(recipe: Path, *, debug: bool = False, **flags: object) -> list[str]:
    """The words after `python` that start the node agent on a recipe; `flags` are its own."""
    words = ["-m", "tunesmith.launch.node"]
    for flag, value in flags.items():
        words += [f"--{flag}", str(value)]
    if debug:
        words.append("--debug")
    return [*words, "--", "train", str(recipe)]


def recipe_file(run_dir: str) -> Path:
    """Return the path at which `write_recipe` puts the recipe of a run directory."""
    return Path(run_dir, FOLDER, "recipe.yaml")


def write_recipe(run: Run) -> Path:
    """Write the resolved recipe into the run directory, for the nodes.

    UsageError where a run is at work there, which may read its recipe again.
    """
    file = recipe_file(safe_value(run.output_dir, "output_dir"))
    check_free(run.output_dir)
    check_run_dir(Path(run.output_dir), inputs_of(run).values())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump(run))
    return file


def check_free(run_dir: str) -> None:
    """UsageError where a job of the run directory waits or runs, or a process holds its lock."""
    for job in (*jobs_of(run_dir), Job("", run_dir)):
        # A queue or daemon that does not answer says nothing of its job: the lock does.
        with suppress(MachineError):
            job.check_ended()


def _notes() -> Path:
    """The user's folder of jobs: below `$XDG_STATE_HOME`, else `~/.local/state`."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "tunesmith" / "jobs"


def state_folder() -> Path:
    """The user's folder of jobs, created for the user alone."""
    folder = _notes()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def save_job(job: Job) -> None:
    """Note a job, in place of an earlier one of its name."""
    write_atomically(state_folder() / f"{job.name}.json", json.dumps(asdict(job), indent=1))


def all_jobs() -> list[Job]:
    """The noted jobs, the newest last; a note that cannot be read is left out."""
    jobs = []
    for file in sorted(_notes().glob("*.json"), key=lambda path: path.stat().st_mtime):
        # The kind is the first word of the name: `swarm-my-run-1f3a5c`.
        kind = file.stem.partition("-")[0]
        # A file of somebody else's, of another version, or of a tool that is not here.
        with suppress(OSError, ValueError, TypeError, KeyError, ModuleNotFoundError):
            job_class = JOB_CLASSES[kind]
            # Each kind is imported only if there is a job of it.
            module = import_module(f"tunesmith.tools.launch.{kind}")
            jobs.append(vars(module)[job_class](**json.loads(file.read_bytes())))
    return jobs


def jobs_of(run_dir: str) -> list[Job]:
    """The noted jobs of a run directory, the newest last."""
    # It may be reached by a link: paths are compared without links.
    place = os.path.realpath(run_dir)
    return [job for job in all_jobs() if os.path.realpath(job.run_dir) == place]


def find_job(word: str) -> Job:
    """The job of that name, or the newest of that run directory; UsageError if there is neither."""
    jobs = all_jobs()
    named = [job for job in jobs if job.name == word] or jobs_of(word)
    if named:
        return named[-1]
    if is_run(Path(word)) or is_locked(Path(word)):
        return Job("", os.path.realpath(word))
    newest = ", ".join(job.name for job in jobs[-5:]) or "none"
    near = near_path(Path(word))
    fix = f"did you mean {near}?" if near and holds_run(near) else "tunesmith status lists all jobs"
    raise UsageError(
        f"{word} is neither a job of {getpass.getuser()} nor a run directory",
        where="command line",
        why=f"known jobs: {newest}",
        fix=fix,
    )

"""Launched runs, as `status`, `logs` and `stop` find them again: by name, or by run directory.

A launch leaves one small file in the user's state folder: which kind it is, where the run directory and its log are, and
what that kind needs to find it. It holds no token. A run that nobody launched is found by its directory all the same.
"""

import fcntl
import getpass
import hashlib
import io
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from tunesmith.checkpoint.claim import LAUNCH, check_run_dir, is_run
from tunesmith.config.dump import dump
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.files import write_atomically
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.metrics.record import newest_record
from tunesmith.run_dir import (
    FAILURE,
    FINAL,
    LOCK,
    LOG,
    MANIFEST,
    STOP_FILE,
    STOPPED,
    open_regular,
    read_failure,
    read_stopped,
)

# kind -> its class, in launch/<kind>.py
KINDS = {"local": "LocalJob", "docker": "DockerJob", "slurm": "SlurmJob", "swarm": "SwarmJob"}
FOLDER = LAUNCH  # in the run directory: what launches write there; runs do not touch it
POLL = 0.5  # seconds between two looks at a log that is followed


class State(NamedTuple):
    """Where a job stands, and that in words."""

    phase: Literal["waiting", "running", "ended", "gone"]
    text: str

    @property
    def at_work(self) -> bool:
        return self.phase in ("waiting", "running")


@dataclass(frozen=True)
class Job:
    """A run, known by its directory alone; each kind of launch is a subclass that knows more.

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

    def state(self) -> State:
        """What the run directory says; of a job after which another one was launched there, that alone."""
        if later := self.later_job():
            return State("ended", f"{later.name} was launched in its run directory since")
        out, step = Path(self.run_dir), last_step(self.run_dir)
        if is_locked(out):
            return State("running", step or "before the first step")
        if (out / FINAL / MANIFEST).is_file():
            return State("ended", f"done, {step}")
        endings = ((FAILURE, "failed", read_failure), (STOPPED, "stopped, saved", read_stopped))
        for name, word, read in endings:
            if self.has_written(name):
                what = (read(out).value or {}).get("what") or ""
                return State("ended", ", ".join(filter(None, (word, what, step))))
        again = "the same command goes on" if step else "nothing was begun"
        return State("gone", f"{step or 'no step'}: no process is at work here; {again}")

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
            over = not follow
            while True:
                if text := file.read():
                    yield text
                elif over:
                    return
                else:
                    time.sleep(POLL)
                    over = not self.state().at_work  # what came since is read once more

    def has_written(self, name: str) -> bool:
        """Whether the run directory has this file, and not from before this job was launched."""
        try:
            written_at = Path(self.run_dir, name).stat().st_mtime
            return written_at >= (state_folder() / f"{self.name}.json").stat().st_mtime
        except OSError:  # of the job's note: nobody launched it, or it is not of this machine
            return Path(self.run_dir, name).is_file()

    def later_job(self) -> "Job | None":
        """The newest job of this run directory, where this one is an earlier job of it."""
        jobs = [
            job
            for job in all_jobs()
            if os.path.realpath(job.run_dir) == os.path.realpath(self.run_dir)
        ]
        is_earlier = self.name in [job.name for job in jobs[:-1]]
        return jobs[-1] if is_earlier else None

    def stop(self, say: Callable[[str], None] = lambda text: None) -> str:
        """Ask it to save and end, by the file `stop` in its directory; what was done, in a line. `say` takes lines while that
        takes its time."""
        if self.later_job() or not is_locked(Path(self.run_dir)):
            return f"nothing to stop: {self.state().text}"
        Path(self.run_dir, STOP_FILE).touch()
        return "asked to save and end, by the file stop in its run directory"

    def refuse_another(self) -> None:
        """UsageError where the job waits or runs, so that no second one is launched beside it."""
        if (state := self.state()).at_work:
            fix = f"tunesmith stop {shell_word(self.name)}; or output_dir=runs/another-name"
            raise UsageError(
                f"{self.name} is at work already", where=self.run_dir, why=state.text, fix=fix
            )


def is_locked(run_dir: Path) -> bool:
    """Whether a process of this machine holds the run directory."""
    try:
        # A pipe of that name would be waited for
        handle = os.open(run_dir / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def last_step(run_dir: str | Path) -> str:
    """`step 120, loss 1.234` of the newest record; empty before the first. Reads the end of the file alone."""
    record = newest_record(Path(run_dir))
    loss = record.get("loss")
    return f"step {record['step']}, loss {loss:.4g}" if loss is not None else ""


def safe_value(value: str, where: str) -> str:
    """The value, if it may stand in a script or a stack file: UsageError where it holds a control character.

    A newline would end the line that quotes it; the others change what a terminal shows of the script.
    """
    if not value.isprintable():
        what = f"a line break or control character in {value!r}"
        raise UsageError(what, where=where, fix="write the value without it")
    return value


def name_of_run(kind: str, run_dir: str) -> str:
    """A job's name for a run directory, which others of that name do not share: `swarm-my-run-1f3a5c`."""
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(run_dir).lower())[:30].strip("-")
    return "-".join(
        filter(None, (kind, slug, hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:6]))
    )


def agent_words(recipe: Path, *, debug: bool = False, **flags: object) -> list[str]:
    """The words after `python` that start the node agent on a recipe; `flags` are those of `launch/node.py`."""
    given = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return ["-m", "tunesmith.launch.node", *given, *["--debug"] * debug, "--", "train", str(recipe)]


def recipe_file(run_dir: str) -> Path:
    """Where `write_recipe` puts the recipe of a run directory."""
    return Path(run_dir, FOLDER, "recipe.yaml")


def write_recipe(run: Run) -> Path:
    """Write the resolved recipe into the run directory, for the nodes; MachineError if that is not possible."""
    file = recipe_file(safe_value(run.output_dir, "output_dir"))
    check_run_dir(Path(run.output_dir))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, dump(run))
    except OSError as error:
        fix = "choose another one: output_dir=runs/my-run"
        what = f"the run directory cannot be written: {error.strerror}"
        raise MachineError(what, where=str(file.parent), fix=fix) from error
    return file


def state_folder() -> Path:
    """The user's folder of jobs: below `$XDG_STATE_HOME`, else `~/.local/state`; created for the user alone."""
    folder = (
        Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        / "tunesmith"
        / "jobs"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        fix = "export XDG_STATE_HOME=/a/folder/of/yours"
        raise MachineError(
            "jobs cannot be noted", where=str(folder), why=error.strerror or "", fix=fix
        ) from error
    return folder


def save_job(job: Job) -> None:
    """Note a job, in place of an earlier one of its name."""
    write_atomically(state_folder() / f"{job.name}.json", json.dumps(asdict(job), indent=1))


def all_jobs() -> list[Job]:
    """The noted jobs, the newest last; a note that cannot be read is left out."""
    found = []
    for file in sorted(state_folder().glob("*.json"), key=lambda path: path.stat().st_mtime):
        with suppress(OSError, ValueError, TypeError, KeyError):
            kind = file.stem.partition("-")[0]
            found.append(
                vars(import_module(f"tunesmith.launch.{kind}"))[KINDS[kind]](
                    **json.loads(file.read_bytes())
                )
            )
    return found


def find_job(word: str) -> Job:
    """The job of that name, or the newest of that run directory; UsageError if there is neither."""
    jobs = all_jobs()
    place = os.path.realpath(word)
    for job in reversed(jobs):
        if job.name == word or os.path.realpath(job.run_dir) == place:
            return job
    if is_run(Path(word)) or is_locked(Path(word)):
        return Job("", place)
    known = ", ".join(job.name for job in jobs[-5:]) or "none"
    what = f"{word} is neither a job of {getpass.getuser()} nor a run directory"
    raise UsageError(
        what,
        where="command line",
        why=f"known jobs: {known}",
        fix="tunesmith status lists all jobs",
    )

"""The run directory as a place: whose files lie in it, and which run holds it.

A directory is a run's where it holds the env.json of a run. Before that is written, `.lock` says
that a run began to write. In other directories the start is refused and nothing is touched if there
is a file with a name that a run writes, or if it is the working or the home directory. Files of
other names are never touched. An earlier run is moved aside, never deleted.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import get_args

from tunesmith.checkpoint.manifest import find_damage, free_name, remove
from tunesmith.config.schema import TrackerName
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.files import check_regular_files
from tunesmith.run_dir import (
    BEST,
    EVALS,
    FAILURE,
    HELD_OUT,
    IDENTITY,
    LOCK,
    LOG,
    METRICS,
    RECIPE,
    RUNNING,
    SAMPLES,
    STOP_FILE,
    STOPPED,
    Fields,
    read_object,
)

LAUNCH = "launch"  # a folder of what a launcher writes
NAMED_FILES = 5  # in an error
LOCK_CONTENT = b"a run of tunesmith\n"  # the content of LOCK once a run has begun to write
TRACKER_IDS = tuple(f"{name}-id.txt" for name in get_args(TrackerName))
RUN_FILES = (
    RECIPE,
    IDENTITY,
    METRICS,
    SAMPLES,
    HELD_OUT,
    LOG,
    FAILURE,
    STOPPED,
    RUNNING,
    BEST,
    *TRACKER_IDS,
)
BEFORE_IDENTITY = (RUNNING, STOPPED, FAILURE, METRICS, LOG, "tensorboard", *TRACKER_IDS)
_RANK_METRICS = r"metrics-rank\d+\.jsonl"


def _any_of(names: Iterable[str]) -> str:
    """A pattern that matches each of the names."""
    return "|".join(re.escape(name) for name in names)


_LEFTOVER = re.compile(
    rf"\.(?:{_any_of(RUN_FILES)})(?:\.\d+)?\.partial"
    r"|\.(?:checkpoint-\d+|final)\.(?:partial|old)"
)
_WRITTEN = re.compile(
    rf"{_any_of(RUN_FILES)}|final|tensorboard|profile|{EVALS}|checkpoint-\d+|{_RANK_METRICS}"
    rf"|{_LEFTOVER.pattern}"
)
_EARLY = re.compile(rf"{_any_of(BEFORE_IDENTITY)}|{_RANK_METRICS}|{_LEFTOVER.pattern}")


def run_files(output_dir: Path) -> list[Path]:
    """List what lies in a directory under a name that a run writes.

    Links and leftovers of a kill are included.
    """
    if not output_dir.is_dir():
        return []
    return sorted(path for path in output_dir.iterdir() if _WRITTEN.fullmatch(path.name))


def is_run(output_dir: Path) -> bool:
    """Tell whether a run wrote into this directory."""
    lock = output_dir / LOCK
    identity = output_dir / IDENTITY
    metrics = output_dir / METRICS
    try:
        if identity.is_file():
            return "recipe_hash" in read_object(identity, Fields)
        if not lock.is_file() or lock.read_bytes() != LOCK_CONTENT:
            return False
        # The first step is recorded after the identity is written.
        if metrics.exists() and metrics.stat().st_size:
            return False
    except (OSError, ValueError, TypeError):
        return False
    return all(_EARLY.fullmatch(path.name) for path in run_files(output_dir))


def _stop_requested_at(output_dir: Path) -> int:
    """When the file that asks a run to stop was last touched, by its disk's clock.

    In nanoseconds; 0: it is not there.
    """
    try:
        return (output_dir / STOP_FILE).stat().st_mtime_ns
    except OSError:
        return 0


def check_run_dir(output_dir: Path, inputs: Iterable[str] = ()) -> None:
    """UsageError where a run would mix its files with somebody else's.

    inputs: what the run reads: paths, and Hub ids, which are ignored.
    """
    folder = output_dir.resolve()
    is_of_run = is_run(output_dir)
    names = [path.name for path in run_files(output_dir)]
    why = "the run's files would be mixed with other files"
    if not is_of_run and any(
        place.resolve().is_relative_to(folder) for place in (Path.cwd(), Path.home())
    ):
        what = "output_dir is the working or the home directory, or a folder that contains one"
    elif any(path.is_dir() and path.resolve() == folder for path in map(Path, inputs)):
        what = "output_dir is a folder that the run reads"
    elif names and not is_of_run:
        more = ", ..." if len(names) > NAMED_FILES else ""
        files = ", ".join(names[:NAMED_FILES]) + more
        what = f"output_dir contains files that are not from a tunesmith run: {files}"
        why = f"a run writes files with these names, and the folder has no {IDENTITY} of a run"
    else:
        return
    fix = "use a new folder: output_dir=runs/my-run"
    raise UsageError(what, where=str(output_dir), why=why, fix=fix)


@contextlib.contextmanager
def claim_run_dir(output_dir: Path, inputs: Iterable[str] = ()) -> Iterator[Callable[[], None]]:
    """Create the run directory and lock it; remove what was created if no run wrote into it.

    Yields a function to be called before anything is written into it: it marks the directory as a
    run's, and removes a request to stop that was there before.

    inputs: as of `check_run_dir`.

    Raises:
        ModelError: a pipe, a socket or a device lies in it.
        UsageError: it holds files that no run wrote.
        MachineError: it cannot be written, or another run holds it.
    """
    fix = "delete it, or use a new folder: output_dir=runs/my-run"
    check_regular_files(output_dir, fix=fix)
    check_run_dir(output_dir, inputs)
    # The innermost first.
    created = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    lock = output_dir / LOCK
    # Looked at before `_lock` creates it.
    is_new = not lock.exists()
    handle = _lock(output_dir)
    earlier_request = _stop_requested_at(output_dir)

    def begin() -> None:
        if os.fstat(handle).st_size == 0:
            os.pwrite(handle, LOCK_CONTENT, 0)
            os.fsync(handle)
        # One that came since is for this start.
        if _stop_requested_at(output_dir) == earlier_request:
            (output_dir / STOP_FILE).unlink(missing_ok=True)

    try:
        yield begin
    finally:
        with contextlib.suppress(OSError):
            if not run_files(output_dir) and (is_new or lock.read_bytes() == LOCK_CONTENT):
                lock.unlink()
        # A refused start leaves no trace. A folder may have files by now, or another start creates
        # the same folders at this moment.
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()
        os.close(handle)


def _lock(output_dir: Path) -> int:
    """An open handle on the lock file, locked for this process."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Not through a link, which may lead to somebody else's file.
        handle = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise MachineError(
            f"the run directory cannot be written: {error.strerror}",
            where=str(output_dir),
            why="output_dir must be a writable folder",
            fix="choose another one: output_dir=runs/my-run",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise MachineError(
            "another run is writing to this run directory",
            where=str(output_dir),
            why="two runs would overwrite each other's checkpoints",
            fix="wait for it, stop it, or choose another folder: output_dir=runs/my-run",
        ) from error
    # The run that had the lock has just removed the empty folder.
    if os.fstat(handle).st_nlink == 0:
        os.close(handle)
        return _lock(output_dir)
    return handle


def move_aside(output_dir: Path, inputs: Iterable[str] = ()) -> Path | None:
    """Move an earlier run to `<output_dir>.previous-<n>`, and return that.

    None if there was nothing to move. What a run does not write stays where it is. A link is
    followed: the run stays on its disk.

    inputs: what the new run reads: paths, and Hub ids, which are ignored.

    UsageError if one of them, or the working directory, would be moved; MachineError if the folder
    cannot be, such as a mounted one.
    """
    files = run_files(output_dir)
    if not files:
        return None
    for path in (Path.cwd(), *map(Path, inputs)):
        if path.exists() and any(
            path.resolve().is_relative_to(os.path.realpath(file)) for file in files
        ):
            raise UsageError(
                "--fresh would move files that the new run reads",
                where=str(output_dir),
                why=f"{path} is in the existing run's folder",
                fix="use another folder: output_dir=runs/my-run",
            )
    place = free_name(output_dir.resolve())
    # The identity last: what a kill leaves here is still a run's.
    files.sort(key=lambda path: path.name == IDENTITY)
    try:
        place.mkdir()
        for path in files:
            path.rename(place / path.name)
    except OSError as error:
        with contextlib.suppress(OSError):
            place.rmdir()
        raise MachineError(
            f"the existing run cannot be moved to {place}",
            where=str(output_dir),
            why=error.strerror or str(error),
            fix="use another output_dir: output_dir=runs/my-run",
        ) from error
    return place


def restore(run_dir: Path) -> None:
    """Give a whole folder its name back that a kill caught while it was replaced or deleted."""
    for path in run_files(run_dir):
        # `.checkpoint-40.old` was `checkpoint-40`.
        place = run_dir / path.stem.removeprefix(".")
        if path.suffix == ".old" and not place.exists() and find_damage(path) is None:
            path.rename(place)


def remove_leftovers(run_dir: Path) -> None:
    """Remove from a run's directory what a killed write left behind, after `restore`."""
    restore(run_dir)
    for path in run_files(run_dir):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)

"""Checks that decide whether a directory belongs to a run, and the lock that a run holds on its
directory.

A directory belongs to a run if its env.json was written by a run. Until env.json exists, the
content of `.lock` shows that a run has begun to write. A new run refuses to start in a directory
that does not belong to a run but contains a file with a name that the run would write. A run also
refuses to start in the working directory or the home directory. Files with other names are never
changed. An earlier run is moved to another folder, never deleted.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from tunesmith.checkpoint.manifest import find_damage, free_name, remove
from tunesmith.config.schema import TrackerName
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.files import check_regular_files
from tunesmith.run_dir import (
    BEST,
    EVALS,
    FAILURE,
    FINAL,
    HELD_OUT,
    IDENTITY,
    LOCK,
    LOG,
    METRICS,
    PROFILE,
    RECIPE,
    ROLLOUTS,
    RUNNING,
    SAMPLES,
    STOP_FILE,
    STOPPED,
    TENSORBOARD,
    Fields,
    read_object,
)

LAUNCH = "launch"  # folder for the files of `tunesmith launch`
NAMED_FILES = 5  # maximum number of file names in an error message
LOCK_CONTENT = b"a run of tunesmith\n"  # content of .lock after a run has begun to write
TRACKER_IDS = tuple(f"{name}-id.txt" for name in get_args(TrackerName))
# Files and folders that a run can write before env.json.
WRITTEN_BEFORE_IDENTITY = (
    RUNNING,
    STOPPED,
    FAILURE,
    METRICS,
    LOG,
    TENSORBOARD,
    "wandb",
    *TRACKER_IDS,
)
# All files and folders that a run or `eval` writes into a run directory, except checkpoints and the
# metrics of other ranks. Every start, --fresh and resume looks only at these names.
WRITTEN = (
    *WRITTEN_BEFORE_IDENTITY,
    BEST,
    EVALS,
    FINAL,
    HELD_OUT,
    IDENTITY,
    PROFILE,
    RECIPE,
    ROLLOUTS,
    SAMPLES,
)
_RANK_METRICS = r"metrics-rank\d+\.jsonl"


def _any_of(names: Iterable[str]) -> str:
    """Return a regular expression that matches any of the names."""
    return "|".join(map(re.escape, names))


_LEFTOVER = re.compile(
    rf"\.(?:{_any_of(WRITTEN)})(?:\.\d+)?\.partial|\.(?:checkpoint-\d+|{FINAL})\.(?:partial|old)"
)
_RUN_NAME = re.compile(rf"{_any_of(WRITTEN)}|checkpoint-\d+|{_RANK_METRICS}|{_LEFTOVER.pattern}")
_EARLY = re.compile(rf"{_any_of(WRITTEN_BEFORE_IDENTITY)}|{_RANK_METRICS}|{_LEFTOVER.pattern}")


def run_files(output_dir: Path) -> list[Path]:
    """Return all paths in a directory with names that a run uses for its files.

    Links and the leftovers of a killed run are included.
    """
    if not output_dir.is_dir():
        return []
    files = {path for path in output_dir.iterdir() if _RUN_NAME.fullmatch(path.name)}
    # Other programs also write a folder wandb/. It belongs to a run only if the run's file with
    # the W&B id is next to it.
    if output_dir / "wandb-id.txt" not in files:
        files.discard(output_dir / "wandb")
    return sorted(files)


def is_run(output_dir: Path) -> bool:
    """Return whether a run has written into this directory."""
    lock = output_dir / LOCK
    identity = output_dir / IDENTITY
    metrics = output_dir / METRICS
    files = run_files(output_dir)
    try:
        if identity.is_file():
            return "recipe_hash" in read_object(identity, Fields)
        # A rank can report the end of a start after the lock was removed with the other files.
        if files and all(map(_is_report, files)):
            return True
        if not lock.is_file() or lock.read_bytes() != LOCK_CONTENT:
            return False
        # A run writes env.json before its first step. If there are recorded steps but no env.json,
        # the directory is not from a run.
        if metrics.exists() and metrics.stat().st_size:
            return False
    except (OSError, ValueError, TypeError):
        return False
    return all(_EARLY.fullmatch(path.name) for path in files)


def _is_report(path: Path) -> bool:
    """Return whether a file is a report that a run has written about its end.

    Raise OSError or ValueError if it cannot be read.
    """
    return path.name in (FAILURE, STOPPED) and {"next", "cause"} <= read_object(path, Fields).keys()


def _stop_requested_at(output_dir: Path) -> int:
    """Return the modification time in nanoseconds of the file that requests a stop.

    The file system sets this time, so it may differ from the clock of this machine. Return 0 if the
    file does not exist.
    """
    try:
        return (output_dir / STOP_FILE).stat().st_mtime_ns
    except OSError:
        return 0


def check_run_dir(output_dir: Path, inputs: Iterable[str] = ()) -> None:
    """Raise UsageError if a run in this directory would mix its files with other files.

    Args:
        inputs: paths that the run reads. Hub ids can be included: they are ignored.
    """
    folder = output_dir.resolve()
    is_of_run = is_run(output_dir)
    names = [path.name for path in run_files(output_dir)]

    why = "the run's files would be mixed with other files"
    if not is_of_run and any(
        # expanduser keeps "~" if the user has no home directory; Path.home() raises RuntimeError.
        place.resolve().is_relative_to(folder)
        for place in (Path.cwd(), Path(os.path.expanduser("~")))
    ):
        what = "output_dir is the working or the home directory, or a folder that contains one"
    elif any(path.is_dir() and path.resolve() == folder for path in map(Path, inputs)):
        what = "output_dir is a folder that the run reads"
    elif names and not is_of_run:
        files = ", ".join(names[:NAMED_FILES])
        if len(names) > NAMED_FILES:
            files += ", ..."
        what = f"output_dir contains files that are not from a tunesmith run: {files}"
        why = f"a run writes files with these names, and the folder has no {IDENTITY} of a run"
    else:
        return

    raise UsageError(
        what, where=output_dir, why=why, fix="use a new folder: output_dir=runs/my-run"
    )


class Claim(NamedTuple):
    """A run directory that this process has locked.

    Attributes:
        begin: function that must be called before any file is written. It marks the directory as a
            run's directory and removes an old stop request.
        remove_unused: function that removes the directory if no run wrote into it.
    """

    begin: Callable[[], None]
    remove_unused: Callable[[], None]


@contextlib.contextmanager
def claim_run_dir(output_dir: Path, inputs: Iterable[str] = ()) -> Iterator[Claim]:
    """Create the run directory and lock it.

    At the end, remove the directory if no run wrote into it.

    Args:
        inputs: see `check_run_dir`.

    Raises:
        ModelError: the directory contains a pipe, a socket or a device.
        UsageError: the directory contains files that are not from a run.
        MachineError: the directory is not writable, or another run holds its lock.
    """
    check_regular_files(
        output_dir, fix="delete this file, or use a new folder: output_dir=runs/my-run"
    )
    check_run_dir(output_dir, inputs)

    # Folders that this call creates, innermost first.
    created = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    lock = output_dir / LOCK
    # Check whether the lock file is new before `_lock` creates the file.
    is_new = not lock.exists()
    handle = _lock(output_dir)
    earlier_request = _stop_requested_at(output_dir)

    def begin() -> None:
        if os.fstat(handle).st_size == 0:
            os.pwrite(handle, LOCK_CONTENT, 0)
            os.fsync(handle)
        # Remove only an old stop request. A request that came after the lock was taken is for this
        # run.
        if _stop_requested_at(output_dir) == earlier_request:
            (output_dir / STOP_FILE).unlink(missing_ok=True)

    def remove_unused() -> None:
        with contextlib.suppress(OSError):
            if not run_files(output_dir) and (is_new or lock.read_bytes() == LOCK_CONTENT):
                lock.unlink()
        # Remove the created folders if they are empty, so that a failed start of a run leaves no
        # folders behind. rmdir fails if a folder is not empty, for example because another start
        # uses the same parent folders.
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()

    try:
        yield Claim(begin, remove_unused)
    finally:
        remove_unused()
        os.close(handle)


def _lock(output_dir: Path) -> int:
    """Open the lock file, lock it for this process and return its file descriptor."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Use O_NOFOLLOW, because a link could lead to a file that does not belong to the run.
        handle = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise MachineError(
            f"the run directory cannot be written: {error.strerror}",
            where=output_dir,
            why="output_dir must be a writable folder",
            fix="choose another folder: output_dir=runs/my-run",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise MachineError(
            "another run is writing to this run directory",
            where=output_dir,
            why="two runs would overwrite each other's checkpoints",
            fix="wait for the other run, stop it, or choose another folder: output_dir=runs/my-run",
        ) from error
    # If the lock file was deleted after it was opened, open it again. This happens if the run that
    # held the lock has removed its empty folder.
    if os.fstat(handle).st_nlink == 0:
        os.close(handle)
        return _lock(output_dir)
    return handle


def move_aside(output_dir: Path, inputs: Iterable[str] = ()) -> Path | None:
    """Move an earlier run to `<output_dir>.previous-<n>`, and return the new path.

    Return None if there is no earlier run. Only files of the run are moved. If output_dir is a
    link, the new folder is created next to the link's target, so that the run stays on its disk.

    Args:
        inputs: paths that the new run reads. Hub ids can be included: they are ignored.

    Raises:
        UsageError: an input or the working directory would be moved.
        MachineError: the files cannot be moved, for example because the folder is a mount point.
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
                where=output_dir,
                why=f"{path} is in the existing run's folder",
                fix="use another folder: output_dir=runs/my-run",
            )
    place = free_name(output_dir.resolve())
    # Move env.json last. If the process is killed during the move, env.json still marks the
    # remaining files in the old directory as files of a run.
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
            where=output_dir,
            why=error.strerror or str(error),
            fix="use another output_dir: output_dir=runs/my-run",
        ) from error
    return place


def restore(run_dir: Path) -> None:
    """Rename complete `.old` folders to their original names.

    A run that was killed while it replaced or deleted a folder leaves its old contents in an `.old`
    folder.
    """
    for path in run_files(run_dir):
        # Remove "." and ".old" from the name: `.checkpoint-40.old` becomes `checkpoint-40`.
        place = run_dir / path.stem.removeprefix(".")
        if path.suffix == ".old" and not place.exists() and find_damage(path) is None:
            path.rename(place)


def remove_leftovers(run_dir: Path) -> None:
    """Remove the partial files and folders of a killed run from its directory.

    Complete folders are restored first, see `restore`.
    """
    restore(run_dir)
    for path in run_files(run_dir):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)

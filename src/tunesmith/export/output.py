"""Where an export is written: in a hidden folder beside its place, until it is complete.

    output_place -> part_folder: `.NAME.PID.part` -> checks of what was written -> move_into_place

A killed export leaves such a folder, and nothing under the final name; the next one to that place
removes it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tunesmith.errors import CheckpointError, MachineError, UsageError, disk_fault
from tunesmith.host.files import existing_folder
from tunesmith.inference.load_run import RunLocation

OTHER_DISK = "free disk space (df -h), or use another disk with --output"


def output_place(output: str | Path, location: RunLocation) -> Path:
    """The absolute path of an output; its folder need not exist yet.

    UsageError where the path names nothing, or where the run, its base or the user is in it;
    MachineError where its folder cannot be written.
    """
    if not str(output):
        raise UsageError("--output is empty", where="--output", fix="use a new file or folder")
    goal = Path(os.path.abspath(output))
    # A kill came between the two renames of `move_into_place`.
    if not goal.exists() and _old(goal).exists():
        _old(goal).rename(goal)
    for source in (location.folder, Path(location.base.name)):
        if source is None or not source.exists():
            continue
        source_path = Path(os.path.realpath(source))
        place = Path(os.path.realpath(goal))
        if place == source_path or place in source_path.parents:
            raise UsageError(
                f"{goal} contains the adapter or its base",
                where="--output",
                fix="use another folder",
            )
    if goal == Path.cwd() or goal in Path.cwd().parents:
        raise UsageError(
            f"{goal} is the current folder", where="--output", fix="name a folder in it"
        )
    for parent in goal.parents:
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"{parent} is a file", where="--output", fix="name another folder")
    parent = existing_folder(goal.parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(
            f"{parent} cannot be written", where="--output", fix="use a writable folder"
        )
    return goal


def require_new_folder(goal: Path) -> None:
    """UsageError unless nothing is there, or an empty folder."""
    if goal.is_symlink() or (goal.exists() and (not goal.is_dir() or any(goal.iterdir()))):
        raise UsageError("--output is not an empty folder", where=str(goal), fix="name a new one")


@contextmanager
def part_folder(goal: Path) -> Iterator[Path]:
    """A new folder beside `goal` to write in. At the end it is removed, unless it got a name.

    CheckpointError where the disk is full.
    """
    _remove_killed(goal)
    new_parents = [folder for folder in goal.parents if not folder.exists()]
    part = goal.with_name(f".{goal.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
    except Exception as error:
        # safetensors has errors of its own for a full disk.
        fault = disk_fault(error)
        if not fault:
            raise
        raise CheckpointError(
            fault,
            where=f"--output {goal}",
            why="nothing was written in place",
            fix=OTHER_DISK,
            cause="disk",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in new_parents:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def move_into_place(written: Path, goal: Path) -> None:
    """Give what is complete its name; what stands there is deleted once it has it."""
    old = _old(goal)
    if goal.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        goal.rename(old)
    os.replace(written, goal)
    shutil.rmtree(old, ignore_errors=True)


def _old(goal: Path) -> Path:
    """Where an earlier folder stands while the new one takes its name."""
    return goal.with_name(f".{goal.name}.old")


def _remove_killed(goal: Path) -> None:
    """Delete what exports to this place have left that were killed: as much as a model each."""
    prefix = f".{goal.name}."
    for folder in goal.parent.glob(".*.part"):
        number = folder.name.removeprefix(prefix).removesuffix(".part")
        is_part = folder.name == f"{prefix}{number}.part" and number.isdigit()
        # In a container numbers come again: this process has written nothing yet.
        if is_part and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            shutil.rmtree(folder, ignore_errors=True)

"""Output paths of exports. An export is written to a hidden folder and renamed when it is complete.

    check_gguf_output, check_merge_output or check_new_folder: check the output path
    -> part_folder: write to `.NAME.PID.part`, next to the output path
    -> check the written files -> move_into_place: rename

A killed export leaves only the hidden folder. The next export to the same path deletes the folder.
Commands check the output path before they import torch.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tunesmith.answers.load_run import RunLocation
from tunesmith.errors import CheckpointError, MachineError, UsageError, disk_fault
from tunesmith.host.files import existing_folder
from tunesmith.host.shell import shell_path
from tunesmith.tools.export.gguf.ollama import MODELFILE

# File with the result of the check and the size of each written file. Only `merge` writes this
# file, so it identifies a merged model.
MERGE_FILE = "merge.json"
# Prefixes that identify files with license terms. File names are converted to upper case first.
NOTICES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
OTHER_DISK = "free disk space (df -h), or use another disk with --output"


def record_path(file: Path) -> Path:
    """Return the path of the export record of a GGUF file: `FILE.gguf.json`."""
    return file.with_name(file.name + ".json")


def check_output_path(output: str | Path, location: RunLocation) -> Path:
    """Return the absolute path of --output. Its parent folder need not exist yet.

    Raises:
        UsageError: the path is empty, or it contains the run, its base model or the current folder.
        MachineError: the parent folder is not writable.
    """
    if not str(output):
        raise UsageError(
            "--output is empty", where="--output", fix="give the path of a new file or folder"
        )
    goal = Path(os.path.abspath(output))
    # If an export was killed between the two renames of `move_into_place`, restore the old folder.
    if not goal.exists() and _old(goal).exists():
        _old(goal).rename(goal)
    real_goal = os.path.realpath(goal)
    for source in (location.folder, Path(location.base.name)):
        if source and source.exists() and Path(os.path.realpath(source)).is_relative_to(real_goal):
            raise UsageError(
                f"{goal} contains the adapter or its base model",
                where="--output",
                fix="use another folder",
            )
    if Path.cwd().is_relative_to(goal):
        raise UsageError(
            f"{goal} is or contains the current folder",
            where="--output",
            fix="use another path, for example inside the current folder",
        )
    for parent in goal.parents:
        if parent.exists() and not parent.is_dir():
            raise UsageError(
                f"{parent} is a file, not a folder", where="--output", fix="use another path"
            )
    parent = existing_folder(goal.parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(parent)
    return goal


def _unwritable(folder: Path, why: str = "") -> MachineError:
    return MachineError(
        f"the folder {folder} is not writable",
        where="--output",
        why=why,
        fix="use a writable folder",
    )


def check_new_folder(output: str | Path, location: RunLocation) -> Path:
    """Return the absolute path of a folder to write.

    Raise UsageError if the path exists and is not an empty folder.
    """
    goal = check_output_path(output, location)
    if goal.is_symlink() or (goal.exists() and (not goal.is_dir() or any(goal.iterdir()))):
        raise UsageError("--output is not an empty folder", where=goal, fix="use a new folder")
    return goal


def check_merge_output(
    path: str | Path, output: str | Path, location: RunLocation, *, force: bool
) -> Path:
    """Return the absolute path of the folder for the merge of the run at `path`.

    Raise UsageError if the run has no adapter, or if the folder exists and must not be replaced.
    """
    if location.holds != "adapter":
        where = str(location.folder or path)
        why = location.note or f"{path} is a base model"
        if location.holds == "full":
            why = "the run is a full fine-tune, which is already a complete model"
        raise UsageError(
            f"{path} has no adapter to merge",
            where=where,
            why=why,
            fix=f"use {where} directly, without a merge",
        )
    # Follow a symbolic link to its folder. Path.resolve is not used: it raises if links form a
    # loop.
    goal = check_output_path(os.path.realpath(output) if str(output) else output, location)

    for folder in (goal, Path(f"{goal}.rejected")):
        # A rejected merge is replaced even without --force.
        fault = _fault_of_merge(folder)
        needs_force = folder == goal and (folder / MERGE_FILE).exists()
        _check_replaced(folder, fault, may_replace=force or not needs_force)
    return goal


def _check_replaced(path: Path, fault: str | None, *, may_replace: bool) -> None:
    """Raise UsageError if an existing output must not be replaced.

    Args:
        fault: the reason why an export cannot have written the existing output, such as "is a
            file"; None if an export has written all its files.
        may_replace: whether the output may be replaced, which the user allows with --force.
    """
    if fault:
        raise UsageError(
            f"{path} {fault}",
            where="--output",
            why="--force replaces an output only if an export wrote it and no file has changed",
            fix="use another path with --output",
        )
    if not may_replace:
        raise UsageError(
            f"{path} already exists",
            where="--output",
            fix="use another path, or add --force to replace the existing output",
        )


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file in a folder, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {str(file.relative_to(folder)): file.lstat().st_size for file in files}


def _fault_of_merge(folder: Path) -> str | None:
    """Return why a path is not an unchanged merged model: "is a file" or "contains NAME".

    NAME is a file that `merge` did not write, or whose size has changed. Return None if the path
    does not exist, is empty, or is an unchanged merged model.
    """
    if folder.exists() and not folder.is_dir():
        return "is a file"
    try:
        sizes = dict(json.loads((folder / MERGE_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        names = sorted(path.name for path in folder.glob("*"))
        return f"contains {names[0]}" if names else None
    for name, size in file_sizes(folder).items():
        if name != MERGE_FILE and sizes.get(name) != size:
            return f"contains {name}"
    return None


def check_gguf_output(
    output: str | Path, location: RunLocation, *, is_folder: bool, force: bool
) -> Path:
    """Return the absolute path of a GGUF file, or of a folder for Ollama if `is_folder` is true.

    Raise UsageError if the path exists and must not be replaced, or is no valid name.
    """
    goal = check_output_path(output, location)
    if not is_folder and goal.suffix != ".gguf":
        raise UsageError(
            f"the name {goal} does not end with .gguf",
            where="--output",
            fix=f"use --output {shell_path(f'{goal}.gguf')}",
        )
    if goal.is_symlink() or (goal.is_dir() != is_folder and goal.exists()):
        # Refuse a symbolic link, because the final rename would replace the link instead of its
        # target.
        kind = "a folder" if goal.is_dir() else "a file or symbolic link"
        raise UsageError(
            f"{goal} is {kind}",
            where="--output",
            fix=f"use the name of a new {'folder' if is_folder else 'file'}",
        )
    if not goal.exists() or (is_folder and not any(goal.iterdir())):
        return goal
    if is_folder:
        name = _unexported_file(goal)
        fault = name and f"contains {name}"
    else:
        with goal.open("rb") as stream:
            fault = None if stream.read(4) == b"GGUF" else "is not a GGUF file"
    _check_replaced(goal, fault, may_replace=force)
    return goal


def _unexported_file(folder: Path) -> str | None:
    """Return the name of a file that an export for Ollama does not write, or None.

    If the folder has no Modelfile, it is not an export: return the name of its first file.
    """
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        gguf = folder / name.removesuffix(".json")
        has_record = gguf.suffix == ".gguf" and record_path(gguf).is_file()
        if not has_record and name != MODELFILE and not name.upper().startswith(NOTICES):
            return name
    return None if MODELFILE in names else names[0]


@contextmanager
def part_folder(goal: Path) -> Iterator[Path]:
    """Create a hidden folder next to `goal` for the files of an export.

    On exit the folder is deleted, unless `move_into_place` has renamed it. Raise CheckpointError if
    the disk is full.
    """
    # Delete the hidden folders of killed exports to this path, because each can hold a model.
    for folder in goal.parent.glob(".*.part"):
        match = re.fullmatch(rf"\.{re.escape(goal.name)}\.([0-9]+)\.part", folder.name)
        # In a container, process ids are soon reused. This process has not written anything yet, so
        # a folder with its process id is from a killed export too.
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(folder, ignore_errors=True)
    new_parents = [folder for folder in goal.parents if not folder.exists()]
    part = goal.with_name(f".{goal.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(goal.parent, str(error)) from error
    try:
        yield part
    except Exception as error:
        # Catch Exception instead of OSError, because safetensors raises its own type of error if
        # the disk is full.
        fault = disk_fault(error)
        if not fault:
            raise
        raise CheckpointError(
            fault,
            where=f"--output {goal}",
            why="the export could not be completed, and the output path is unchanged",
            fix=OTHER_DISK,
            cause="disk",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in new_parents:
            with suppress(OSError):  # rmdir fails if the folder is not empty
                folder.rmdir()


def move_into_place(written: Path, goal: Path) -> None:
    """Rename a complete export to `goal`. An existing folder at `goal` is deleted afterwards."""
    old = _old(goal)
    if goal.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        goal.rename(old)
    os.replace(written, goal)
    shutil.rmtree(old, ignore_errors=True)


def _old(goal: Path) -> Path:
    """Return the path to which the old folder is renamed while a new export replaces it."""
    return goal.with_name(f".{goal.name}.old")

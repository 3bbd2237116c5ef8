"""The place of an export: a hidden folder beside its final place, until it is complete.

    gguf_place, merge_place or new_folder_place -> part_folder: `.NAME.PID.part`
    -> checks of what was written -> move_into_place

A killed export leaves such a folder, and nothing under the final name; the next one to that place
removes it. Commands look for the place before torch is imported.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tunesmith.errors import CheckpointError, MachineError, UsageError, disk_fault
from tunesmith.host.files import existing_folder, from_here
from tunesmith.host.shell import shell_path
from tunesmith.inference.load_run import RunLocation
from tunesmith.run_dir import RECIPE
from tunesmith.tools.export.gguf.ollama import MODELFILE

# The check, and the size of each file: the mark of a folder that a merge wrote.
MERGE_FILE = "merge.json"
NOTICES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
OTHER_DISK = "free disk space (df -h), or use another disk with --output"


def record_path(file: Path) -> Path:
    """Name the path of the record of a GGUF file."""
    return file.with_name(file.name + ".json")


def output_place(output: str | Path, location: RunLocation) -> Path:
    """The absolute path of an output; its folder need not exist yet.

    UsageError where the path names nothing, or where the run, its base or the user is in it;
    MachineError where its folder cannot be written.
    """
    _check_not_recipe(location)
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
        raise _unwritable(parent)
    return goal


def _unwritable(folder: Path, why: str = "") -> MachineError:
    return MachineError(
        f"{folder} cannot be written", where="--output", why=why, fix="use a writable folder"
    )


def _check_not_recipe(location: RunLocation) -> None:
    """UsageError for the base of a recipe whose run is there: who names it means the run."""
    recipe = location.run
    if location.holds == "base" and recipe and (Path(recipe.output_dir) / RECIPE).is_file():
        raise UsageError(
            "this is a recipe, which stands for its base, not for the run that it made",
            where=location.base.name,
            fix=f"use the run: {shell_path(from_here(recipe.output_dir))}",
        )


def new_folder_place(output: str | Path, location: RunLocation) -> Path:
    """`output_place` of a folder; UsageError unless nothing is there, or an empty folder."""
    goal = output_place(output, location)
    if goal.is_symlink() or (goal.exists() and (not goal.is_dir() or any(goal.iterdir()))):
        raise UsageError("--output is not an empty folder", where=str(goal), fix="name a new one")
    return goal


def merge_place(
    path: str | Path, output: str | Path, location: RunLocation, *, force: bool
) -> Path:
    """`output_place` of a merge of the run at `path`.

    UsageError where the run has no adapter, or where the merge would overwrite something else.
    """
    _check_not_recipe(location)
    if location.holds != "adapter":
        where = str(location.folder or path)
        why = location.note or "it is a base model"
        if location.holds == "full":
            why = "it is a full fine-tune, already a complete model"
        fix = f"use {where}, or copy it"
        raise UsageError(f"{path} has no adapter to merge", where=where, why=why, fix=fix)
    # A link to a folder stands for the folder. Path.resolve raises for a loop of links.
    goal = output_place(os.path.realpath(output) if str(output) else output, location)

    for folder in (goal, Path(f"{goal}.rejected")):
        # A rejected merge is replaced in any case.
        fault = _fault_of_merge(folder)
        needs_force = folder == goal and (folder / MERGE_FILE).exists()
        _check_replaced(folder, fault, has_leave=force or not needs_force)
    return goal


def _check_replaced(place: Path, fault: str | None, *, has_leave: bool) -> None:
    """UsageError for the `fault` of a place that is to be replaced, and where there is no leave."""
    if fault:
        raise UsageError(
            f"{place} {fault}",
            where="--output",
            why="--force only replaces what an export wrote and nobody changed since",
            fix="name a new one",
        )
    if not has_leave:
        raise UsageError(
            f"{place} already exists",
            where="--output",
            fix="use a new name, or --force to replace it",
        )


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {str(file.relative_to(folder)): file.lstat().st_size for file in files}


def _fault_of_merge(folder: Path) -> str | None:
    """Say what is in a folder that no merge wrote, or that has another size by now."""
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


def gguf_place(output: str | Path, location: RunLocation, *, is_folder: bool, force: bool) -> Path:
    """`output_place` of a GGUF file, or of a folder with one for Ollama.

    UsageError where it would overwrite something that no export wrote.
    """
    goal = output_place(output, location)
    if not is_folder and goal.suffix != ".gguf":
        fix = f"--output {shell_path(f'{goal}.gguf')}"
        raise UsageError(f"{goal} is not a GGUF file name", where="--output", fix=fix)
    if goal.is_symlink() or (goal.is_dir() != is_folder and goal.exists()):
        # A link would be replaced, and its target stay.
        kind = "a folder" if goal.is_dir() else "a file or link"
        raise UsageError(f"{goal} is {kind}", where="--output", fix="name a new one")
    if not goal.exists() or (is_folder and not any(goal.iterdir())):
        return goal
    if is_folder:
        name = _unexported_file(goal)
        fault = name and f"contains {name}"
    else:
        with goal.open("rb") as stream:
            fault = None if stream.read(4) == b"GGUF" else "is not a GGUF file"
    _check_replaced(goal, fault, has_leave=force)
    return goal


def _unexported_file(folder: Path) -> str | None:
    """A file in a folder that no export for Ollama wrote; None if there is none."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        gguf = folder / name.removesuffix(".json")
        has_record = gguf.suffix == ".gguf" and record_path(gguf).is_file()
        if not has_record and name != MODELFILE and not name.upper().startswith(NOTICES):
            return name
    return None if MODELFILE in names else names[0]


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
    except OSError as error:
        raise _unwritable(goal.parent, str(error)) from error
    try:
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
    """Name the path of an earlier folder while the new one takes its name."""
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

"""Checkpoint folders that are either complete or absent.

A checkpoint is written into a hidden folder next to its final place, and every file is flushed to
the disk. `manifest.json` (sizes and SHA-256 of all files) is written next, and then the folder is
renamed. Therefore, if the process is killed at any moment, earlier checkpoints are still complete.
At most one hidden folder is left, and the next start of the run removes it.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import CheckpointError, ModelError, disk_fault
from tunesmith.host.cores import available_cores
from tunesmith.host.files import follow_umask
from tunesmith.host.memory import open_uncached
from tunesmith.run_dir import MANIFEST, ManifestEntry, read_manifest

log = logging.getLogger(__name__)

CARD = "README.md"
PART = ".distcp"  # suffix of the files that hold one rank's shards in a checkpoint
# Minimum number of bytes to copy or to compare for which a log line is written. 1 GiB takes one or
# two seconds.
ANNOUNCED_BYTES = 1 << 30
# One thread hashes 0.7 to 2 GB/s. Four threads are enough, because a local disk cannot be read
# faster than they hash.
HASHING_THREADS = 4
ELSEWHERE = " (another rank wrote this file, perhaps to another node's disk)"
Entries = dict[str, ManifestEntry]  # entries of a manifest, by path relative to its folder
_CHECKPOINT_NAME = re.compile(r"^checkpoint-(\d+)$")


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    # Do not keep the file in the page cache. If the GPU shares the host's memory, the cache takes
    # memory from the GPU.
    with open_uncached(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of_file(path: Path) -> ManifestEntry:
    return {"bytes": path.stat().st_size, "sha256": digest_of_file(path)}


def flush_to_disk(path: Path) -> None:
    """Flush the cached data of a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_files(folder: Path, hashed: Entries | None = None) -> Entries:
    """Flush every file of `folder` to the disk, and return the entries of its manifest.

    Args:
        hashed: entries of files whose SHA-256 is already known.
    """
    # Apply the umask, because safetensors creates its files with mode 600.
    follow_umask(folder)
    entries = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == MANIFEST:
            continue
        flush_to_disk(path)
        name = path.relative_to(folder).as_posix()
        entries[name] = (hashed or {}).get(name) or entry_of_file(path)
    return entries


def write_manifest(folder: Path, step: int, entries: Entries, last_step: int | None = None) -> None:
    """Write the manifest of a folder whose other files are already flushed to the disk.

    The manifest makes the folder complete. The folder becomes a checkpoint of its run when
    `atomic_folder` renames it.

    Args:
        last_step: last step of the run, only for final/. It can be later than the step of the
            weights.
    """
    manifest = folder / MANIFEST
    steps = {"step": step}
    if last_step is not None:
        steps["last_step"] = last_step
    manifest.write_text(json.dumps({**steps, "files": entries}, indent=1))
    flush_to_disk(manifest)
    flush_to_disk(folder)


def find_damage(folder: Path, *, contents: bool = True) -> str | None:
    """Return a short text for a warning that says how a checkpoint folder or `final/` is damaged.

    Return None if the folder is complete.

    Args:
        contents: compare the SHA-256 of every file, not only its size.
    """
    return next((clause for _, clause in damaged_files(folder, contents=contents)), None)


def damaged_files(
    folder: Path, *, contents: bool = True, reads: Callable[[str], bool] = lambda name: True
) -> list[tuple[str, str]]:
    """Return (name, damage) for each missing or damaged file of a manifest.

    The damage is a short text for a message.

    If the manifest itself is missing or damaged, return only the manifest. A log line announces a
    comparison of more than ANNOUNCED_BYTES.

    Args:
        contents: compare the SHA-256 of every file, not only its size.
        reads: function that returns whether the file with the given name is checked.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return [(MANIFEST, "its manifest.json cannot be read")]
    if manifest is None:
        return [(MANIFEST, "it has no manifest.json")]

    # The model card is not checked, because users edit it.
    entries = {
        name: entry for name, entry in manifest["files"].items() if name != CARD and reads(name)
    }
    total = sum(entry["bytes"] for entry in entries.values())
    if contents and total > ANNOUNCED_BYTES:
        log.info(f"checking the checksums of the files in {folder} ({total / 2**30:.1f} GiB)")

    def find(name: str) -> str:
        """Return a short text that says what is wrong with a file, or an empty string."""
        path = folder / name
        entry = entries[name]
        if not path.is_file():
            if name.endswith(PART):
                return f"{name} is missing{ELSEWHERE}"
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if contents and digest_of_file(path) != entry["sha256"]:
            return f"the contents of {name} do not match their checksum"
        return ""

    with ThreadPoolExecutor(max_workers=min(HASHING_THREADS, available_cores())) as pool:
        clauses = pool.map(find, entries)
        return [(name, clause) for name, clause in zip(entries, clauses, strict=True) if clause]


def check_sums(
    folder: Path,
    *,
    reads: Callable[[str], bool] = lambda name: not name.startswith("state/"),
) -> None:
    """Compare files that will be read with the checksums in the folder's manifest.

    A folder without a manifest of tunesmith passes, for example an adapter from another tool.

    Args:
        reads: function that returns whether the caller will read the file with the given name. By
            default, every file except the training state is checked.

    Raise ModelError with the name of the first file that differs.
    """
    for name, clause in damaged_files(folder, reads=reads):
        if name != MANIFEST:
            raise ModelError(
                clause,
                where=folder / name,
                why="the file was damaged or edited after it was written, because its checksum "
                f"differs from the one in {MANIFEST}",
                fix="restore the file from a copy, use another checkpoint of the run, or train "
                "with --fresh; if you edited the file yourself, copy the folder and delete "
                f"{MANIFEST} in the copy",
                cause="damaged",
            )


def last_step_of(folder: Path) -> int | None:
    """Return the last step of the run from the manifest of a folder, or None if the folder is
    incomplete.

    Only the sizes of the files are checked, not their contents.
    """
    if find_damage(folder, contents=False) is not None:
        return None
    manifest = read_manifest(folder)
    return int(manifest["last_step"]) if manifest else None


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return a dict from step to the folder checkpoint-<step>, newest first.

    Folders can be incomplete.
    """
    checkpoints = {}
    for path in run_dir.glob("checkpoint-*"):
        match = _CHECKPOINT_NAME.match(path.name)
        if match and path.is_dir():
            checkpoints[int(match[1])] = path
    return dict(sorted(checkpoints.items(), reverse=True))


@contextmanager
def atomic_folder(place: Path, step: int, last_step: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write into, and rename it to `place` when the block ends.

    The folder is removed if the block raises an error. An existing folder at `place` that has no
    manifest is not a checkpoint: it is kept as `<place>.previous-<n>`. For `step` and `last_step`,
    see `write_manifest`.

    Raise CheckpointError if the disk cannot be written. The existing folder at `place` is then
    unchanged.
    """
    partial = place.with_name(f".{place.name}.partial")
    replaced = place.with_name(f".{place.name}.old")
    try:
        remove(partial)
        remove(replaced)
        partial.mkdir(parents=True)
        yield partial
        # Write the manifest only if it does not exist: ranks that write a checkpoint together have
        # already written it.
        if not (partial / MANIFEST).exists():
            write_manifest(partial, step, flush_files(partial), last_step)
        # If the process is killed between the two renames, `claim.restore` renames `.old` back.
        if place.is_symlink() or place.exists():
            place.rename(replaced if is_complete(place) else free_name(place))
        partial.rename(place)
        # Flush the parent folder, because otherwise a crash of the machine could undo the rename.
        flush_to_disk(place.parent)
        remove(replaced)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        fault = disk_fault(error)
        if not fault and not isinstance(error, OSError):
            raise
        checkpoints = list_checkpoints(place.parent).values()
        complete = [path.name for path in checkpoints if is_complete(path)]
        # Copy the notes (`add_note`) of the original error, because they name the rank on which it
        # happened.
        notes = vars(error).get("__notes__", [])
        raise CheckpointError(
            fault or f"{place.name} cannot be written: {error}",
            where=" ".join([str(place), *notes]),
            why=f"the complete earlier checkpoints are: {', '.join(complete) or 'none'}",
            fix="free disk space (checkpoint.keep=1 needs the least space) and start the same "
            "command again: it resumes from the newest checkpoint",
            cause="disk" if fault else "",
        ) from error


def is_complete(folder: Path) -> bool:
    """Return whether a checkpoint was written completely into this folder.

    The files of such a folder may still have been damaged later. Return False if `folder` is a
    link, whatever its target is.
    """
    return not folder.is_symlink() and (folder / MANIFEST).is_file()


def free_name(path: Path) -> Path:
    """Return the first path of `<path>.previous-1`, `-2`, ... that does not exist."""
    places = (path.with_name(f"{path.name}.previous-{n}") for n in itertools.count(1))
    return next(place for place in places if not place.exists())


def remove(path: Path) -> None:
    """Delete a file, a folder or a link. The target of a link is not deleted."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        # Delete the manifest first. If the process is killed during rmtree, the rest does not look
        # like a complete checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def prune(run_dir: Path, keep: int, *, latest: int, keep_step: int | None) -> None:
    """Delete old checkpoints of a run.

    The checkpoint of step `latest` was just written. The `keep` newest checkpoints up to this step
    are kept, and so is the checkpoint of `keep_step`. Checkpoints later than `latest` are deleted,
    because they are damaged: this is why the run has resumed from an earlier checkpoint. Links and
    folders without a manifest are never deleted, because a run did not create them.
    """
    complete = {step: path for step, path in list_checkpoints(run_dir).items() if is_complete(path)}
    up_to_latest = [step for step in complete if step <= latest]
    remaining = {*up_to_latest[:keep], keep_step}
    for step, path in complete.items():
        if step in remaining:
            continue
        # Rename the folder before it is deleted. If the process is killed during the deletion, the
        # next start of the run removes the hidden folder.
        hidden = run_dir / f".{path.name}.old"
        remove(hidden)
        path.rename(hidden)
        remove(hidden)

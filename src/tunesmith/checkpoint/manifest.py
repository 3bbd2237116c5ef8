"""Checkpoint folders that are either complete or absent.

A checkpoint is written into a hidden folder beside its place, every file is flushed to the disk,
then `manifest.json` (sizes and SHA-256 of all files) is written, then the folder is renamed. A kill
at any moment leaves earlier checkpoints complete and at most one hidden folder, which the next
start removes.
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
PART = ".distcp"  # the end of a file's name that holds what one rank has of a checkpoint
# Comparing the checksums of so many bytes, or copying them, takes a second or two.
ANNOUNCED_BYTES = 1 << 30
# One thread hashes 0.7 to 2 GB/s; a local disk reads no more than a few of them hash.
HASHING_THREADS = 4
ELSEWHERE = ": another rank wrote it, perhaps to another node's disk"
Entries = dict[str, ManifestEntry]  # of a manifest, by the path in its folder
_CHECKPOINT_NAME = re.compile(r"^checkpoint-(\d+)$")


def digest_of_file(path: Path) -> str:
    """SHA-256, hex."""
    # On unified memory a checkpoint in the page cache would be in the GPU's way.
    with open_uncached(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of_file(path: Path) -> ManifestEntry:
    """The manifest's entry of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest_of_file(path)}


def flush_to_disk(path: Path) -> None:
    """Write what the system holds of a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_files(folder: Path, hashed: Entries | None = None) -> Entries:
    """Flush every file of `folder`; its manifest's entries.

    hashed: entries of files that are hashed already.
    """
    # safetensors writes its files with mode 600.
    follow_umask(folder)
    entries: Entries = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == MANIFEST:
            continue
        flush_to_disk(path)
        name = path.relative_to(folder).as_posix()
        entries[name] = (hashed or {}).get(name) or entry_of_file(path)
    return entries


def write_manifest(folder: Path, step: int, entries: Entries, last_step: int | None = None) -> None:
    """Write the manifest of a folder whose other files are on the disk.

    The folder is then complete. It becomes a checkpoint of its run when `atomic_folder` renames it.

    last_step: of final/, the run's, which may be later than that of the weights.
    """
    manifest = folder / MANIFEST
    steps = {"step": step}
    if last_step is not None:
        steps["last_step"] = last_step
    manifest.write_text(json.dumps({**steps, "files": entries}, indent=1))
    flush_to_disk(manifest)
    flush_to_disk(folder)


def find_damage(folder: Path, *, contents: bool = True) -> str | None:
    """Find what is wrong with a checkpoint's folder or `final/`, as a clause for a warning.

    None if it is complete.

    contents: compare the SHA-256 of every file too, not only its size.
    """
    return next((clause for _, clause in damaged_files(folder, contents=contents)), None)


def damaged_files(
    folder: Path, *, contents: bool = True, reads: Callable[[str], bool] = lambda name: True
) -> list[tuple[str, str]]:
    """Return each file of a manifest that is missing or damaged, with a clause that says so.

    Return the manifest alone if it is missing or damaged itself. Comparing the contents of more
    than ANNOUNCED_BYTES is announced.

    reads: whether a file of the manifest is compared.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return [(MANIFEST, "its manifest.json cannot be read")]
    if manifest is None:
        return [(MANIFEST, "it has no manifest.json: it is incomplete")]
    # People edit the card.
    entries = {
        name: entry for name, entry in manifest["files"].items() if name != CARD and reads(name)
    }
    total = sum(entry["bytes"] for entry in entries.values())
    if contents and total > ANNOUNCED_BYTES:
        log.info(f"comparing the checksums of {folder}: {total / 2**30:.1f} GiB")

    def find(name: str) -> str:
        """Return what is wrong with a file, or an empty string."""
        path = folder / name
        entry = entries[name]
        if not path.is_file():
            return f"{name} is missing{ELSEWHERE if name.endswith(PART) else ''}"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {entry['bytes']}"
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
    """Compare the files that are about to be read with the checksums in the folder's manifest.

    A folder without a manifest of ours, such as an adapter from elsewhere, passes.

    reads: whether a file of the manifest is read; by default all but the training state are.

    ModelError names the first file that differs.
    """
    for name, clause in damaged_files(folder, reads=reads):
        if name != MANIFEST:
            raise ModelError(
                clause,
                where=str(folder / name),
                why="it was damaged or edited after it was written: "
                f"{MANIFEST} has the checksum of what was",
                fix="restore it from a copy, take another checkpoint of the run, or train with "
                f"--fresh; if you edited it yourself, copy the folder and delete {MANIFEST} in the "
                "copy",
                cause="damaged",
            )


def last_step_of(folder: Path) -> int | None:
    """The run's last step by a complete folder's manifest (sizes compared, contents not), or
    None.
    """
    if find_damage(folder, contents=False) is not None:
        return None
    manifest = read_manifest(folder)
    return int(manifest["last_step"]) if manifest else None


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """All folders named checkpoint-<step>, complete or not, by step, the newest first."""
    checkpoints = {}
    for path in run_dir.glob("checkpoint-*"):
        match = _CHECKPOINT_NAME.match(path.name)
        if match and path.is_dir():
            checkpoints[int(match[1])] = path
    return dict(sorted(checkpoints.items(), reverse=True))


@contextmanager
def atomic_folder(place: Path, step: int, last_step: int | None = None) -> Iterator[Path]:
    """A folder to write into, which becomes `place` when the block ends; steps as of
    `write_manifest`.

    It is removed if the block raises. A folder without a manifest that lies there is not a
    checkpoint: it stays, as `<place>.previous-<n>`. Where the disk cannot be written,
    CheckpointError, and what was there before stays.
    """
    partial = place.with_name(f".{place.name}.partial")
    replaced = place.with_name(f".{place.name}.old")
    try:
        remove(partial)
        remove(replaced)
        partial.mkdir(parents=True)
        yield partial
        # Where ranks write a checkpoint together they have written it already.
        if not (partial / MANIFEST).exists():
            write_manifest(partial, step, flush_files(partial), last_step)
        # A kill between the two renames leaves `.old`, which `claim.restore` names back.
        if place.is_symlink() or place.exists():
            place.rename(replaced if is_complete(place) else free_name(place))
        partial.rename(place)
        # A rename is on the disk once its folder is.
        flush_to_disk(place.parent)
        remove(replaced)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        fault = disk_fault(error)
        if not fault and not isinstance(error, OSError):
            raise
        checkpoints = list_checkpoints(place.parent).values()
        complete = [path.name for path in checkpoints if is_complete(path)]
        # A note says on which rank it happened.
        notes = vars(error).get("__notes__", [])
        raise CheckpointError(
            fault or f"cannot write {place.name}: {error}",
            where=" ".join([str(place), *notes]),
            why=f"complete earlier checkpoints: {', '.join(complete) or 'none'}",
            fix="free disk space (checkpoint.keep=1 needs least) and start the same command again: "
            "it resumes from the newest one",
            cause="disk" if fault else "",
        ) from error


def is_complete(folder: Path) -> bool:
    """Tell whether a folder was written as a checkpoint; it may be damaged since.

    A link is none, whatever it leads to.
    """
    return not folder.is_symlink() and (folder / MANIFEST).is_file()


def free_name(path: Path) -> Path:
    """The first of `<path>.previous-1`, `-2`, ... that is not there."""
    places = (path.with_name(f"{path.name}.previous-{n}") for n in itertools.count(1))
    return next(place for place in places if not place.exists())


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        # The manifest first: a kill in between leaves nothing that looks complete.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def prune(run_dir: Path, keep: int, *, latest: int, keep_step: int | None) -> None:
    """Delete the checkpoints of a run, but for some.

    The `keep` newest up to step `latest`, which was just written, stay, and that of step
    `keep_step`. A later one than `latest` goes: the run resumed from before it, as its files were
    damaged. A link, and a folder without a manifest, are not ours to delete.
    """
    complete = {step: path for step, path in list_checkpoints(run_dir).items() if is_complete(path)}
    newest = [step for step in complete if step <= latest][:keep]
    for step, path in complete.items():
        if step in newest or step == keep_step:
            continue
        # The next start removes it if a kill comes in between.
        hidden = run_dir / f".{path.name}.old"
        remove(hidden)
        path.rename(hidden)
        remove(hidden)

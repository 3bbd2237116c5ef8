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
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import MANIFEST, ManifestEntry, read_manifest

log = logging.getLogger(__name__)

CARD = "README.md"
PART = ".distcp"  # the end of a file's name that holds what one rank has of a checkpoint
# Comparing the checksums of as much takes a second or two, so more is announced.
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
    for _, clause in damaged_files(folder, contents=contents):
        return clause
    return None


def damaged_files(
    folder: Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, str]]:
    """Each file of a manifest that is missing or damaged, and a clause that says so.

    The manifest alone, if it is missing or damaged itself.

    share: (i, n): the contents are compared of every n-th file, the largest first, from the i-th
        on. So n readers that see one folder compare all of them together.
    """
    if not (folder / MANIFEST).is_file():
        yield MANIFEST, "it has no manifest.json: it is incomplete"
        return
    entries = _manifest_entries(folder)
    if entries is None:
        yield MANIFEST, "its manifest.json cannot be read"
        return
    compared: set[str] = set()
    if contents:
        index, readers = share
        # So that the readers' shares are alike in bytes.
        largest_first = sorted(entries, key=lambda name: (-entries[name][0], name))
        compared = set(largest_first[index::readers])
    for name, (size, digest) in entries.items():
        clause = _damage_of_file(folder, name, size, digest if name in compared else None)
        if clause:
            yield name, clause


def _manifest_entries(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Bytes and SHA-256 of each file by the manifest of `folder`; None where it cannot be read."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return None
    if manifest is None:
        return None
    entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    # People edit the card.
    entries.pop(CARD, None)
    return entries


def _damage_of_file(folder: Path, name: str, size: int, digest: str | None) -> str | None:
    """Find what is wrong with a file of `size` bytes, as a clause, or None.

    digest: its SHA-256; None: it is not compared.
    """
    path = folder / name
    if not path.is_file():
        return f"{name} is missing{ELSEWHERE if name.endswith(PART) else ''}"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes of {size}"
    if digest is not None and digest_of_file(path) != digest:
        return f"the contents of {name} do not match their checksum"
    return None


def check_sums(
    folder: Path,
    *,
    reads: Callable[[str], bool] = lambda name: not name.startswith("state/"),
) -> None:
    """Compare the files that are about to be read with the checksums in the folder's manifest.

    A folder without a manifest of ours, such as an adapter from elsewhere, passes. More than
    ANNOUNCED_BYTES are announced.

    reads: whether a file of the manifest is read; by default all but the training state are.

    ModelError names the first file that differs.
    """
    entries = _manifest_entries(folder) or {}
    names = [name for name in entries if reads(name)]
    total = sum(entries[name][0] for name in names)
    if total > ANNOUNCED_BYTES:
        log.info(f"comparing the checksums of {folder}: {total / 2**30:.1f} GiB")
    with ThreadPoolExecutor(max_workers=min(HASHING_THREADS, available_cores())) as pool:
        clauses = pool.map(lambda name: _damage_of_file(folder, name, *entries[name]), names)
    for name, clause in zip(names, clauses, strict=True):
        if clause:
            raise ModelError(
                clause,
                where=str(folder / name),
                why="it was damaged or edited after it was written: "
                f"{MANIFEST} has the checksum of what was",
                fix=_way_on(folder),
                cause="damaged",
            )


def _way_on(folder: Path) -> str:
    """Say what to do about a folder with a file that is not as it was written."""
    edited = f"if you edited it yourself, copy the folder and delete {MANIFEST} in the copy"
    recipe = folder.parent / "config.yaml"
    if not recipe.is_file():
        return f"copy it again from where it was written; {edited}"
    for checkpoint in list_checkpoints(folder.parent).values():
        if checkpoint != folder and find_damage(checkpoint, contents=False) is None:
            return f"restore it from a copy, or take {shell_path(checkpoint)}; {edited}"
    return f"restore it from a copy, or tunesmith train {shell_path(recipe)} --fresh; {edited}"


def seconds_to_write(folder: Path) -> float | None:
    """Seconds between the first file of a checkpoint that was written and its manifest, the last.

    None where there is no manifest.
    """
    if not is_complete(folder):
        return None
    first = min(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
    return max(0.0, (folder / MANIFEST).stat().st_mtime - first)


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
        raise _cannot_write(place, fault, error) from error


def _cannot_write(place: Path, fault: str | None, error: BaseException) -> CheckpointError:
    """fault: what is wrong with the disk, if that is known."""
    complete = [path.name for path in list_checkpoints(place.parent).values() if is_complete(path)]
    why = "there is no earlier checkpoint"
    if complete:
        why = f"complete earlier checkpoints: {', '.join(complete)}"
    room = "make room"
    if len(complete) > 1:
        room = "free disk space (checkpoint.keep=1 needs less)"
    # A note says on which rank it happened.
    notes = vars(error).get("__notes__", [])
    return CheckpointError(
        fault or f"cannot write {place.name}: {error}",
        where=" ".join([str(place), *notes]),
        why=why,
        fix=f"{room} and start the same command again: it resumes from the newest one",
        cause="disk" if fault else "",
    )


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

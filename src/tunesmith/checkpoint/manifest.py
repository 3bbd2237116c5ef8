"""Checkpoint folders that are either complete or absent.

A checkpoint is written into a hidden folder beside its place, every file is flushed to the disk, then `manifest.json`
(sizes and SHA-256 of all files) is written, then the folder is renamed. A kill at any moment leaves earlier checkpoints
complete and at most one hidden folder, which the next start removes.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError, ModelError, disk_fault
from tunesmith.host.cores import available_cores
from tunesmith.host.files import follow_umask
from tunesmith.host.memory import open_uncached
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import MANIFEST, read_manifest

CARD = "README.md"
PART = ".distcp"  # the end of a file's name that holds what one rank has of a checkpoint
# Comparing the checksums of as much takes a second or two, so more is announced
ANNOUNCED_BYTES = 1 << 30
HASHING_THREADS = 4  # one hashes 0.7 to 2 GB/s, a local disk reads no more than a few of them hash
ELSEWHERE = ": a rank wrote it, maybe on another node's disk"
# Of a manifest: {"relative/path": {"bytes": n, "sha256": "..."}}
Entries = dict[str, dict[str, Any]]
# Writes files into an empty folder; returns the entries of those that it hashed as it wrote them.
Fill = Callable[[Path], Entries | None]
_NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A folder named checkpoint-<step>, and the step after which it was written."""

    path: Path
    step: int
    source: int = 0  # the lowest rank whose directory held it at this start


def digest_of_file(path: Path) -> str:
    """SHA-256, hex."""
    with open_uncached(
        path
    ) as file:  # on unified memory a checkpoint in the page cache would be in the GPU's way
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Write what the system holds of a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_files(folder: Path, hashed: Entries | None = None) -> Entries:
    """Flush every file of `folder`; its manifest's entries. Those in `hashed` are taken from there, and not read again."""
    follow_umask(folder)
    entries: Entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        flush_to_disk(path)
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        entry = (hashed or {}).get(name)
        if entry is None or entry["bytes"] != size:
            entry = {"bytes": size, "sha256": digest_of_file(path)}
        entries[name] = entry
    return entries


def write_manifest(folder: Path, step: int, entries: Entries) -> None:
    """Make `folder`, whose files are on the disk, a checkpoint."""
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": entries}, indent=1))
    flush_to_disk(manifest)
    flush_to_disk(folder)


def find_damage(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint's folder or `final/`, as a clause for a warning; None if it is complete.

    With `contents` the SHA-256 of every file is compared too, not only its size.
    """
    return next((clause for _, clause in damaged_files(folder, contents=contents)), None)


def damaged_files(
    folder: Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, str]]:
    """Each file of a manifest that is missing or damaged, and a clause that says so; the manifest alone if it is.

    Of `share` (i, n) the contents are compared of every n-th file, the largest first, from the i-th on: n readers that see
    one folder compare all of them together.
    """
    if not (folder / MANIFEST).is_file():
        yield MANIFEST, "it has no manifest.json: it was not finished"
        return
    entries = _manifest_entries(folder)
    if entries is None:
        yield MANIFEST, "its manifest.json cannot be read"
        return
    own, of = share
    compared = (
        set(sorted(entries, key=lambda name: (-entries[name][0], name))[own::of])
        if contents
        else set()
    )
    for name, (size, digest) in entries.items():
        if clause := _damage_of_file(folder, name, size, digest if name in compared else None):
            yield name, clause


def _manifest_entries(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Bytes and SHA-256 of each file by the manifest of `folder`, without the card, which people edit; None where it cannot
    be read."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return None
    if manifest is None:
        return None
    entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    entries.pop(CARD, None)
    return entries


def sums_of_weights(folder: Path) -> str:
    """SHA-256 of the checksums that a manifest of ours has of a model's weights; empty where there is none."""
    sums = [
        entry
        for name, entry in sorted((_manifest_entries(folder) or {}).items())
        if name.endswith(".safetensors")
    ]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest() if sums else ""


def _damage_of_file(folder: Path, name: str, size: int, digest: str | None) -> str | None:
    """What is wrong with a file of `size` bytes and the SHA-256 `digest` (None: not compared), as a clause, or None."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing{ELSEWHERE if name.endswith(PART) else ''}"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes of {size}"
    if digest is not None and digest_of_file(path) != digest:
        return f"the contents of {name} do not match their checksum"
    return None


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_sums(
    folder: Path,
    *,
    reads: Callable[[str], bool] = lambda name: not name.startswith("state/"),
    say: Callable[[str], None] = _print_to_stderr,
) -> None:
    """Compare the files that are about to be read with the checksums in the folder's manifest.

    A folder without a manifest of ours, such as an adapter from elsewhere, passes.

    Args:
        reads: whether a file of the manifest is read; by default all but the training state are.
        say: takes a line where there is more than ANNOUNCED_BYTES to compare.

    ModelError names the first file that differs.
    """
    entries = {
        name: entry for name, entry in (_manifest_entries(folder) or {}).items() if reads(name)
    }
    total = sum(size for size, _ in entries.values())
    if total > ANNOUNCED_BYTES:
        say(f"comparing the checksums of {folder}: {total / 2**30:.1f} GiB")
    with ThreadPoolExecutor(max_workers=min(HASHING_THREADS, available_cores())) as pool:
        futures = {
            name: pool.submit(_damage_of_file, folder, name, *entry)
            for name, entry in entries.items()
        }
    for name, future in futures.items():
        if clause := future.result():
            why = f"it was damaged or edited after it was written: {MANIFEST} has the checksum of what was"
            raise ModelError(
                clause, where=str(folder / name), why=why, fix=_way_on(folder), cause="damaged"
            )


def _way_on(folder: Path) -> str:
    """What to do about a folder with a file that is not as it was written."""
    edited = f"if you edited it yourself, copy the folder and delete {MANIFEST} in the copy"
    recipe = folder.parent / "config.yaml"
    if not recipe.is_file():
        return f"copy it again from where it was written; {edited}"
    for checkpoint in list_checkpoints(folder.parent):
        if checkpoint.path != folder and find_damage(checkpoint.path, contents=False) is None:
            return f"restore it from a copy, or take {shell_path(checkpoint.path)}; {edited}"
    return f"restore it from a copy, or tunesmith train {shell_path(recipe)} --fresh; {edited}"


def seconds_to_write(folder: Path) -> float | None:
    """Seconds between the first file of a checkpoint that was written and its manifest, the last; None without one."""
    if not is_sealed(folder):
        return None
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return max(0.0, (folder / MANIFEST).stat().st_mtime - min(times))


def step_of(folder: Path) -> int | None:
    """The step in a complete folder's manifest (sizes compared, contents not), or None."""
    if find_damage(folder, contents=False) is not None:
        return None
    manifest = read_manifest(folder)
    return int(manifest["step"]) if manifest else None


def list_checkpoints(run_dir: Path) -> list[SavedCheckpoint]:
    """All folders named checkpoint-<step>, complete or not, newest first."""
    if not run_dir.is_dir():
        return []
    named = [(p, _NAME.match(p.name)) for p in run_dir.iterdir() if p.is_dir()]
    return sorted((SavedCheckpoint(p, int(m[1])) for p, m in named if m), key=lambda f: -f.step)


@contextmanager
def writing(place: Path, step: int) -> Iterator[Path]:
    """A folder to write into. It becomes `place` when the block ends, or is removed if the block raises.

    A folder without a manifest that lies there is not a checkpoint: it is kept as `<place>.previous-<n>`. Where the disk
    cannot be written, CheckpointError, and what was there before stays.
    """
    partial, old = (place.with_name(f".{place.name}.{kind}") for kind in ("partial", "old"))
    try:
        for leftover in (partial, old):
            remove(leftover)
        partial.mkdir(parents=True)
        yield partial
        if not (partial / MANIFEST).exists():
            write_manifest(partial, step, flush_files(partial))
        if place.is_symlink() or place.exists():
            place.rename(old if is_sealed(place) else free_name(place))
        partial.rename(place)
        flush_to_disk(place.parent)
        remove(old)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        fault = disk_fault(error)
        if not fault and not isinstance(error, OSError):
            raise
        kept = [f.path.name for f in list_checkpoints(place.parent) if is_sealed(f.path)]
        what = fault or f"cannot write {place.name}: {error}"
        why = (
            f"earlier checkpoints are complete: {', '.join(kept)}"
            if kept
            else "no checkpoint was written before"
        )
        room = "make room (checkpoint.keep=1 needs less)" if len(kept) > 1 else "make room"
        fix = f"{room} and start the same command again: it resumes from the newest one"
        where = " ".join([str(place), *vars(error).get("__notes__", [])])
        raise CheckpointError(what, where=where, why=why, fix=fix) from error


def is_sealed(folder: Path) -> bool:
    """Whether a folder itself, not one that a link leads to, was written as a checkpoint; it may be damaged since."""
    return not folder.is_symlink() and (folder / MANIFEST).is_file()


def free_name(path: Path) -> Path:
    """The first of `<path>.previous-1`, `-2`, ... that is not there."""
    places = (path.with_name(f"{path.name}.previous-{n}") for n in itertools.count(1))
    return next(place for place in places if not place.exists())


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder, its manifest first: a kill in between leaves nothing
    that looks complete."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def prune(run_dir: Path, keep: int, *, latest: int, keep_step: int | None) -> None:
    """Delete checkpoints but the newest `keep`, counted from step `latest` down, and the one of `keep_step`.

    One later than `latest`, which was just written, is damaged: this run resumed from before it. A link, and a folder
    without a manifest, are not ours to delete.
    """
    found = [checkpoint for checkpoint in list_checkpoints(run_dir) if is_sealed(checkpoint.path)]
    kept = {keep_step, *[c.step for c in found if c.step <= latest][:keep]}
    for checkpoint in found:
        if checkpoint.step not in kept:
            # The next start removes it if a kill comes in between
            hidden = run_dir / f".{checkpoint.path.name}.old"
            remove(hidden)
            checkpoint.path.rename(hidden)
            remove(hidden)


class Writer:
    """Writes `checkpoint-<step>` into a run directory and deletes the oldest beyond `keep`.

    An error of the background thread is raised unchanged by the next `write`, `write_async` or `wait`. A run waits before it ends, so that no thread
    writes into a directory that another run may already hold.

    Args:
        saved_step: step of the newest complete checkpoint, at first of that which the run resumes from; or None.
        sync: flushes to the disk what must be there before a checkpoint counts; called in the thread that writes.
    """

    def __init__(
        self, run_dir: Path, keep: int, saved_step: int | None, *, sync: Callable[[], None]
    ) -> None:
        self.saved_step = saved_step
        self._run_dir, self._keep, self._sync = run_dir, keep, sync
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tunesmith-checkpoint")
        self._running: Future[None] | None = None

    def write(self, fill: Fill, step: int, *, keep_step: int | None) -> None:
        """Write a checkpoint now, after the one in progress; the one of `keep_step` stays however old it is.

        CheckpointError if it cannot be written; what was there before stays.
        """
        self.wait()
        self._write(fill, step, keep_step)

    def write_async(self, fill: Fill, step: int, *, keep_step: int | None) -> None:
        """As `write`, in the background thread."""
        self.wait()
        self._running = self._pool.submit(self._write, fill, step, keep_step)

    def _write(self, fill: Fill, step: int, keep_step: int | None) -> None:
        self._sync()
        with writing(self._run_dir / f"checkpoint-{step}", step) as folder:
            fill(folder)
        self.saved_step = step
        prune(self._run_dir, self._keep, latest=step, keep_step=keep_step)

    @property
    def failed(self) -> bool:
        """Whether the last write has ended with an error, which `wait` raises."""
        return (
            self._running is not None
            and self._running.done()
            and self._running.exception() is not None
        )

    def wait(self) -> None:
        """Wait for the write in progress, if there is one, and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Let the write in progress finish, and end the thread; the run ends for another reason than an error of it."""
        self._running = None
        self._pool.shutdown()

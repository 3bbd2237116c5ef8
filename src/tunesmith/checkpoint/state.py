"""Checkpoints that are either whole or not there.

A checkpoint is written into a hidden folder beside its place, every file is flushed to the disk, then `manifest.json`
(sizes and SHA-256 of all files) is written, then the folder is renamed. A kill at any moment leaves the old ones whole
and at most a hidden rest, which the next start sweeps away. Tensors are safetensors, everything else is JSON: no
pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError, disk_fault

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and the step after which it was written."""

    path: Path
    step: int


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def seal(folder: Path, step: int) -> None:
    """Flush every file of `folder`, then write and flush its manifest."""
    entries = {}
    for path in _files(folder):
        _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": entries}, indent=1))
    _flush(manifest)
    _flush(folder)


def find_damage(folder: Path, *, contents: bool = True) -> str | None:
    """Why `folder` is no whole checkpoint, in words for a warning; None if it is one.

    Args:
        folder: a checkpoint's folder or `final/`.
        contents: also compare the SHA-256 of every file, not only the sizes.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = dict(manifest["files"])
        int(manifest["step"])
    except FileNotFoundError:
        return "it has no manifest.json: it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest.json cannot be read"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {entry['bytes']}"
        if contents and _digest(path) != entry["sha256"]:
            return f"the contents of {name} do not match their checksum"
    return None


def step_of(folder: Path) -> int | None:
    """The step in a whole folder's manifest (sizes compared, contents not), or None."""
    if find_damage(folder, contents=False) is not None:
        return None
    return int(json.loads((folder / MANIFEST).read_text())["step"])


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All folders named checkpoint-<step>, whole or not, newest first."""
    if not run_dir.is_dir():
        return []
    named = [(p, _NAME.match(p.name)) for p in run_dir.iterdir() if p.is_dir()]
    return sorted((Checkpoint(p, int(m[1])) for p, m in named if m), key=lambda f: -f.step)


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; each torn one that is passed over is told to `warn`."""
    for found in list_checkpoints(run_dir):
        reason = find_damage(found.path)
        if reason is None:
            return found
        warn(f"{found.path.name} is passed over: {reason}")
    return None


@contextmanager
def writing(place: Path, step: int) -> Iterator[Path]:
    """A folder to write into, which becomes `place` whole when the block ends, or leaves no trace.

    Raises:
        CheckpointError: when the disk is full or cannot be written; what was there before stays.
    """
    partial = place.with_name(f".{place.name}.partial")
    old = place.with_name(f".{place.name}.old")
    try:
        for rest in (partial, old):
            remove(rest)
        partial.mkdir(parents=True)
        yield partial
        seal(partial, step)
        if place.exists():
            place.rename(old)
        partial.rename(place)
        _flush(place.parent)
        remove(old)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or disk_fault(error):
            raise _failed(place, error) from error
        raise


def _failed(place: Path, error: BaseException) -> CheckpointError:
    kept = [f.path.name for f in list_checkpoints(place.parent) if find_damage(f.path, contents=False) is None]
    return CheckpointError(
        disk_fault(error) or f"cannot write {place.name}: {error}",
        where=str(place),
        why="earlier checkpoints are whole: " + ", ".join(kept) if kept else "no checkpoint was written before",
        fix="make room (checkpoint.keep=1 needs less) and start the same command again: it goes on from the newest one",
    )


def remove(folder: Path) -> None:
    """Delete a folder so that a kill on the way never leaves something that looks whole."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def prune(run_dir: Path, keep: int, *, latest: int, spare: int | None) -> None:
    """Keep the newest `keep` checkpoints up to the one just written, of step `latest`, and the one of step `spare`.

    One of a later step is torn: this run passed over it and went on from an earlier one. It must not take the place
    of a whole one.
    """
    kept = [f.step for f in list_checkpoints(run_dir) if f.step <= latest][:keep]
    for found in list_checkpoints(run_dir):
        if found.step not in kept and found.step != spare:
            remove(found.path)


def sweep(run_dir: Path) -> None:
    """Clear hidden rests of writes that a kill cut off; put back a folder that was being replaced."""
    for rest in run_dir.glob(".*.old"):
        place = run_dir / rest.name[1:-4]
        if not place.exists() and find_damage(rest) is None:
            rest.rename(place)
    for rest in (*run_dir.glob(".*.partial"), *run_dir.glob(".*.old")):
        if rest.is_dir():
            remove(rest)
        else:
            rest.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never half of one; a full disk leaves the old one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """The same for a value as JSON."""
    write_text(path, json.dumps(value, indent=1))

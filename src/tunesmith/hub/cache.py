"""What the caches hold: the Hub's (models, data sets) and the folders made from .gguf files. List it, remove from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from tunesmith.hub.gguf import cache_folder


@dataclass(frozen=True)
class CachedItem:
    """One thing in a cache. `kind` is model, dataset or converted; size in bytes; used: seconds since the epoch."""

    name: str
    kind: str
    size: int
    used: float
    folder: Path


def cached_items() -> list[CachedItem]:
    """Everything in the caches, the largest first; parts of unfinished downloads counted."""
    found = []
    try:
        for repo in scan_cache_dir().repos:
            if repo.repo_type in ("model", "dataset"):
                found.append(
                    CachedItem(repo.repo_id, repo.repo_type, _size(repo.repo_path), repo.last_accessed, repo.repo_path)
                )
    except CacheNotFound:
        pass
    known = {item.folder for item in found}
    hub = Path(constants.HF_HUB_CACHE)
    for folder in hub.glob("*s--*") if hub.is_dir() else ():  # begun, but without a whole file yet
        kind, _, name = folder.name.partition("s--")
        if folder not in known and kind in ("model", "dataset") and folder.is_dir():
            found.append(CachedItem(name.replace("--", "/"), kind, _size(folder), folder.stat().st_mtime, folder))
    made = cache_folder()
    for folder in sorted(made.iterdir()) if made.is_dir() else ():
        if folder.is_dir():
            found.append(CachedItem(folder.name, "converted", _size(folder), folder.stat().st_mtime, folder))
    return sorted(found, key=lambda item: -item.size)


def _size(folder: Path) -> int:
    """Bytes of the files under a folder; links are not followed, so that a blob counts once."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def remove(item: CachedItem) -> None:
    """Delete it from the disk, with its locks and parts.

    A repository's folder in the Hub's cache is whole in itself: its snapshots are links to its own blobs.
    """
    shutil.rmtree(item.folder)
    shutil.rmtree(item.folder.parent / ".locks" / item.folder.name, ignore_errors=True)

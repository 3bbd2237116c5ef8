"""What the caches hold: the Hub's (models, data sets) and the folders made from .gguf files. List it, remove from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from tunesmith.host_files import cache_folder


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
    # Not scan_cache_dir: it leaves out a repository of which no file is complete yet.
    found: list[tuple[Path, str, str]] = []
    for kind in ("model", "dataset"):
        for folder in Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*"):
            found += [(folder, kind, folder.name.removeprefix(f"{kind}s--").replace("--", "/"))]
    found += [(folder, "converted", folder.name) for folder in cache_folder("models").glob("*")]
    items = []
    for folder, kind, name in found:
        if folder.is_dir():
            # Links are not followed, so that a blob counts once.
            files = [p.lstat() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
            used = max((file.st_atime for file in files), default=folder.stat().st_mtime)
            items.append(CachedItem(name, kind, sum(file.st_size for file in files), used, folder))
    return sorted(items, key=lambda item: -item.size)


def remove_cached(item: CachedItem) -> None:
    """Delete it from the disk, with its locks and parts."""
    shutil.rmtree(item.folder)
    shutil.rmtree(item.folder.parent / ".locks" / item.folder.name, ignore_errors=True)

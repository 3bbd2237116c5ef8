"""The token cache on disk: one folder for each tokenised source, named by the hash of all that went into it.

`ids.bin` (int32) and `trained.bin` (bool) hold the tokens of all examples after one another, `offsets.npy` (int64)
cuts them, `rows.npy` (int64) and `cut.npy` (bool) say for each example which row it came from and whether its end was
cut off; `meta.json` has counts and a checksum. The folder is written beside its place and renamed, so it is there as a
whole or not at all; whatever does not fit its checksum is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.batch import Example

log = logging.getLogger(__name__)

_FLUSH = 1 << 20  # tokens held before they are written


@dataclass(frozen=True)
class Arrays:
    """ids: int32 [tokens]; trained: bool [tokens]; offsets: int64 [n + 1]; rows: int64 [n]; cut: bool [n]."""

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    cut: np.ndarray

    def crc32(self) -> int:
        value = 0
        for array in (self.ids, self.trained, self.offsets, self.rows, self.cut):
            value = zlib.crc32(np.ascontiguousarray(array).data, value) if array.size else value
        return value

    def sha256(self) -> str:
        """Of the examples, in hex; where they came from does not enter."""
        total = hashlib.sha256()
        for array in (self.ids, self.trained, self.offsets):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()


def cache_folder() -> Path:
    """`$TUNESMITH_CACHE/tokens`, else `$XDG_CACHE_HOME/tunesmith/tokens`, else `~/.cache/tunesmith/tokens`."""
    own, xdg = os.environ.get("TUNESMITH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else Path(xdg or Path.home() / ".cache") / "tunesmith"
    return base.expanduser() / "tokens"


class Store:
    """Examples as they come: into two files of a folder, or into memory where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._held = 0
        self._offsets: list[int] = [0]
        self._rows: list[int] = []
        self._cut: list[bool] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, example: Example, row: int, cut: bool) -> None:
        self._ids.append(np.asarray(example.ids, np.int32))
        self._trained.append(np.asarray(example.trained, np.bool_))
        self._held += len(example.ids)
        self._offsets.append(self._offsets[-1] + len(example.ids))
        self._rows.append(row)
        self._cut.append(cut)
        if self._folder is not None and self._held >= _FLUSH:
            self._flush(self._folder)

    def _flush(self, folder: Path) -> None:
        for name, held in (("ids.bin", self._ids), ("trained.bin", self._trained)):
            with (folder / name).open("ab") as file:
                for array in held:
                    file.write(array.tobytes())
            held.clear()
        self._held = 0

    def arrays(self) -> Arrays:
        """All that was added."""
        if self._folder is not None:
            self._flush(self._folder)
            ids, trained = _mapped(self._folder / "ids.bin", np.int32), _mapped(self._folder / "trained.bin", np.bool_)
        else:
            ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
            trained = np.concatenate([np.zeros(0, np.bool_), *self._trained])
        index = (np.asarray(self._offsets, np.int64), np.asarray(self._rows, np.int64), np.asarray(self._cut, np.bool_))
        return Arrays(ids, trained, *index)


def _mapped(path: Path, dtype: type) -> np.ndarray:
    """A file as an array; numpy cannot map an empty one."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def save(place: Path, key: str, fill: Callable[[Store], tuple[Arrays, dict[str, Any]]]) -> None:
    """Write an entry of the cache; where that cannot be, say so and leave none.

    Args:
        place: the entry's folder.
        key: the hash that names its content.
        fill: adds the examples to the store it is given, and returns its arrays and what else is to be kept (JSON).
    """
    folder = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=place.parent))
        arrays, about = fill(Store(folder))
        for name in ("offsets", "rows", "cut"):
            np.save(folder / f"{name}.npy", arrays.__dict__[name])
        meta = {"key": key, "crc32": arrays.crc32(), "about": about}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if place.exists():  # torn or foreign, else it would have been loaded; or another process was faster
            shutil.rmtree(place, ignore_errors=True)
        folder.rename(place)
    except OSError as error:
        why = error.strerror or str(error)
        log.warning("tokens are kept in memory: the cache %s cannot be written (%s)", place.parent, why)
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def load(place: Path, key: str) -> tuple[Arrays, dict[str, Any]] | None:
    """A whole entry, as `save` was given it; or None: one that is torn, changed or of another kind counts as none."""
    if not place.exists():
        return None
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        index = (np.load(place / f"{name}.npy", allow_pickle=False) for name in ("offsets", "rows", "cut"))
        arrays = Arrays(_mapped(place / "ids.bin", np.int32), _mapped(place / "trained.bin", np.bool_), *index)
        if meta["key"] == key and meta["crc32"] == arrays.crc32():
            return arrays, meta["about"]
        why = "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error)
    log.warning("the token cache %s is damaged and is made again (%s)", place, why)
    return None

"""The token cache on disk: one folder for each tokenised source, named by the hash of all that its tokens depend on.

`ids.bin` (int32) and `trained.bin` (bool) hold the tokens of all examples one after another, `offsets.npy` (int64)
separates them, `rows.npy` (int64) and `cut.npy` (bool) give for each example its row and whether it was cut at seq_len;
`meta.json` has counts and a checksum. The folder is written under another name and renamed, so it is there as a whole
or not at all; an entry that does not match its checksum is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
class TokenArrays:
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
        """Of the examples, in hex; the rows that they came from do not enter."""
        total = hashlib.sha256()
        for array in (self.ids, self.trained, self.offsets):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()


class TokenWriter:
    """Collects examples: in two files of a folder, or in memory where there is none."""

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

    def arrays(self) -> TokenArrays:
        """All that was added."""
        index = (np.asarray(self._offsets, np.int64), np.asarray(self._rows, np.int64), np.asarray(self._cut, np.bool_))
        if self._folder is not None:
            self._flush(self._folder)
            return TokenArrays(*_mapped(self._folder), *index)
        ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
        return TokenArrays(ids, np.concatenate([np.zeros(0, np.bool_), *self._trained]), *index)


def _mapped(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """ids and trained of an entry; numpy cannot map an empty file."""
    files = ((folder / "ids.bin", np.int32), (folder / "trained.bin", np.bool_))
    ids, trained = (
        np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype) for file, dtype in files
    )
    return ids, trained


Made = tuple[TokenArrays, dict[str, Any]]


def cached_tokens(folder: Path, key: str, make: Callable[[TokenWriter], Made]) -> Made:
    """An entry of the cache, made where there is none.

    Args:
        folder: the cache. One that cannot be written costs a warning, and the tokens are made in memory.
        key: the hash that names the entry.
        make: adds the examples to the writer it is given, and returns its arrays and what else to keep (JSON).
    """
    entry = folder / key
    found = _read_entry(entry, key)
    if found is None:
        _write_entry(entry, key, make)
        found = _read_entry(entry, key)
    return make(TokenWriter(None)) if found is None else found


def _write_entry(entry: Path, key: str, make: Callable[[TokenWriter], Made]) -> None:
    folder = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=entry.parent))
        arrays, about = make(TokenWriter(folder))
        for name in ("offsets", "rows", "cut"):
            np.save(folder / f"{name}.npy", vars(arrays)[name])
        meta = {"key": key, "crc32": arrays.crc32(), "about": about}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if entry.exists():  # damaged, else it would have been read; or another process was faster
            shutil.rmtree(entry, ignore_errors=True)
        folder.rename(entry)
    except OSError as error:
        why = error.strerror or str(error)
        log.warning("tokens are kept in memory: the cache %s cannot be written (%s)", entry.parent, why)
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _read_entry(entry: Path, key: str) -> Made | None:
    """A whole entry; None where there is none, or it is torn, changed or of another kind."""
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        index = (np.load(entry / f"{name}.npy", allow_pickle=False) for name in ("offsets", "rows", "cut"))
        arrays = TokenArrays(*_mapped(entry), *index)
        if meta["key"] == key and meta["crc32"] == arrays.crc32():
            return arrays, meta["about"]
        why = "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error)
    log.warning("the token cache %s is damaged and is made again (%s)", entry, why)
    return None

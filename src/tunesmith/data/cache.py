"""The token cache on disk: one folder for each tokenised source, named by the hash of all that its tokens depend on.

`ids.bin` and `trained.bin` hold the tokens of all examples one after another; `offsets.npy`, `rows.npy` and `cut.npy`
the other `TokenArrays`; `meta.json` counts and a checksum. The folder is written under another name and renamed, so it
is there as a whole or not at all; an entry that does not match its checksum is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunesmith.data.batch import Example

log = logging.getLogger(__name__)

_TOKENS: dict[str, type[np.generic]] = {"ids.bin": np.int32, "trained.bin": np.bool_}
_INDEX = ("offsets", "rows", "cut")


class TokenArrays(NamedTuple):
    """The n examples of a source, one after another.

    ids: int32 [tokens]; trained: bool [tokens]; offsets: int64 [n + 1], between examples; rows: int64 [n], the row of
    each; cut: bool [n], whether it was cut at seq_len.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    cut: np.ndarray

    def crc32(self) -> int:
        value = 0
        for values in self:
            value = zlib.crc32(np.ascontiguousarray(values).data, value) if values.size else value
        return value

    def sha256(self) -> str:
        """Of the examples, in hex; the rows that they came from do not enter."""
        total = hashlib.sha256()
        for values in (self.ids, self.trained, self.offsets):
            total.update(np.ascontiguousarray(values).data)
        return total.hexdigest()


class TokenWriter:
    """Collects examples: their tokens in two files of a folder, or in memory where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._files = [(folder / name).open("wb") if folder else io.BytesIO() for name in _TOKENS]
        self._offsets, self._rows, self._cut = array("q", [0]), array("q"), array("b")

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, example: Example, row: int, cut: bool) -> None:
        ids, trained = self._files
        ids.write(np.asarray(example.ids, np.int32).tobytes())
        trained.write(np.asarray(example.trained, np.bool_).tobytes())
        self._offsets.append(self._offsets[-1] + len(example.ids))
        self._rows.append(row)
        self._cut.append(cut)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def arrays(self) -> TokenArrays:
        """All that was added."""
        if self._folder is not None:
            self.close()
            tokens = list(_map_tokens(self._folder))
        else:
            for file in self._files:
                file.seek(0)
            tokens = [np.frombuffer(f.read(), kind) for f, kind in zip(self._files, _TOKENS.values(), strict=True)]
        ids, trained = tokens
        return TokenArrays(
            ids, trained, np.asarray(self._offsets), np.asarray(self._rows), np.asarray(self._cut, np.bool_)
        )


def _map_tokens(folder: Path) -> Iterator[np.ndarray]:
    """ids and trained of an entry; numpy cannot map an empty file."""
    for name, dtype in _TOKENS.items():
        file = folder / name
        yield np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)


Tokenised = tuple[TokenArrays, dict[str, Any]]


def cached_tokens(folder: Path, key: str, make: Callable[[TokenWriter], Tokenised]) -> Tokenised:
    """An entry of the cache, made where there is none.

    Args:
        folder: the cache. One that cannot be written costs a warning, and the tokens are made in memory.
        key: the hash that names the entry.
        make: adds the examples to the writer it is given, and returns its arrays and what else to keep (JSON).
    """
    found = _read_entry(folder / key)
    if found is None:
        _write_entry(folder / key, make)
        found = _read_entry(folder / key)
    return make(TokenWriter(None)) if found is None else found


def _write_entry(entry: Path, make: Callable[[TokenWriter], Tokenised]) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{entry.name[:16]}-", dir=entry.parent) as temporary:
            folder = Path(temporary, "entry")
            folder.mkdir()
            with closing(TokenWriter(folder)) as writer:
                arrays, about = make(writer)
            for name in _INDEX:
                np.save(folder / f"{name}.npy", arrays._asdict()[name])
            meta = {"key": entry.name, "crc32": arrays.crc32(), "about": about}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            if entry.exists():  # damaged, else it would have been read; or another process was faster
                shutil.rmtree(entry, ignore_errors=True)
            folder.rename(entry)
    except OSError as error:
        why = error.strerror or str(error)
        log.warning("tokens are kept in memory: the cache %s cannot be written (%s)", entry.parent, why)


def _read_entry(entry: Path) -> Tokenised | None:
    """A whole entry; None where there is none, or it is torn, changed or of another kind."""
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        index = (np.load(entry / f"{name}.npy", allow_pickle=False) for name in _INDEX)
        arrays = TokenArrays(*_map_tokens(entry), *index)
        if meta["key"] == entry.name and meta["crc32"] == arrays.crc32():
            return arrays, meta["about"]
        why = "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error)
    log.warning("the token cache %s is damaged and is made again (%s)", entry, why)
    return None

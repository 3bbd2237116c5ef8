"""The token cache on disk: one folder for each tokenised source, named by the hash of all that its tokens depend on.

Each of the `TokenArrays` is a file of its values one after another; `meta.json` has counts and a checksum. The folder is
written under another name and renamed, so it is there as a whole or not at all; an entry that does not match its checksum
is made again.
"""

import hashlib
import io
import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunesmith.data.batch import Example
from tunesmith.host_files import remove_abandoned

log = logging.getLogger(__name__)

_DTYPES = {"ids": np.int32, "trained": np.bool_, "offsets": np.int64, "rows": np.int64, "cut": np.bool_}


class TokenArrays(NamedTuple):
    """The n examples of a source, one after another."""

    ids: np.ndarray  # int32 [tokens]
    trained: np.ndarray  # bool [tokens]
    offsets: np.ndarray  # int64 [n + 1], between examples
    rows: np.ndarray  # int64 [n], the row of each
    cut: np.ndarray  # bool [n], whether it was cut at seq_len

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
    """Collects examples: in files of a folder, or in memory where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._rows, self._tokens = folder, 0, 0
        self._files = {name: (folder / f"{name}.bin").open("wb") if folder else io.BytesIO() for name in _DTYPES}
        self._append("offsets", 0)

    def __len__(self) -> int:
        return self._rows

    def add(self, example: Example, row: int, cut: bool) -> None:
        self._rows, self._tokens = self._rows + 1, self._tokens + len(example.ids)
        for name, values in zip(_DTYPES, (example.ids, example.trained, self._tokens, row, cut), strict=True):
            self._append(name, values)

    def _append(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, _DTYPES[name]).tobytes())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def arrays(self) -> TokenArrays:
        """All that was added."""
        if self._folder is not None:
            self.close()
            return _map_arrays(self._folder)
        kept = {name: file.getvalue() for name, file in self._files.items() if isinstance(file, io.BytesIO)}
        return TokenArrays(*(np.frombuffer(kept[name], dtype) for name, dtype in _DTYPES.items()))


def _map_arrays(folder: Path) -> TokenArrays:
    """The arrays of an entry; numpy cannot map an empty file."""
    files = [(folder / f"{name}.bin", dtype) for name, dtype in _DTYPES.items()]
    maps = (np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype) for file, dtype in files)
    return TokenArrays(*map(np.asarray, maps))


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
        remove_abandoned(entry.parent)
        with tempfile.TemporaryDirectory(prefix=f".{entry.name[:16]}-", dir=entry.parent) as temporary:
            folder = Path(temporary, "entry")
            folder.mkdir()
            with closing(TokenWriter(folder)) as writer:
                arrays, about = make(writer)
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
        arrays = _map_arrays(entry)
        if meta["key"] == entry.name and meta["crc32"] == arrays.crc32():
            return arrays, meta["about"]
        why = "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error)
    log.warning("the token cache %s is damaged and is made again (%s)", entry, why)
    return None

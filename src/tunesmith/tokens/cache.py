"""The token cache on disk. Each tokenized source has a folder, named by the hash of its inputs.

The folder has one file with the raw values of each array of `TokenArrays`. `meta.json` has counts
and a checksum. A folder is written under a temporary name and then renamed, so it is always
complete. If a folder does not match its checksum, the source is tokenized again.
"""

import hashlib
import io
import json
import logging
import mmap
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tunesmith.host.files import remove_abandoned
from tunesmith.host.memory import open_uncached
from tunesmith.tokens.text.example import Example

log = logging.getLogger(__name__)

NO_LABEL = -1
READ_BYTES = 1 << 20  # Bytes of an array's file that are read in one step
READ_VALUES = 1 << 24  # Values of a mapped array that are read before their pages are released


class TokenArrays(NamedTuple):
    """Arrays that contain the n examples of a source, one after the other.

    Attributes:
        ids: int32 [tokens].
        trained: bool [tokens].
        offsets: int64 [n + 1], the edges between examples.
        rows: int64 [n], the row of each example.
        truncated: bool [n], whether the example was truncated at seq_len.
        continued: bool [n], True if the document of the example continues in another example, or in
            a row that is not read.
        firsts: int32 [n], number of tokens of a pair's first sequence. 0 if the example has one
            sequence.
        labels: int8 [n], 1 for a good answer, 0 for a bad answer, NO_LABEL if the row has no label.
        digests: int64 [pictures], see `Example.digests`.
        owners: int64 [pictures], the index of the example that contains each picture, in ascending
            order.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    truncated: np.ndarray
    continued: np.ndarray
    firsts: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    owners: np.ndarray

    def part(self, first: int, stop: int) -> "TokenArrays":
        """Return arrays with only the examples `first` to `stop` - 1. Their offsets start at 0."""
        examples = slice(first, stop)
        tokens = slice(*self.offsets[[first, stop]])
        pictures = slice(*np.searchsorted(self.owners, [first, stop]))
        return TokenArrays(
            ids=self.ids[tokens],
            trained=self.trained[tokens],
            offsets=self.offsets[first : stop + 1] - tokens.start,
            rows=self.rows[examples],
            truncated=self.truncated[examples],
            continued=self.continued[examples],
            firsts=self.firsts[examples],
            labels=self.labels[examples],
            digests=self.digests[pictures],
            owners=self.owners[pictures] - first,
        )

    def example(self, i: int) -> Example:
        """Return the i-th example."""
        start, stop = self.offsets[i : i + 2].tolist()
        first = int(self.firsts[i])
        sequences = (first, stop - start - first) if first else ()
        label = None if self.labels[i] == NO_LABEL else bool(self.labels[i])
        digests: tuple[int, ...] = ()
        if len(self.owners):
            pictures = slice(*np.searchsorted(self.owners, [i, i + 1]))
            digests = tuple(self.digests[pictures].tolist())
        return Example(
            self.ids[start:stop], self.trained[start:stop], sequences, label, digests=digests
        )

    def sequence_offsets(self) -> np.ndarray:
        """Return the positions at which sequences begin or end in the concatenated examples, int64.

        Without pairs they equal `offsets`.
        """
        is_pair = self.firsts > 0
        borders = self.offsets[:-1][is_pair] + self.firsts[is_pair]
        return np.sort(np.concatenate([self.offsets, borders]))

    def release(self) -> None:
        """Release the memory pages of mapped files. The next access reads them from disk again.

        Without this call, a pass over a large corpus would fill the memory.
        """
        for values in self:
            _release(values)

    def count_trained(self) -> int:
        """Return the number of supervised tokens."""
        return sum(int(np.count_nonzero(block)) for block in _read_blocks(self.trained))

    def sha256(self) -> str:
        """Return the sha256 (hex) of the examples. The row indices are not hashed."""
        hashed = [self.ids, self.trained, self.offsets]
        # Hash the remaining arrays only if they contain information. Otherwise the digest would
        # differ from digests of older versions, which did not have these arrays.
        if np.any(self.firsts):
            hashed.append(self.firsts)
        if np.any(self.labels != NO_LABEL):
            hashed.append(self.labels)
        if len(self.digests):
            hashed += [self.digests, self.owners]
        digest = hashlib.sha256()
        for values in hashed:
            for block in _read_blocks(values):
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()


# File name and dtype of each array, in the order of `TokenArrays`. Do not change the names, because
# existing caches use them.
_ENTRY_FILES = {
    "ids.bin": "int32",
    "trained.bin": "bool",
    "offsets.bin": "int64",
    "rows.bin": "int64",
    "cut.bin": "bool",
    "continued.bin": "bool",
    "firsts.bin": "int32",
    "labels.bin": "int8",
    "digests.bin": "int64",
    "owners.bin": "int64",
}


class TokenWriter:
    """Writer that adds examples to files in a folder, or keeps them in memory if `folder` is
    None.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._examples = 0
        self._tokens = 0
        self._files: dict[str, BinaryIO] = {}
        for name in _ENTRY_FILES:
            self._files[name] = io.BytesIO() if folder is None else (folder / name).open("wb")
        self._append("offsets.bin", 0)

    def __len__(self) -> int:
        return self._examples

    def add(
        self, example: Example, row: int, truncated: bool = False, *, continued: bool = False
    ) -> None:
        self._tokens += len(example.ids)
        # Values in the order of `_ENTRY_FILES`.
        written = (
            example.ids,
            example.trained,
            self._tokens,
            row,
            truncated,
            continued,
            example.sequences[0] if example.sequences else 0,
            NO_LABEL if example.label is None else example.label,
            example.digests,
            [self._examples] * len(example.digests),
        )
        for name, values in zip(_ENTRY_FILES, written, strict=True):
            self._append(name, values)
        self._examples += 1

    def _append(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, _ENTRY_FILES[name]).tobytes())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def arrays(self) -> TokenArrays:
        """Return all added examples."""
        if self._folder is not None:
            self.close()
            return _map_arrays(self._folder)
        arrays: list[np.ndarray] = []
        for name, file in self._files.items():
            file.seek(0)
            arrays.append(np.frombuffer(file.read(), _ENTRY_FILES[name]))
        return TokenArrays(*arrays)


def _read_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a mapped array in blocks, and release each block afterwards."""
    for start in range(0, len(values), READ_VALUES):
        yield values[start : start + READ_VALUES]
        _release(values)


def _release(values: np.ndarray) -> None:
    base = values.base
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def _map_arrays(folder: Path) -> TokenArrays:
    """Memory-map the arrays of a cache entry."""
    arrays = []
    for name, dtype in _ENTRY_FILES.items():
        file = folder / name
        # An empty file cannot be memory-mapped.
        has_values = file.stat().st_size > 0
        arrays.append(np.asarray(np.memmap(file, dtype, "r")) if has_values else np.zeros(0, dtype))
    return TokenArrays(*arrays)


def _crc32(folder: Path, about: dict[str, Any]) -> int:
    """Compute a checksum of an entry's arrays and of its other values.

    The files are not memory-mapped, to save memory.
    """
    value = zlib.crc32(json.dumps(about).encode())
    for name in _ENTRY_FILES:
        with open_uncached(folder / name) as file:
            while block := file.read(READ_BYTES):
                value = zlib.crc32(block, value)
    return value


# A cache entry: the arrays of a source, and all other values, which can be written as JSON.
TokenEntry = tuple[TokenArrays, dict[str, Any]]


def cached_tokens(
    folder: Path, key: str, make: Callable[[TokenWriter], TokenEntry] | None
) -> TokenEntry:
    """Return an entry of the cache. Create it if it does not exist.

    Args:
        folder: the cache folder. If it is not writable, a warning is logged and the tokens are kept
            in memory.
        key: the hash that names the entry.
        make: function that adds the examples to a writer. It returns the arrays, and the other
            values of the entry (JSON). If `make` is None, LookupError is raised for a missing
            entry.
    """
    path = folder / key
    entry = _read_entry(path)
    if entry is not None:
        return entry
    if make is None:
        raise LookupError("the rows are not in the token cache")
    _write_entry(path, make)
    return _read_entry(path) or make(TokenWriter(None))


def _write_entry(path: Path, make: Callable[[TokenWriter], TokenEntry]) -> None:
    """Write an entry, if the disk allows it. The caller then reads its arrays from the final path,
    because the arrays that `make` returns are mapped to temporary files.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name[:16]}-", dir=path.parent
        ) as temporary:
            folder = Path(temporary, "entry")
            folder.mkdir()
            with closing(TokenWriter(folder)) as writer:
                _, about = make(writer)
            meta = {"key": path.name, "crc32": _crc32(folder, about), "about": about}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            # Remove an existing entry: it is damaged, or another process has created the same entry
            # in the meantime.
            if path.exists():
                shutil.rmtree(path, ignore_errors=True)
            folder.rename(path)
    except OSError as error:
        log.warning(
            "the token cache %s cannot be written (%s); tokens are kept in memory",
            path.parent,
            error.strerror or str(error),
        )


def _read_entry(path: Path) -> TokenEntry | None:
    """Read an entry. Return None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        arrays = _map_arrays(path)
        if meta["key"] == path.name and meta["crc32"] == _crc32(path, meta["about"]):
            return arrays, meta["about"]
        why = "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error)
    log.warning("the token cache %s is damaged and will be rebuilt (%s)", path, why)
    return None

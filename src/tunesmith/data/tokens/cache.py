"""The token cache on disk: one folder for each tokenized source, named by the hash of all that its
tokens depend on.

Each of the `TokenArrays` is a file of its values one after another; `meta.json` has counts and a
checksum. The folder is written under another name and renamed, so it is there as a whole or not at
all; an entry that does not match its checksum is written again.
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

from tunesmith.data.text.example import Example
from tunesmith.host.files import remove_abandoned
from tunesmith.host.memory import open_uncached

log = logging.getLogger(__name__)

NO_LABEL = -1
READ_BYTES = 1 << 20  # of an array's file at once
READ_VALUES = 1 << 24  # of a mapped array, before its pages are released


class TokenArrays(NamedTuple):
    """The n examples of a source, one after another.

    Attributes:
        ids: int32 [tokens].
        trained: bool [tokens].
        offsets: int64 [n + 1], between examples.
        rows: int64 [n], the row of each.
        truncated: bool [n], whether it was cut at seq_len.
        continued: bool [n], whether its document goes on, in another example or a row that is not
            read.
        firsts: int32 [n], tokens of the first sequence of a pair; 0 for an example of one sequence.
        labels: int8 [n], 1 for a good answer, 0 for a bad one, NO_LABEL where the row has none.
        digests: int64 [pictures], see `Example.digests`.
        owners: int64 [pictures], the example of each picture; it rises.
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
        """Examples first to stop - 1; their offsets count from 0."""
        tokens = slice(int(self.offsets[first]), int(self.offsets[stop]))
        offsets = self.offsets[first : stop + 1] - tokens.start
        # From rows to labels.
        of_examples = [values[first:stop] for values in self[3:8]]
        pictures = slice(*np.searchsorted(self.owners, [first, stop]))
        of_pictures = [self.digests[pictures], self.owners[pictures] - first]
        return TokenArrays(
            self.ids[tokens], self.trained[tokens], offsets, *of_examples, *of_pictures
        )

    def example(self, i: int) -> Example:
        """The i-th example."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        first = int(self.firsts[i])
        sequences = (first, span.stop - span.start - first) if first else ()
        label = None if self.labels[i] == NO_LABEL else bool(self.labels[i])
        digests: tuple[int, ...] = ()
        if len(self.owners):
            pictures = slice(*np.searchsorted(self.owners, [i, i + 1]))
            digests = tuple(self.digests[pictures].tolist())
        return Example(self.ids[span], self.trained[span], sequences, label, digests=digests)

    def sequence_offsets(self) -> np.ndarray:
        """int64, between the sequences of all examples: `offsets` where each is one."""
        is_pair = self.firsts > 0
        borders = self.offsets[:-1][is_pair] + self.firsts[is_pair]
        return np.sort(np.concatenate([self.offsets, borders]))

    def release(self) -> None:
        """Take what was read of mapped files out of this process's memory; it is read again when it
        is needed.

        A pass over a large corpus would fill the memory with it.
        """
        for values in self:
            _release(values)

    def count_trained(self) -> int:
        """Tokens that are supervised."""
        return sum(int(np.count_nonzero(block)) for block in _read_blocks(self.trained))

    def sha256(self) -> str:
        """Hash the examples, in hex; the rows that they came from do not enter."""
        digest = hashlib.sha256()
        for values in (self.ids, self.trained, self.offsets):
            for block in _read_blocks(values):
                digest.update(np.ascontiguousarray(block).data)
        # Left out where no example has any, so that such rows keep the digest that they had.
        if np.any(self.firsts):
            digest.update(np.ascontiguousarray(self.firsts).data)
        if np.any(self.labels != NO_LABEL):
            digest.update(np.ascontiguousarray(self.labels).data)
        if len(self.digests):
            digest.update(np.ascontiguousarray(self.digests).data)
            digest.update(np.ascontiguousarray(self.owners).data)
        return digest.hexdigest()


# The files of an entry, in the order of `TokenArrays`. These names are those of entries on disk.
_ENTRY_FILES = {
    "ids.bin": np.int32,
    "trained.bin": np.bool_,
    "offsets.bin": np.int64,
    "rows.bin": np.int64,
    "cut.bin": np.bool_,
    "continued.bin": np.bool_,
    "firsts.bin": np.int32,
    "labels.bin": np.int8,
    "digests.bin": np.int64,
    "owners.bin": np.int64,
}


class TokenWriter:
    """Collects examples: in files of a folder, or in memory where there is none."""

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
        owners = [self._examples] * len(example.digests)
        self._examples += 1
        self._tokens += len(example.ids)
        first = example.sequences[0] if example.sequences else 0
        label = NO_LABEL if example.label is None else example.label
        tokens = (example.ids, example.trained, self._tokens)
        written = (*tokens, row, truncated, continued, first, label, example.digests, owners)
        # In the order of the files.
        for name, values in zip(_ENTRY_FILES, written, strict=True):
            self._append(name, values)

    def _append(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, _ENTRY_FILES[name]).tobytes())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def arrays(self) -> TokenArrays:
        """All that was added."""
        if self._folder is not None:
            self.close()
            return _map_arrays(self._folder)
        arrays: list[np.ndarray] = []
        for name, file in self._files.items():
            file.seek(0)
            arrays.append(np.frombuffer(file.read(), _ENTRY_FILES[name]))
        return TokenArrays(*arrays)


def _read_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """A mapped array, some of it in memory at once."""
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
    """The arrays of an entry, memory-mapped."""
    arrays: list[np.ndarray] = []
    for name, dtype in _ENTRY_FILES.items():
        file = folder / name
        # An empty file cannot be mapped.
        has_values = file.stat().st_size > 0
        arrays.append(np.asarray(np.memmap(file, dtype, "r")) if has_values else np.zeros(0, dtype))
    return TokenArrays(*arrays)


def _crc32(folder: Path) -> int:
    """Checksum the arrays of an entry; it reads them unmapped, so a large one fills no memory."""
    value = 0
    for name in _ENTRY_FILES:
        with open_uncached(folder / name) as file:
            while block := file.read(READ_BYTES):
                value = zlib.crc32(block, value)
    return value


# The arrays of a source, and what else an entry keeps, as JSON values.
TokenEntry = tuple[TokenArrays, dict[str, Any]]


def cached_tokens(
    folder: Path, key: str, make: Callable[[TokenWriter], TokenEntry] | None
) -> TokenEntry:
    """An entry of the cache, a new one where there is none.

    Args:
        folder: the cache. One that cannot be written costs a warning, and the tokens are built in
            memory.
        key: the hash that names the entry.
        make: adds the examples to a writer, and returns its arrays and what else to keep (JSON);
            None: LookupError where there is no entry.
    """
    entry = _read_entry(folder / key)
    if entry is None:
        if make is None:
            raise LookupError("the token cache has no such entry")
        _write_entry(folder / key, make)
        entry = _read_entry(folder / key) or make(TokenWriter(None))
    return entry


def _write_entry(path: Path, make: Callable[[TokenWriter], TokenEntry]) -> None:
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
            meta = {"key": path.name, "crc32": _crc32(folder), "about": about}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            # It is damaged, else it would have been read; or another process was faster.
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
    """A whole entry; None where there is none, or it is torn, changed or of another kind."""
    if not path.exists():
        return None
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        arrays = _map_arrays(path)
        if meta["key"] == path.name and meta["crc32"] == _crc32(path):
            return arrays, meta["about"]
        why = "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error)
    log.warning("the token cache %s is damaged and will be rebuilt (%s)", path, why)
    return None

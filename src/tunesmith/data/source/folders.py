"""Local sources -> tables: a file of rows, a text, or a folder of either.

A folder has documents (text files), or the parts of one data set (files of rows), in the order of
their names. Whatever else is in it is named.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.paths import ROW_SUFFIXES, TEXT_SUFFIXES
from tunesmith.data.source.conversions import conversion
from tunesmith.data.source.files import check_data_file, check_is_file, open_table
from tunesmith.data.source.table import Rows, Table, unreadable_error
from tunesmith.data.source.text_files import NAMES_SHOWN, read_text_files
from tunesmith.errors import DataError
from tunesmith.host.files import from_here
from tunesmith.units import count_of

# Beside the rows that `datasets` saves.
_ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# A text beside files of rows that is about them.
_README_STEM = re.compile(r"(readme|license|licence|changelog|citation|notice)\b.*", re.IGNORECASE)
_SKIPPED_FOLDERS = ("__pycache__",)
# Rows name them: they are no rows themselves.
_PICTURE_SUFFIXES = frozenset(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .jp2 .ppm".split())
# One kind of file under two names.
_SUFFIX_ALIASES = {".ndjson": ".jsonl"}
# Names of folders and words of file names that are a split, as `datasets` reads them.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def open_local(path: Path) -> dict[str, Table]:
    """The splits of a file or folder by name, of most one, `train`; DataError as `open_table`."""
    if not path.is_dir():
        return {"train": open_table(path)}
    content = _look_into(path)
    tables = {}
    for split, files in content.splits().items():
        try:
            if content.is_text:
                table = read_text_files(files)
            else:
                table = _join([open_table(file) for file in files])
        except OSError as error:
            raise unreadable_error(path, error) from error
        if len(table):
            tables[split] = table
    if not tables:
        raise DataError("no file of the folder has any text", where=str(path), fix="add text")
    for split, table in tables.items():
        layout = ", ".join(filter(None, (table.layout, content.layout)))
        skipped = ", ".join(filter(None, (table.skipped, content.skipped)))
        tables[split] = replace(table, layout=layout, skipped=skipped)
    return tables


def check_local(path: Path) -> None:
    """DataError for a file or folder of rows whose names or sizes alone tell that it cannot be
    read."""
    if path.is_dir():
        _look_into(path)
    else:
        check_data_file(path)


def _join(tables: Sequence[Table]) -> Table:
    """The rows of some tables, one after another."""
    rows = Rows("", tables)
    return Table(
        len(rows), rows.__getitem__, rows.where, rows.digest, rows.check_unchanged, rows.layout
    )


class _Content(NamedTuple):
    """The files of a folder that are read.

    Attributes:
        skipped: those that are not, in a clause.
        layout: those that are about them or hidden, in a clause.
    """

    folder: Path
    files: list[Path]
    is_text: bool
    skipped: str
    layout: str

    def splits(self) -> dict[str, list[Path]]:
        """The files of each split; `train` comes first."""
        splits: dict[str, list[Path]] = {"train": []}
        for file in self.files:
            splits.setdefault(self._split(file) or "train", []).append(file)
        # A document may be called after a test, and a folder `dev` may be about developing: texts
        # are in splits if all are, in folders beside each other.
        if self.is_text and not all(map(self._split, self.files)):
            return {"train": self.files}
        return {name: files for name, files in splits.items() if files}

    def _split(self, file: Path) -> str:
        """The split that a file's place names; empty for none."""
        place = file.relative_to(self.folder)
        words = [name.lower() for name in place.parts[:-1]]
        if self.is_text:
            words = words[:1]
        else:
            words += re.split(r"[^a-z]+", place.stem.lower())
        return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def _look_into(folder: Path) -> _Content:
    """Choose the files of a folder to read; DataError if there are none, or both rows and texts."""
    hidden = 0
    about: list[str] = []
    rows: list[Path] = []
    texts: list[Path] = []
    others: list[Path] = []
    for file in _walk(folder):
        if file.name.startswith(".") or file.name in _SKIPPED_FOLDERS:
            hidden += 1
        elif file.name in _ABOUT_ROWS:
            about.append(file.name)
        elif file.suffix.lower() in ROW_SUFFIXES:
            rows.append(file)
        elif file.suffix.lower() in TEXT_SUFFIXES:
            texts.append(file)
        else:
            others.append(file)
    if rows:
        others = [file for file in others if file.suffix.lower() not in _PICTURE_SUFFIXES]
        about += [file.name for file in texts if _README_STEM.fullmatch(file.stem)]
        texts = [file for file in texts if not _README_STEM.fullmatch(file.stem)]
    suffixes = Counter(_SUFFIX_ALIASES.get(s, s) for s in (file.suffix.lower() for file in rows))
    kinds = [f"{count_of(count, f'{suffix} file')}" for suffix, count in suffixes.items()]
    if texts:
        kinds.append(count_of(len(texts), "text file"))
    if len(kinds) > 1:
        raise DataError(
            "the folder has files of different kinds",
            where=str(folder),
            why=" and ".join(kinds),
            fix=f"name one of them, such as source: {(rows or texts)[0]}; or a folder that has one"
            " kind",
        )
    if not kinds:
        raise _nothing_to_read(folder, others)
    for file in rows or texts:
        check_is_file(file)
    if hidden:
        about.append(count_of(hidden, "hidden file"))
    return _Content(
        folder,
        rows or texts,
        is_text=not rows,
        skipped=_name_others(others) if others else "",
        layout=f"skipped: {', '.join(dict.fromkeys(about))}" if about else "",
    )


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted by their path; a hidden folder counts as a file."""
    files = []
    seen = set()
    for name, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()  # a folder that was seen: a link leads to it
            continue
        seen.add(real)
        hidden = [f for f in folders if f.startswith(".") or f in _SKIPPED_FOLDERS]
        # Of a folder and a link to it the first by name is walked, whatever the disk's order.
        folders[:] = sorted(f for f in folders if f not in hidden)
        files += [Path(name, n) for n in (*names, *hidden)]
    return iter(sorted(files, key=lambda file: file.relative_to(folder).as_posix()))


def _name_others(files: Sequence[Path]) -> str:
    """Files that are not read, by their kind, with the command for those that hold text."""
    suffixes = Counter(file.suffix.lower() or file.name for file in files)
    parts = [f"{count:,} {suffix}" for suffix, count in suffixes.most_common(NAMES_SHOWN)]
    if len(suffixes) > NAMES_SHOWN:
        parts.append("others")
    first = next((file for file in files if conversion(file)), None)
    text = f"{', '.join(parts)} (such as {from_here(first or files[0])}"
    if first is not None:
        text += f"; to read it: {conversion(first)}"
    return f"{text})"


def _nothing_to_read(folder: Path, others: Sequence[Path]) -> DataError:
    why = "it is empty"
    fix = f"put files in it that end in {', '.join((*ROW_SUFFIXES, *TEXT_SUFFIXES))}"
    if others:
        why = f"it has {_name_others(others)}"
        first = next((file for file in others if conversion(file)), None)
        if first is not None:
            fix = conversion(first)
        elif any(file.suffix.lower() in _PICTURE_SUFFIXES for file in others):
            fix = "put a file rows.csv beside them, with a header image,question,answer"
    return DataError("the folder has no data file", where=str(folder), why=why, fix=fix)

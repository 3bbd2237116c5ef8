"""Local sources -> tables: a file of rows, a text, or a folder or pattern of either.

A folder has documents (text files), or the parts of one data set (files of rows), in the order of
their names. Whatever else is in it is named.
"""

import glob
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.paths import ROW_SUFFIXES, TEXT_SUFFIXES, is_pattern
from tunesmith.data.source.files import check_data_file, check_is_file, open_table
from tunesmith.data.source.listings import list_files
from tunesmith.data.source.sessions import session_form
from tunesmith.data.source.table import Rows, Table, unreadable_error
from tunesmith.data.source.text_files import read_text_files
from tunesmith.errors import DataError
from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_word
from tunesmith.units import count_of

# Beside the rows that `datasets` saves.
_ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# A text beside files of rows that is about them.
_README_STEM = re.compile(r"(readme|license|licence|changelog|citation|notice)\b.*", re.IGNORECASE)
# Rows name them: they are no rows themselves.
_PICTURE_SUFFIXES = frozenset(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .jp2 .ppm".split())
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


def open_local(path: Path, config: str | None = None) -> dict[str, Table]:
    """Open the splits of a file, a folder or a pattern of files, by their names.

    A file has one split, `train`. Arguments and errors are those of `list_files` and `open_table`.
    """
    if not _has_several(path):
        table = open_table(path)
        return _without_empty({"train": table}, path)
    content = _look_into(path, config)
    tables = {}
    for split, files in content.splits.items():
        try:
            if content.is_text:
                table = read_text_files(files)
            else:
                table = _join([open_table(file) for file in files])
        except OSError as error:
            raise unreadable_error(path, error) from error
        layout = ", ".join(filter(None, (table.layout, content.layout)))
        skipped = ", ".join(filter(None, (table.skipped, content.skipped)))
        tables[split] = replace(table, layout=layout, skipped=skipped)
    return _without_empty(tables, path)


def _without_empty(tables: dict[str, Table], path: Path) -> dict[str, Table]:
    """The splits that have rows; DataError if none has."""
    filled = {split: table for split, table in tables.items() if len(table)}
    if not filled:
        why = (
            "its files have blank lines, a header, or sessions without an answer, and nothing else"
        )
        fix = "add rows or texts to it, or sessions in which the agent answered"
        raise DataError("the source has no rows", where=str(path), why=why, fix=fix)
    return filled


def check_local(path: Path, config: str | None = None) -> None:
    """Raise DataError if the names or sizes of files show that a source cannot be read; arguments
    are those of `open_local`.
    """
    if _has_several(path):
        _look_into(path, config)
    else:
        check_data_file(path)


def _has_several(path: Path) -> bool:
    """Return whether a source is a folder or a pattern, and not a file."""
    return path.is_dir() or is_pattern(str(path))


def _join(tables: Sequence[Table]) -> Table:
    """The rows of some tables, one after another."""
    rows = Rows("", tables)
    return Table(
        len(rows),
        rows.__getitem__,
        rows.where,
        rows.digest,
        rows.check_unchanged,
        rows.layout,
        secrets=rows.secrets,
    )


class _Content(NamedTuple):
    """The files of a folder that are read.

    Attributes:
        splits: the files of each split; `train` comes first.
        skipped: a clause that names the files that are not read.
        layout: a clause about the configuration.
    """

    splits: dict[str, list[Path]]
    is_text: bool
    skipped: str
    layout: str


def _splits_by_name(folder: Path, files: list[Path], *, is_text: bool) -> dict[str, list[Path]]:
    """Return the files of each split, by the names of the files; `train` comes first."""
    names = [_split_of(file.relative_to(folder), is_text=is_text) for file in files]
    # A document may be named after a test, and a folder `dev` may be about development. So texts
    # have splits only if all of them are in folders that are named after splits.
    if is_text and not all(names):
        return {"train": files}
    splits: dict[str, list[Path]] = {"train": []}
    for file, name in zip(files, names, strict=True):
        splits.setdefault(name or "train", []).append(file)
    return splits


def _split_of(place: Path, *, is_text: bool) -> str:
    """Return the split that a file's path names, for texts only by the first folder; or empty."""
    words = [name.lower() for name in place.parts[:-1]]
    if is_text:
        words = words[:1]
    else:
        words += re.split(r"[^a-z]+", place.stem.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def _look_into(folder: Path, config: str | None) -> _Content:
    """Choose the files of a folder to read; DataError if there are none, or both rows and texts."""
    listing = list_files(folder, config)
    rows: list[Path] = []
    texts: list[Path] = []
    others: list[Path] = []
    for file in listing.files:
        if file.name in _ABOUT_ROWS:
            continue
        if file.suffix.lower() in ROW_SUFFIXES:
            rows.append(file)
        elif file.suffix.lower() in TEXT_SUFFIXES:
            texts.append(file)
        else:
            others.append(file)
    if sessions := {file: None for file in rows if session_form(file)}:
        # Agents keep other files next to their sessions.
        others += [file for file in rows + texts if file not in sessions]
        rows, texts = list(sessions), []
    elif rows:
        others = [file for file in others if file.suffix.lower() not in _PICTURE_SUFFIXES]
        texts = [file for file in texts if not _README_STEM.fullmatch(file.stem)]
    _check_one_kind(folder, listing.folder, rows, texts)
    if not rows and not texts:
        raise _nothing_to_read(folder, others)
    for file in rows or texts:
        check_is_file(file)
    splits = listing.splits
    if splits is None:
        splits = _splits_by_name(listing.folder, rows or texts, is_text=not rows)
    read = set(rows or texts)
    splits = {split: [file for file in files if file in read] for split, files in splits.items()}
    return _Content(
        {split: files for split, files in splits.items() if files},
        is_text=not rows,
        skipped=_name_others(others) if others else "",
        layout=listing.layout,
    )


def _check_one_kind(source: Path, parent: Path, rows: list[Path], texts: list[Path]) -> None:
    """Raise DataError if the files are of several kinds."""
    suffixes = Counter(file.suffix.lower().replace(".ndjson", ".jsonl") for file in rows)
    counts = [count_of(count, f"{suffix} file") for suffix, count in suffixes.items()]
    if texts:
        counts.append(count_of(len(texts), "text file"))
    if len(counts) > 1:
        pattern = f"{glob.escape(str(parent))}/**/*{(rows + texts)[0].suffix}"
        raise DataError(
            "the folder has files of different kinds",
            where=str(source),
            why=" and ".join(counts),
            fix=f"choose one kind by a pattern, such as source: {shell_word(pattern)}",
        )


def _name_others(files: Sequence[Path]) -> str:
    """Name files that are not read by their kinds."""
    suffixes = Counter(file.suffix.lower() or file.name for file in files)
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common())
    return f"{kinds} (such as {from_here(files[0])})"


def _nothing_to_read(folder: Path, others: Sequence[Path]) -> DataError:
    what = "the folder has no data file"
    if is_pattern(str(folder)):
        what = "no data file matches the pattern"
    suffixes = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
    return DataError(
        what,
        where=str(folder),
        why=f"it has {_name_others(others)}" if others else "",
        fix=f"put files in it that end in {', '.join(suffixes)}; pictures need a file of rows that"
        " names them, such as rows.csv with the header image,question,answer",
    )

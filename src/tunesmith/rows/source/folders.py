"""Opening of local data sources: a file with rows, a text file, a folder, or a glob pattern.

A folder contains either text files, one document each, or files with the rows of one data set. The
files are read in the order of their names. A warning lists the files that are not read.
"""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from tunesmith.config.paths import (
    PICTURE_SUFFIXES,
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    is_pattern,
    pattern_folder,
)
from tunesmith.config.row_settings import row_fix
from tunesmith.errors import DataError
from tunesmith.host.files import relative_to_cwd
from tunesmith.rows.source.files import check_data_file, check_is_file, open_table
from tunesmith.rows.source.listings import list_files
from tunesmith.rows.source.message_rows import group_messages
from tunesmith.rows.source.session_turns import UNASKED
from tunesmith.rows.source.sessions import session_form, without_shared
from tunesmith.rows.source.table import Rows, Table, unreadable_error
from tunesmith.rows.source.text_files import read_text_files
from tunesmith.units import count_of

# Metadata files that `datasets` saves next to the rows. They are not read.
_METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Names of text files that describe a data set. They are ignored if the folder has files with rows.
_README_STEM = re.compile(r"(readme|license|licence|changelog|citation|notice)\b.*", re.IGNORECASE)
# Name of a folder, or word in a file name -> name of the split. The library `datasets` uses the
# same names.
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


def open_local(
    path: Path, config: str | None = None, *, join_messages: bool = False
) -> dict[str, Table]:
    """Open a file, a folder or a glob pattern, and return its splits by name.

    A single file has one split, `train`.

    Args:
        config: the configuration of the data set, see `list_files`.
        join_messages: whether to join the messages of a conversation, if each row of a file is one
            message, see `group_messages`.

    Raises:
        DataError: the source has no rows or cannot be read, see `list_files` and `open_table`.
    """
    prepare = group_messages if join_messages else replace
    if not _is_folder_or_pattern(path):
        return _drop_empty_splits({"train": prepare(without_shared(open_table(path)))}, path)
    splits, all_skipped, config_layout = _select_files(path, config)
    tables = {}
    for split, files in splits.items():
        try:
            if files[0].suffix.lower() in TEXT_SUFFIXES:
                table = read_text_files(files)
            else:
                opened = [
                    _with_folder_keys(prepare(open_table(file)), file, path) for file in files
                ]
                table = without_shared(_join(opened))
        except OSError as error:
            raise unreadable_error(path, error) from error
        layout = ", ".join(filter(None, (table.layout, config_layout)))
        skipped = ", ".join(filter(None, (table.skipped, all_skipped)))
        tables[split] = replace(table, layout=layout, skipped=skipped)
    return _drop_empty_splits(tables, path)


def _drop_empty_splits(tables: dict[str, Table], path: Path) -> dict[str, Table]:
    """Return the splits that have rows. Raise DataError if all splits are empty."""
    filled = {split: table for split, table in tables.items() if len(table)}
    if not filled:
        why = "the files contain only blank lines, a header, or sessions without an answer"
        fix = "add rows, texts, or sessions with an answer of the agent"
        if any(UNASKED in str((table.layout, table.notes)) for table in tables.values()):
            why = "the sessions have answers but no question: Claude Code's stream-json has none"
            fix = "use the session's own file in ~/.claude/projects, or --replay-user-messages"
        raise DataError("the source has no rows", where=path, why=why, fix=fix)
    return filled


def check_local(path: Path, config: str | None = None) -> None:
    """Raise DataError if the names or sizes of the files show that `open_local` would fail."""
    if _is_folder_or_pattern(path):
        _select_files(path, config)
    else:
        check_data_file(path)


def _is_folder_or_pattern(path: Path) -> bool:
    return path.is_dir() or is_pattern(str(path))


def _join(tables: Sequence[Table]) -> Table:
    """Concatenate the rows of several tables to one table."""
    rows = Rows("", tables)
    return Table(
        len(rows),
        rows.__getitem__,
        rows.where,
        rows.digest,
        rows.check_unchanged,
        rows.layout,
        secrets=rows.secrets,
        histories=[history for table in tables for history in table.histories],
    )


def _with_folder_keys(table: Table, file: Path, source: Path) -> Table:
    """Add the keys of folders such as `lang=en` to the rows, as columns with texts.

    Spark, Polars and Dask write such folders and leave the columns out of the files.
    """
    folder = source if source.is_dir() else pattern_folder(source)
    folders = file.relative_to(folder).parts[:-1] if file.is_relative_to(folder) else ()
    keys: dict[str, object] = {}
    for name in folders:
        key, is_key, value = name.partition("=")
        if is_key and not _split_of_folder(name):
            # Hive's name of a missing value.
            is_missing = value == "__HIVE_DEFAULT_PARTITION__"
            keys[key] = None if is_missing else unquote(value)
    if not keys:
        return table

    def row(i: int) -> object:
        values = table.row(i)
        return {**keys, **values} if isinstance(values, dict) else values

    def fingerprint() -> str:
        return hashlib.sha256(f"{table.fingerprint()} {keys}".encode()).hexdigest()

    return replace(table, row=row, fingerprint=fingerprint)


def _split_of_folder(name: str) -> str:
    """Return the split that the name of a folder means, such as `test` or `split=test`, or ""."""
    key, _, value = name.lower().rpartition("=")
    is_split = not key or key.endswith(("split", "set", "fold", "partition"))
    return SPLIT_NAMES.get(value, "") if is_split else ""


def _splits_by_name(folder: Path, files: list[Path], *, is_text: bool) -> dict[str, list[Path]]:
    """Assign files to splits by the names of the files and folders. `train` is the first split."""
    names = [_split_of(file.relative_to(folder), is_text=is_text) for file in files]
    # Divide text files into splits only if every file is in a folder with the name of a split,
    # because a single folder `dev` can contain documents about development.
    if is_text and not all(names):
        return {"train": files}
    splits: dict[str, list[Path]] = {"train": []}
    for file, name in zip(files, names, strict=True):
        splits.setdefault(name or "train", []).append(file)
    return splits


def _split_of(place: Path, *, is_text: bool) -> str:
    """Return the split that a relative path names, or "" if it names no split.

    For text files, only the first folder is examined, because the name of a document can contain
    "test". For other files, all folders and the words of the file name are examined.
    """
    folders = place.parts[:-1]
    if is_text:
        folders = folders[:1]
    words = [] if is_text else re.split(r"[^a-z]+", place.stem.lower())
    splits = [*map(_split_of_folder, folders), *(SPLIT_NAMES.get(word, "") for word in words)]
    return next(filter(None, splits), "")


def _select_files(folder: Path, config: str | None) -> tuple[dict[str, list[Path]], str, str]:
    """Select the data files of a folder that are read, and assign them to splits.

    Return the files of each split (`train` comes first), and two texts for the user, which can be
    empty: the files that are not read, and the configuration that is read. Raise DataError if the
    folder has no data files, or files of different kinds.
    """
    listing = list_files(folder, config)
    rows = []
    texts = []
    others = []
    for file in listing.files:
        if file.name in _METADATA_FILES:
            continue
        if file.suffix.lower() in ROW_SUFFIXES:
            rows.append(file)
        elif file.suffix.lower() in TEXT_SUFFIXES:
            texts.append(file)
        else:
            others.append(file)
    sessions = dict.fromkeys(file for file in rows if session_form(file))
    if sessions:
        # If the folder has agent sessions, ignore all other files, because agents store logs next
        # to the sessions.
        others += [file for file in rows + texts if file not in sessions]
        rows = list(sessions)
        texts = []
    elif rows:
        # Rows can refer to pictures.
        others = [file for file in others if file.suffix.lower() not in PICTURE_SUFFIXES]
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
    read_splits = {}
    for split, files in splits.items():
        if own_files := [file for file in files if file in read]:
            read_splits[split] = own_files
    return read_splits, _name_others(others), listing.layout


def _check_one_kind(source: Path, parent: Path, rows: list[Path], texts: list[Path]) -> None:
    """Raise DataError if the data files have more than one type."""
    suffixes = Counter(file.suffix.lower().replace(".ndjson", ".jsonl") for file in rows)
    counts = [count_of(count, f"{suffix} file") for suffix, count in suffixes.items()]
    if texts:
        counts.append(count_of(len(texts), "text file"))
    if len(counts) > 1:
        pattern = f"{glob.escape(str(parent))}/**/*{(rows + texts)[0].suffix}"
        raise DataError(
            "the folder has files of different kinds",
            where=source,
            why=" and ".join(counts),
            fix=f"select one kind with a pattern, such as {row_fix(str(source), source=pattern)}",
        )


def _name_others(files: Sequence[Path]) -> str:
    """Return text with the number of unread files for each suffix, and the path of the first file.

    Return "" if there are no files.
    """
    if not files:
        return ""
    suffixes = Counter(file.suffix.lower() or file.name for file in files)
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common())
    return f"{kinds} (such as {relative_to_cwd(files[0])})"


def _nothing_to_read(folder: Path, others: Sequence[Path]) -> DataError:
    what = "the folder has no data file"
    if is_pattern(str(folder)):
        what = "no data file matches the pattern"
    suffixes = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
    return DataError(
        what,
        where=folder,
        why=f"found {_name_others(others)}" if others else "",
        fix=f"add files that end in {', '.join(suffixes)}; for pictures, add a file with rows that"
        " name them, such as rows.csv with the header image,question,answer",
    )

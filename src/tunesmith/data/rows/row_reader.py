"""Reader of a row that returns the values of its columns in the expected type.

If a value has another type, an error with the column and the location of the row is raised. The
reader also records which columns are not read, so that they can be reported to the user.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tunesmith.config.names import nearest
from tunesmith.config.row_formats import READ_BY_ANY_NAME, ROW_FORMATS, ChatColumn, FormatName
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.data.rows.samples import Picture
from tunesmith.data.source.csv_files import propose_header
from tunesmith.data.source.table import MAX_ROW_BYTES, Place, json_type
from tunesmith.errors import DataError

# Start of a list or dict as `repr` prints it. pandas writes such text into CSV files.
_PYTHON_REPR = re.compile(r"\s*+(?:\[?array\()?\s*+[\[{][\s\[{]*+'")
# Start of the JSON text of one message or a list of messages. This text can itself be encoded as a
# JSON string.
_CHAT_TEXT = re.compile(
    r"""\s*+"?\s*+(\[?)\s*+\{\s*+\\?["'](?:role|from|content|value)\\?["']\s*:"""
)
_ROLE_KEY = re.compile(r"""["'](role|from)\\?["']\s*:""")
# Keys that contain the content of a turn. An object that has a role but none of these keys is not a
# turn.
_TURN_KEYS = frozenset(("content", "value", "tool_calls", "function_call"))
# Number of characters in which `role_key_of` searches for the first role.
_MAX_SEARCHED_CHARS = 100_000
# Minimum similarity (see `nearest`) between a mistyped column name and the right name. The value is
# so high because "redacted" and "selected" must not match "rejected".
MIN_NAME_SIMILARITY = 0.76
# Names of columns with ids or metadata of rows. They do not change what the model learns, so they
# are not reported as unread.
HARMLESS_COLUMNS = frozenset(
    """
    id _id ids uuid uid guid idx index row row_id rowid hash md5 sha256 __index_level_0__
    prompt_id conversation_id conversation_hash session_id user_id thread_id message_id
    name title source dataset dataset_name data_source subset split url link
    file filename file_name path timestamp time date created created_at updated_at version
    language lang category topic domain subject task task_type type difficulty level tags keywords
    model model_name generator author license
    tokens token_count num_tokens length num_turns turns_count
    parallel_tool_calls text schema_version
    """.split()
)


def is_harmless(column: str) -> bool:
    """Return whether the column's name, or the last word of the name, is in HARMLESS_COLUMNS."""
    name = plain(column)
    last_word = name.rpartition("_")[2]
    return name in HARMLESS_COLUMNS or last_word in HARMLESS_COLUMNS - {"text"}


# Columns that `guess_columns` never takes as a question or an answer.
NO_TEXTS = (HARMLESS_COLUMNS - {"text"}) | {
    name for column in READ_BY_ANY_NAME for name in ROW_FORMATS["messages"].names(column)
}


# Cache the results, because all rows have the same column names. The cache is large, because a wide
# table can have tens of thousands of names.
@lru_cache(maxsize=1 << 17)
def plain(name: object) -> str:
    """Normalize a column name for comparison: lower case, no accents, words joined by `_`.

    Spaces, `?` and `:` at both ends are removed.
    """
    # Form NFKD splits an accented letter into the letter and the accent.
    decomposed = unicodedata.normalize("NFKD", str(name).strip(" \t\r\n?:"))
    text = "".join(char for char in decomposed if not unicodedata.combining(char))
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text)
    return re.sub(r"[\s\-]+", "_", text).lower()


@cache
def _names_in_files(format_name: FormatName, column: str) -> Sequence[str]:
    """Return the column names of a file that are read as the format's column `column`.

    They are used if the recipe does not map the column.
    """
    if column in READ_BY_ANY_NAME:
        return list(dict.fromkeys(ROW_FORMATS[format_name].names(column)))
    return [column]


def is_absent(value: object) -> bool:
    """Return whether a value is null, an empty text, an empty list or an empty object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def from_lists(value: object) -> object:
    """Convert an object of lists, such as {role: [...], content: [...]}, to a list of turns.

    Arrow can store turns in this form. Other values are returned unchanged.
    """
    if not isinstance(value, Mapping):
        return value
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) < len(value):
        return value
    lengths = set(map(len, lists))
    if len(lengths) != 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]


def role_key_of(value: object) -> str:
    """Return the key of the role (`role` or `from`) in a list of turns or its JSON text.

    Return "" if the value is not a list of turns.
    """
    if isinstance(value, str):
        match = _CHAT_TEXT.match(value)
        if match is None:
            return ""
        if not match[1]:
            return ""  # The text is a single message and not a list.
        key = _ROLE_KEY.search(value, 0, _MAX_SEARCHED_CHARS)
        return key[1] if key else ""
    turns = from_lists(value)
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, Mapping):
        return ""
    for key_of_role in ("role", "from"):
        if key_of_role in first:
            return key_of_role
    return ""


def looks_like_list(value: object) -> bool:
    """Return whether a value is a list, or text that starts like a JSON list of objects."""
    if isinstance(value, str):
        text = value.lstrip()
        return text.startswith("[") and text[1:].lstrip().startswith("{")
    return isinstance(value, list)


def _decode_json(text: str) -> object:
    """Decode JSON text. If the result is a text, decode it again: some exports encode twice."""
    value = json.loads(text)
    return json.loads(value) if isinstance(value, str) else value


def guess_columns(
    needed: Mapping[str, Sequence[str]],
    mapped: Mapping[str, str],
    row: Mapping[str, object],
) -> dict[str, str]:
    """Guess which column of the row holds each column of a format.

    The candidates are tried in this order: a column whose name is similar to the name in the
    recipe, a column with a usual name, a column whose name is similar to a usual name, and any
    column with a text. A format's column without a candidate is missing in the result.

    Args:
        needed: the format's column names -> their usual names in files.
        mapped: the format's column names -> the column names in the recipe, which can be mistyped.
        row: an example row. Its values show which columns have texts.

    Returns:
        The format's column names -> the guessed columns of the row.
    """
    free = {plain(column): column for column in row}
    guessed = {}

    def near(name: str) -> str | None:
        return nearest(name, free, cutoff=MIN_NAME_SIMILARITY)

    def near_to_mapped(name: str) -> str | None:
        return near(plain(mapped[name])) if name in mapped else None

    def usual(name: str) -> str | None:
        return next((key for key in free if key in needed[name]), None)

    for find in (near_to_mapped, usual, near):
        for name in needed:
            if name in guessed:
                continue
            key = find(name)
            if key:
                guessed[name] = free.pop(key)
    missing = []
    for name in needed:
        if name not in guessed and not isinstance(needed[name], ChatColumn):
            missing.append(name)
    texts = []
    for name, column in free.items():
        # Do not propose a column of rejected answers if the format trains on all answers.
        is_worse = "rejected" not in needed and is_named_rejected(column)
        if isinstance(row[column], str | None) and name not in NO_TEXTS and not is_worse:
            texts.append(column)
    guessed |= zip(missing, texts, strict=False)
    return {name: guessed[name] for name in needed if name in guessed}


def propose_columns(source: Source, row: Mapping[str, object]) -> dict[str, str]:
    """Propose the columns of a row that the source's format reads.

    Return the format's column names -> the columns of the row, with `...` for a required column
    that no column of the row can be. Return {} if there is nothing to propose for the missing
    columns.
    """
    form = ROW_FORMATS[source.format]
    mapped = {name: own for name, own in source.columns.items() if name in form.columns}
    needed = {name: mapped.get(name, name) for name in form.layouts[0].needed}
    missing = {name: form.names(name) for name, own in needed.items() if own not in row}
    read = {mapped.get(name, name) for name in form.columns}
    free = {name: value for name, value in row.items() if name not in read}
    guessed = guess_columns(missing, mapped, free)
    return {**needed, **mapped, **dict.fromkeys(missing, "..."), **guessed} if guessed else {}


def other_formats(source: Source, row: Mapping[str, object]) -> str:
    """Return the end of a fix that proposes the formats whose columns the row has, or ""."""
    fitting = []
    for format_name, form in ROW_FORMATS.items():
        if row.keys() >= form.layouts[0].needed.keys():
            fitting.append(row_fix(source.source, format=format_name))
    return f", or use {' or '.join(fitting)}" if fitting else ""


def is_named_rejected(column: str) -> bool:
    """Return whether a column's name suggests that it holds the rejected answers of pairs."""
    name = plain(column)
    if "rejected" in name.split("_"):
        return True
    return bool(nearest("rejected", [name], cutoff=MIN_NAME_SIMILARITY))


class RowReader:
    """A row with its column mapping and its location in the file.

    Attributes:
        row: column names and values.
        source: the data source with the format and the column mapping.
        where: file and line of the row, for error messages.
        read: names of the columns that have been read.
        unread: names of the columns, and of keys of turns and calls, that are not read.
        is_good: whether the row labels its answer as good, see `RowSamples`.
        folder: the folder that relative paths in the row start from, see `Place`. For rows that a
            program passes, it is the working directory.
        column_pictures: pictures of the column `images`.
        pictures: pictures of content parts, in order. None represents the next picture of
            `column_pictures`.
        bad_turns: location, key and value of each label that rates a trained turn as bad.
    """

    def __init__(self, row: Mapping[str, object], source: Source, where: str) -> None:
        self.row = row
        self.source = source
        self.where = where
        self.unread: set[str] = set()
        self.is_good: bool | None = None
        self.folder: Path | None = Path()
        if isinstance(where, Place):
            self.folder = where.folder
        self.column_pictures: tuple[Picture, ...] = ()
        self.pictures: list[Picture | None] = []
        self.bad_turns: list[tuple[str, str, object]] = []
        self.read: set[str] = set()

    def error(self, what: str, why: str = "", fix: str = "fix the row", at: str = "") -> DataError:
        where = f"{self.where}, {at}" if at else self.where
        return DataError(what, where=where, why=why, fix=fix)

    def setting(self, **settings: object) -> str:
        """Return settings of the row's source for a fix, in the notation of the user."""
        return row_fix(self.source.source, **settings)

    def optional(self, name: str) -> object:
        """Return the value of the format's column `name`, or None if the row does not have this
        column.

        Raise DataError if several columns of the row can be this column and have different values.
        """
        mapped = self.source.columns
        if name in mapped:
            names = [mapped[name]]
        else:
            # Skip columns that the recipe already maps to another column of the format.
            usual_names = _names_in_files(self.source.format, name)
            names = [column for column in usual_names if column not in mapped.values()]
        self.read.update(names)
        values = {column: self.row[column] for column in names if column in self.row}
        if not values:
            return None
        filled = {column: value for column, value in values.items() if not is_absent(value)}
        first_column, first = next(iter((filled or values).items()))
        if any(value != first for value in filled.values()):
            raise self.error(
                f"the columns {' and '.join(filled)} have different values",
                why=f"each of these columns can be {name}",
                fix="delete one of these columns, or choose "
                + self.setting(columns={**mapped, name: first_column}),
            )
        return first

    def required(self, name: str) -> object:
        column = self.source.columns.get(name, name)
        self.read.add(column)
        if column not in self.row:
            raise self._missing_columns(column)
        if self.row[column] is None:
            raise self.error(
                f"the column {column} is null", fix="fill the column, or delete the row"
            )
        return self.row[column]

    def required_text_or_messages(self, name: str) -> object:
        return self.text_or_messages(self.required(name), name)

    def unread_columns(self) -> dict[str, object]:
        """Return the columns that have not been read, with their values, except empty ones."""
        columns: dict[str, object] = {}
        # Return early, because most rows have no unread columns.
        if self.row.keys() <= self.read:
            return columns
        for column, value in self.row.items():
            if column not in self.read and not is_absent(value):
                columns[column] = value
        return columns

    def _missing_columns(self, column: str) -> DataError:
        """Build the error for a column that the row does not have. Its fix proposes columns."""
        mapped = self.source.columns
        needed = ROW_FORMATS[self.source.format].layouts[0].needed
        absent = [column]
        for name in needed:
            needed_column = mapped.get(name, name)
            if needed_column not in self.row:
                absent.append(needed_column)
        fix = "add the column, or delete the row"
        proposed = propose_columns(self.source, self.row)
        renamed = {name: own for name, own in proposed.items() if name != own}
        if proposed:
            header = propose_header(self.where, self.row)
            fix = f"{header}use {self.setting(columns=renamed or proposed)}"
        fix += other_formats(self.source, self.row)
        columns = ", ".join(map(str, self.row)) or "none"
        return self.error(
            f"there is no column {' or '.join(dict.fromkeys(absent))}",
            why=f"the format {self.source.format} needs such a column; the row has {columns}",
            fix=fix,
        )

    def text(self, value: object, at: str) -> str:
        """Return the value if it is a valid Unicode text. Raise DataError for all other values."""
        if not isinstance(value, str):
            fix = 'write the value in quotes: "..."'
            # In Parquet and Arrow files, all values of a column have one type, so the user cannot
            # put quotes around a single value.
            if Path(self.source.source).suffix in (".parquet", ".arrow"):
                fix = "store this column as text"
            raise self.error(f"{at} is {json_type(value)}, not a text", fix=fix)
        if len(value) > MAX_ROW_BYTES:
            raise self.error(
                f"{at} is a text of {len(value) >> 20} MiB",
                f"a row can have at most {MAX_ROW_BYTES >> 20} MiB",
                "split the text into several rows",
            )
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                f"{at} contains half of a surrogate pair (U+{ord(value[error.start]):04X})",
                why="a lone surrogate is not Unicode text",
                fix="write the complete character, or delete it",
            ) from None
        return value

    def json(self, value: object, at: str) -> object:
        """Decode the value if it is JSON text, as in CSV files and in tool calls.

        Other values are returned unchanged. Raise DataError for a text that is not JSON.
        """
        if not isinstance(value, str):
            return value
        try:
            return _decode_json(value)
        except (ValueError, RecursionError) as error:
            why = str(error)
            fix = "correct the JSON text, or write the value itself instead of JSON text"
            if _PYTHON_REPR.match(value):
                why = "the value is a printed Python list, which pandas writes into CSV files"
                fix = 'df.to_json("rows.jsonl", orient="records", lines=True)   # and use this file'
            raise self.error(f"{at} is not JSON", why, fix) from None

    def list(self, value: object, at: str) -> list[Any]:
        items = from_lists(self.json(value, at))
        if not isinstance(items, list):
            raise self.error(f"{at} is {json_type(items)}, not a list", fix="write a list: [...]")
        return items

    def text_or_messages(self, value: object, at: str) -> object:
        """Return the list of messages if the value is JSON text of messages, as in CSV files.

        Other values are returned unchanged.
        """
        if not isinstance(value, str):
            return value
        match = _CHAT_TEXT.match(value)
        if match is None:
            return value
        if not match[1]:
            # A single JSON object can be ordinary text. Decode it only if it is a complete message.
            try:
                item = _decode_json(value)
            except (ValueError, RecursionError):
                return value
            if isinstance(item, dict):
                for keys in ({"role", "content"}, {"from", "value"}):
                    if item.keys() >= keys:
                        return [item]
            return value
        items = self.json(value, at)
        if not isinstance(items, list):
            return value
        has_texts = not items
        for item in items:
            if not isinstance(item, dict):
                return value
            if "role" not in item and "from" not in item:
                return value
            has_texts = has_texts or not _TURN_KEYS.isdisjoint(item)
        return items if has_texts else value

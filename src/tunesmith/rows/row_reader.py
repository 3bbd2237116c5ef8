"""Reader of a row that returns the values of its columns in the expected type.

If a value has another type, an error with the column and the location of the row is raised. The
reader also records which columns are not read, so that they can be reported to the user.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.config.row_formats import READ_BY_ANY_NAME, ROW_FORMATS, FormatName
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.rows.columns import (
    CHAT_TEXT,
    RowColumns,
    from_lists,
    is_absent,
    is_null_word,
    propose_fix,
)
from tunesmith.rows.samples import Picture
from tunesmith.rows.source.table import MAX_ROW_BYTES, Place, json_type

# Start of a list or dict as `repr` prints it. pandas writes such text into CSV files.
_PYTHON_REPR = re.compile(r"\s*+(?:\[?array\()?\s*+[\[{][\s\[{]*+'")
# Keys that contain the content of a turn. An object that has a role but none of these keys is not a
# turn.
_TURN_KEYS = frozenset(("content", "value", "tool_calls", "function_call"))


@cache
def _names_in_files(format_name: FormatName, column: str) -> Sequence[str]:
    """Return the column names of a file that are read as the format's column `column`.

    They are used if the recipe does not map the column.
    """
    if column in READ_BY_ANY_NAME:
        return list(dict.fromkeys(ROW_FORMATS[format_name].names(column)))
    return [column]


def _decode_json(text: str) -> object:
    """Decode JSON text. If the result is a text, decode it again: some exports encode twice."""
    value = json.loads(text)
    return json.loads(value) if isinstance(value, str) else value


class RowReader:
    """A row with its column mapping and its location in the file.

    Attributes:
        row: column names and values.
        source: the data source with the format and the column mapping.
        where: file and line of the row, for error messages.
        is_trained: whether the row is used for training, see `convert_row`.
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

    def __init__(
        self, row: Mapping[str, object], source: Source, where: str, *, is_trained: bool = True
    ) -> None:
        self.row = row
        self.source = source
        self.where = where
        self.is_trained = is_trained
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
        if ".csv:" in self.where.lower():
            # A cell without a value can be written as a word such as nan.
            values = {own: value for own, value in values.items() if not is_null_word(value)}
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
        """Return the value of the format's column `name`. Raise DataError if there is none.

        If the row is not used for training, a missing answer is an empty text.
        """
        column = self.source.columns.get(name, name)
        self.read.add(column)
        form = ROW_FORMATS[self.source.format]
        can_lack = "" if self.is_trained else form.answer
        if name == can_lack and is_absent(self.row.get(column)):
            return ""
        if column not in self.row:
            needed = [each for each in form.layouts[0].needed if each != can_lack]
            own_names = [self.source.columns.get(each, each) for each in needed]
            absent = dict.fromkeys([column, *(own for own in own_names if own not in self.row)])
            raise self.error(
                f"there is no column {' or '.join(absent)}",
                why=f"the format {self.source.format} needs such a column; the row has "
                + (", ".join(map(str, self.row)) or "none"),
                fix=self.propose_columns("add the column, or delete the row"),
            )
        if self.row[column] is None:
            raise self.error(
                f"the column {column} is null", fix="fill the column, or delete the row"
            )
        return self.row[column]

    def required_text_or_messages(self, name: str) -> object:
        return self.text_or_messages(self.required(name), name)

    def unread_columns(self) -> dict[str, object]:
        """Return the columns that have not been read, with their values, except empty ones."""
        # Return early, because most rows have no unread columns.
        if self.row.keys() <= self.read:
            return {}
        return {
            column: value
            for column, value in self.row.items()
            if column not in self.read and not is_absent(value)
        }

    def change_by_jq(self, change: str) -> str:
        """Return the command that changes all rows of the source, which must be JSON for `jq`."""
        rows = f'if type == "array" then .[] else . end | {change}'
        file = self.source.source
        first = ""
        if not file.endswith((".json", ".jsonl", ".ndjson")):
            file = "rows.jsonl"
            first = "write the rows as JSON (`frame.to_json('rows.jsonl', orient='records',"
            first += " lines=True)` in pandas), then run "
        return f"{first}jq -c {shell_word(rows)} {shell_path(file)} > new-rows.jsonl"

    def propose_columns(self, otherwise: str) -> str:
        """Return a fix that names the row's columns, see `propose_fix`."""
        return propose_fix(RowColumns([self.row], self.where), self.source, otherwise=otherwise)

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
        match = CHAT_TEXT.match(value)
        if match is None:
            return value
        if not match[1]:
            # A single JSON object can be ordinary text. Decode it only if it is a complete message.
            try:
                item = _decode_json(value)
            except (ValueError, RecursionError):
                return value
            keys = item.keys() if isinstance(item, dict) else set()
            return [item] if keys >= {"role", "content"} or keys >= {"from", "value"} else value
        items = self.json(value, at)
        if not isinstance(items, list):
            return value
        for item in items:
            if not isinstance(item, dict) or item.keys().isdisjoint(("role", "from")):
                return value
        has_texts = any(not _TURN_KEYS.isdisjoint(item) for item in items)
        return items if has_texts or not items else value

"""One row with its columns and place: values of the wanted type, or an error that names both.

What nothing reads is remembered, so that the user is told of it.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tunesmith.config.names import nearest
from tunesmith.config.row_formats import READ_BY_ANY_NAME, ROW_FORMATS, ChatColumn, FormatName
from tunesmith.config.schema import Source
from tunesmith.data.rows.samples import Picture
from tunesmith.data.source.csv_files import propose_header
from tunesmith.data.source.table import MAX_ROW_BYTES, Place, json_type
from tunesmith.errors import DataError

# What Python prints for a list or an object, and pandas writes into a csv file.
_PYTHON_REPR = re.compile(r"\s*+(?:\[?array\()?\s*+[\[{][\s\[{]*+'")
# A text that begins as a list of messages, or as one message; also as JSON text of such a text.
_CHAT_TEXT = re.compile(
    r"""\s*+"?\s*+(\[?)\s*+\{\s*+\\?["'](?:role|from|content|value)\\?["']\s*:"""
)
_ROLE_KEY = re.compile(r"""["'](role|from)\\?["']\s*:""")
# One of them at least is in a list of turns, and not in other objects with a role.
_TURN_KEYS = frozenset(("content", "value", "tool_calls", "function_call"))
# Characters of such a text in which the key of its first role is looked for.
_LOOKED_AT = 100_000
# Minimum similarity of a mistyped name to that of a column, as `nearest` measures it. It is above
# the similarity of redacted or selected to rejected.
MIN_NAME_SIMILARITY = 0.76
# Columns that tell rows apart, or say where they are from: no example is another for them.
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
    """Return whether a column's name, or the last word of it, is one of HARMLESS_COLUMNS."""
    name = plain(column)
    last_word = name.rpartition("_")[2]
    return name in HARMLESS_COLUMNS or last_word in HARMLESS_COLUMNS - {"text"}


# Columns whose texts are neither questions nor answers.
NO_TEXTS = (HARMLESS_COLUMNS - {"text"}) | {
    name for column in READ_BY_ANY_NAME for name in ROW_FORMATS["messages"].names(column)
}


# Cached, because all rows have the same names: tens of thousands in a wide table.
@lru_cache(maxsize=1 << 17)
def plain(name: object) -> str:
    """A column's name in small letters, without accents or a ? at its end, words joined by _."""
    # Accents are characters of their own in this form.
    decomposed = unicodedata.normalize("NFKD", str(name).strip(" \t\r\n?:"))
    text = "".join(char for char in decomposed if not unicodedata.combining(char))
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text)
    return re.sub(r"[\s\-]+", "_", text).lower()


@cache
def _names_in_files(format_name: FormatName, column: str) -> Sequence[str]:
    """The names under which a column of a format is read if the recipe maps it to none."""
    if column in READ_BY_ANY_NAME:
        return list(dict.fromkeys(ROW_FORMATS[format_name].names(column)))
    return [column]


def is_absent(value: object) -> bool:
    """Tell whether a value says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def from_lists(value: object) -> object:
    """Return the turns of an object of lists, as Arrow stores them: {role: [...], content: [...]}.

    Other values are unchanged.
    """
    if not isinstance(value, Mapping):
        return value
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) < len(value) or len(set(map(len, lists))) != 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]


def role_key_of(value: object) -> str:
    """The key of the roles in a list of turns, or in a text that begins as one: `role` or `from`.

    Empty for what is no such list.
    """
    if isinstance(value, str):
        match = _CHAT_TEXT.match(value)
        if match is None or not match[1]:
            return ""
        key = _ROLE_KEY.search(value, 0, _LOOKED_AT)
        return key[1] if key else ""
    turns = from_lists(value)
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, Mapping):
        return ""
    return "role" if "role" in first else "from" if "from" in first else ""


def looks_like_list(value: object) -> bool:
    """Tell whether a value is a list, or a text that begins as one of objects does."""
    if isinstance(value, str):
        text = value.lstrip()
        return text.startswith("[") and text[1:].lstrip().startswith("{")
    return isinstance(value, list)


def _decoded(text: str) -> object:
    """The value of JSON text; exports of exports write JSON text of JSON text."""
    value = json.loads(text)
    return json.loads(value) if isinstance(value, str) else value


def _yaml_text(name: str) -> str:
    """A column's name as a value in a mapping of YAML on one line."""
    if name == "..." or re.fullmatch(r"[A-Za-z_][\w .-]*", name):
        return name
    return json.dumps(name, ensure_ascii=False)


def guess_columns(
    needed: Mapping[str, Sequence[str]],
    meant: Mapping[str, str],
    row: Mapping[str, object],
) -> dict[str, str]:
    """Find the likeliest column for each name that is needed; some may have none.

    A column whose name is near to the one that the recipe has comes first, then one of a usual
    name, then one that is mistyped, then those with a text, in the order of the file.

    Args:
        needed: names of a format -> their usual names in files.
        meant: names of a format -> the columns that the recipe names, of which there is none.
        row: a row, to find the columns with texts.
    """
    free = {plain(column): column for column in row}
    guessed: dict[str, str] = {}

    def near(name: str) -> str | None:
        return nearest(name, free, cutoff=MIN_NAME_SIMILARITY)

    ways: tuple[Callable[[str], str | None], ...] = (
        lambda name: near(plain(meant[name])) if name in meant else None,
        lambda name: next((key for key in free if key in needed[name]), None),
        near,
    )
    for find in ways:
        for name in needed:
            key = None if name in guessed else find(name)
            if key:
                guessed[name] = free.pop(key)
    missing = [
        name for name in needed if name not in guessed and not isinstance(needed[name], ChatColumn)
    ]
    texts = []
    for name, column in free.items():
        # The worse answers are not to be learned.
        is_worse = "rejected" not in needed and is_named_rejected(column)
        if isinstance(row[column], str | None) and name not in NO_TEXTS and not is_worse:
            texts.append(column)
    guessed |= zip(missing, texts, strict=False)
    return {name: guessed[name] for name in needed if name in guessed}


def is_named_rejected(column: str) -> bool:
    """Return whether a column's name says that it holds the worse answers of pairs."""
    name = plain(column)
    return "rejected" in name.split("_") or bool(
        nearest("rejected", [name], cutoff=MIN_NAME_SIMILARITY)
    )


class RowReader:
    """One row with its column mapping and place.

    Attributes:
        read: the columns that have been read.
        unread: names of the columns, and of the keys of turns and calls, that nothing reads.
        is_good: as of `RowSamples`.
        folder: as of `Place`; a program's rows have paths from the working directory.
        column_pictures: those of the column `images`.
        pictures: those of parts of contents, in order; None takes the next one of the column.
        bad_turns: place, key and value of each label that calls a trained turn bad.
    """

    def __init__(self, row: Mapping[str, object], source: Source, where: str) -> None:
        self.row = row
        self.source = source
        self.where = where
        self.unread: set[str] = set()
        self.is_good: bool | None = None
        self.folder = where.folder if isinstance(where, Place) else Path()
        self.column_pictures: tuple[Picture, ...] = ()
        self.pictures: list[Picture | None] = []
        self.bad_turns: list[tuple[str, str, object]] = []
        self.read: set[str] = set()

    def error(self, what: str, why: str = "", fix: str = "fix the row", at: str = "") -> DataError:
        where = f"{self.where}, {at}" if at else self.where
        return DataError(what, where=where, why=why, fix=fix)

    def optional(self, name: str) -> object:
        """The value of one of the format's columns; None where the row has none."""
        mapped = self.source.columns
        names = [mapped[name]] if name in mapped else _names_in_files(self.source.format, name)
        if name not in mapped:
            # A column may serve as another one.
            names = [column for column in names if column not in mapped.values()]
        self.read.update(names)
        values = {column: self.row[column] for column in names if column in self.row}
        filled = {column: value for column, value in values.items() if not is_absent(value)}
        first = next(iter((filled or values).values()), None)
        if any(value != first for value in filled.values()):
            what = f"the columns {' and '.join(filled)} differ"
            fix = f"delete one of them, or choose: columns: {{{name}: {next(iter(filled))}}}"
            raise self.error(what, f"both are read as {name}", fix)
        return first

    def required(self, name: str) -> object:
        column = self.source.columns.get(name, name)
        self.read.add(column)
        if column not in self.row:
            raise self._missing_columns(column)
        if self.row[column] is None:
            raise self.error(f"column {column} is null", fix="fill it, or delete the row")
        return self.row[column]

    def unread_columns(self) -> dict[str, object]:
        """The columns that nothing has read, with their values; null counts as absent."""
        columns: dict[str, object] = {}
        # Of most rows everything is read.
        if self.row.keys() <= self.read:
            return columns
        for column, value in self.row.items():
            if column not in self.read and not is_absent(value):
                columns[column] = value
        return columns

    def _missing_columns(self, column: str) -> DataError:
        """The error for a column that the row does not have."""
        mapped = self.source.columns
        needed = ROW_FORMATS[self.source.format].layouts[0].needed
        missing = [name for name in needed if mapped.get(name, name) not in self.row]
        absent = dict.fromkeys([column, *(mapped.get(name, name) for name in missing)])
        fix = self._propose_columns(missing)
        fitting = []
        for format_name, form in ROW_FORMATS.items():
            if self.row.keys() >= form.layouts[0].needed.keys():
                fitting.append(format_name)
        if fitting:
            fix += f", or format: {' or '.join(fitting)}"
        columns = ", ".join(map(str, self.row)) or "none"
        why = f"format {self.source.format} needs it; the columns are {columns}"
        return self.error(f"there is no column {' or '.join(absent)}", why, fix)

    def _propose_columns(self, missing: Sequence[str]) -> str:
        """Propose a `columns:` line with columns that nothing reads yet."""
        mapped = self.source.columns
        form = ROW_FORMATS[self.source.format]
        read = {mapped.get(name, name) for name in form.columns}
        free = {name: value for name, value in self.row.items() if name not in read}
        guessed = guess_columns({name: form.names(name) for name in missing}, mapped, free)
        if not guessed:
            return "add it to the row, or delete the row"
        names = {**mapped, **dict.fromkeys(missing, "..."), **guessed}
        pairs = [f"{n}: {_yaml_text(column)}" for n, column in names.items() if column != n]
        return f"{propose_header(self.where, self.row)}columns: {{{', '.join(pairs)}}}"

    def text(self, value: object, at: str) -> str:
        """A value that must be text; numbers of a CSV or JSON column are not text."""
        if not isinstance(value, str):
            fix = 'write it in quotes: "..."'
            # The columns of these files have one type each.
            if Path(self.source.source).suffix in (".parquet", ".arrow"):
                fix = "store this column as text"
            raise self.error(f"{at} is {json_type(value)}, not a text", fix=fix)
        if len(value) > MAX_ROW_BYTES:
            what = f"{at} is a text of {len(value) >> 20} MiB"
            limit = f"a row may have {MAX_ROW_BYTES >> 20} MiB"
            raise self.error(what, limit, "split it into several rows")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"{at} contains half of a surrogate pair (U+{ord(value[error.start]):04X})"
            why = "a lone surrogate is not Unicode text"
            raise self.error(what, why, "write the whole character, or delete it") from None
        return value

    def json(self, value: object, at: str) -> object:
        """A value that may be JSON as text, as columns of a CSV file and old tool calls are."""
        if not isinstance(value, str):
            return value
        try:
            return _decoded(value)
        except (ValueError, RecursionError) as error:
            why = str(error)
            fix = "fix the text, or write the value itself"
            if _PYTHON_REPR.match(value):
                why = "it is written as Python prints a list, which pandas does in csv files"
                fix = 'df.to_json("rows.jsonl", orient="records", lines=True)   # and name that'
            raise self.error(f"{at} is not JSON", why, fix) from None

    def list(self, value: object, at: str) -> list[Any]:
        items = from_lists(self.json(value, at))
        if not isinstance(items, list):
            raise self.error(f"{at} is {json_type(items)}, not a list", fix="write a list: [...]")
        return items

    def text_or_messages(self, value: object, at: str) -> object:
        """The value; of JSON text of messages, as a csv file has them, the list of these."""
        if not isinstance(value, str):
            return value
        match = _CHAT_TEXT.match(value)
        if match is None:
            return value
        if not match[1]:
            # One object may be a text about JSON: only a whole message is read as one.
            try:
                item = _decoded(value)
            except (ValueError, RecursionError):
                return value
            keys = item.keys() if isinstance(item, dict) else set()
            return [item] if keys >= {"role", "content"} or keys >= {"from", "value"} else value
        items = self.json(value, at)
        if not isinstance(items, list):
            return value
        are_turns = all(
            isinstance(item, dict) and ("role" in item or "from" in item) for item in items
        )
        has_texts = are_turns and any(not _TURN_KEYS.isdisjoint(item) for item in items)
        return items if has_texts or not items else value

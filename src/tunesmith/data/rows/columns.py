"""Columns of a data file: the formats that can read them, and the columns that errors propose.

A layout is a `Source` with a format and the columns that it reads. `RowColumns.layouts` yields the
layouts whose columns have usual names in the file. `propose_fix` decides for all commands which
layout an error proposes.
"""

import difflib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.row_formats import (
    READ_BY_ANY_NAME,
    ROW_FORMATS,
    ChatColumn,
    ColumnSet,
    FormatName,
    Names,
)
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.data.source.csv_files import propose_header

# Start of the JSON text of one message or a list of messages. This text can itself be encoded as a
# JSON string.
CHAT_TEXT = re.compile(
    r"""\s*+"?\s*+(\[?)\s*+\{\s*+\\?["'](?:role|from|content|value)\\?["']\s*:"""
)
_ROLE_KEY = re.compile(r"""["'](role|from)\\?["']\s*:""")
# Number of characters in which `role_key_of` searches for the first role.
_MAX_SEARCHED_CHARS = 100_000
# Minimum similarity between a mistyped column name and the right name. The value is
# so high because "redacted" and "selected" must not match "rejected".
_MIN_SIMILARITY = 0.76
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
# Name of a column in a proposal if no column of the file can be guessed.
UNKNOWN = "..."
# Formats whose columns are guessed if the user has named columns of an unknown format. The first
# format that fits is used.
_GUESSED_FORMATS: tuple[FormatName, ...] = ("prompt-completion", *ROW_FORMATS)
# Column names that indicate a chat, even if all lists in the column are empty.
_CHAT_NAMES = frozenset(
    "messages conversations conversation chat chats dialog dialogue turns history_messages".split()
)
# Column names that indicate a class label for text classification.
_CLASS_NAMES = frozenset(
    "label labels label_text label_name class classes class_name sentiment sentiments polarity"
    " emotion emotions intent intents intent_name stance".split()
)
# Columns that are never proposed as a question or an answer.
_NO_TEXTS = (HARMLESS_COLUMNS - {"text"}) | {
    name for column in READ_BY_ANY_NAME for name in ROW_FORMATS["messages"].names(column)
}


def is_harmless(column: str) -> bool:
    """Return whether the column's name, or the last word of the name, is in HARMLESS_COLUMNS."""
    name = plain(column)
    last_word = name.rpartition("_")[2]
    return name in HARMLESS_COLUMNS or last_word in HARMLESS_COLUMNS - {"text"}


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
    if len(lists) < len(value) or len(set(map(len, lists))) != 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]


def role_key_of(value: object) -> str:
    """Return the key of the role (`role` or `from`) in a list of turns or its JSON text.

    Return "" if the value is not a list of turns.
    """
    if isinstance(value, str):
        match = CHAT_TEXT.match(value)
        # Without a bracket, the text is a single message and not a list.
        if match is None or not match[1]:
            return ""
        key = _ROLE_KEY.search(value, 0, _MAX_SEARCHED_CHARS)
        return key[1] if key else ""
    turns = from_lists(value)
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = first if isinstance(first, Mapping) else {}
    return next((key for key in ("role", "from") if key in keys), "")


def looks_like_list(value: object) -> bool:
    """Return whether a value is a list, or text that starts like a JSON list of objects."""
    if isinstance(value, str):
        text = value.lstrip()
        return text.startswith("[") and text[1:].lstrip().startswith("{")
    return isinstance(value, list)


def is_named_rejected(column: str) -> bool:
    """Return whether a column's name suggests that it holds the rejected answers of pairs."""
    name = plain(column)
    return "rejected" in name.split("_") or bool(_similar("rejected", (name,)))


# Cache the results, because all rows have the same column names.
@lru_cache(maxsize=128)
def _similar(word: str, names: tuple[str, ...]) -> list[str]:
    """Return the normalized column names that are similar to a word, the most similar first."""
    return difflib.get_close_matches(plain(word), names, cutoff=_MIN_SIMILARITY)


class RowColumns:
    """The columns of some rows of a file, and the layouts that can read them.

    Attributes:
        values: column -> its values in the rows. A value is None if the row lacks the column.
        header: beginning of a fix that proposes to add a header to a CSV file, or "".
        chats: the columns that contain lists of messages, or JSON text of such lists, grouped by
            the key of the role. A column with a usual chat name is included even if its lists are
            not chats, because the error from reading the column then explains the correct form.
    """

    def __init__(self, rows: Iterable[Mapping[str, object]], where: str) -> None:
        rows = list(rows)
        names = dict.fromkeys(map(str, itertools.chain.from_iterable(rows)))
        self.values = {name: [row.get(name) for row in rows] for name in names}
        self.header = propose_header(where, names)
        self.chats: dict[str, list[str]] = {"role": [], "from": []}
        for column, values in self.values.items():
            role_keys = {role_key_of(value) for value in values} - {""}
            has_chat_name = plain(column) in _CHAT_NAMES
            if not role_keys and has_chat_name and any(map(looks_like_list, values)):
                role_keys = {"role"}
            for role_key in role_keys:
                self.chats[role_key].append(column)

    def layouts(
        self, source: Source, *, any_format: bool = True, is_trained: bool = True
    ) -> list[Source]:
        """Return the layouts whose columns have usual names.

        Args:
            source: its `columns` are used unchanged, and layouts without these columns are omitted.
            any_format: whether to consider all formats. If False, only `source.format` is
                considered. The format prompt is only considered if it is `source.format`, because
                most methods need an answer.
            is_trained: whether the rows are used for training. If True, only the layouts of one
                kind of training are returned. If False, the answer's column is optional, and text
                needs a usual name unless `source.format` is text.
        """
        formats = set(ROW_FORMATS) - {"prompt"} if any_format else set()
        formats.add(source.format)
        column_sets = [
            (name, columns)
            for name in ROW_FORMATS
            if name in formats
            for columns in ROW_FORMATS[name].layouts
        ]
        # Put layouts without optional columns first, because the first of several equal layouts is
        # used.
        column_sets.sort(key=lambda entry: bool(entry[1].optional))
        found = []
        for format_name, column_set in column_sets:
            names = {**column_set.needed, **column_set.optional}
            optional = set(column_set.optional)
            if not is_trained:
                optional.add(ROW_FORMATS[format_name].answer)
            if not source.columns.keys() <= names.keys():
                continue
            candidates: list[list[str | None]] = []
            for name, usual_names in names.items():
                if name in source.columns:
                    candidates.append([source.columns[name]])
                else:
                    no_column = [None] if name in optional else []
                    usual = self._usual_columns(
                        format_name, usual_names, any_text=is_trained or not any_format
                    )
                    candidates.append([*usual, *no_column])
            # Try every combination of candidates, but use each column of the file only once.
            for picked in itertools.product(*candidates):
                columns = {
                    name: column
                    for name, column in zip(names, picked, strict=True)
                    if column is not None
                }
                if len(set(columns.values())) == len(columns):
                    found.append(replace(source, format=format_name, columns=columns))
        return select_training_kind(found) if is_trained else found

    def _usual_columns(
        self, format_name: FormatName, usual_names: tuple[str, ...], *, any_text: bool = True
    ) -> list[str]:
        """Return the columns of the file that can be read as one given column of the format.

        Args:
            usual_names: the usual names of the format's column in files.
            any_text: whether the only column of a file can be plain text, whatever its name is.
        """
        if isinstance(usual_names, ChatColumn):
            chats = dict.fromkeys(name for role_key in usual_names for name in self.chats[role_key])
            needed = ROW_FORMATS["prompt-completion"].layouts[0].needed
            if any(plain(column) in needed["completion"] for column in self.values):
                # Exclude prompt columns: the file has a completion column, so a list of messages in
                # the prompt column is only a prompt, and not an entire chat.
                return [name for name in chats if plain(name) not in needed["prompt"]]
            return list(chats)
        named = [column for column in self.values if plain(column) in usual_names]
        if ROW_FORMATS[format_name].has_turns:
            return named
        if any_text and len(self.values) == 1 and not self.header:
            named = list(self.values)
        no_texts = (*self.chats["role"], *self.chats["from"])
        return [name for name in named if name not in no_texts]

    def proposals(self, source: Source, any_format: bool) -> Iterator[Source]:
        """Yield the layouts that the fix of an error can propose for a source, the best first.

        The source's format is kept if its columns can be guessed. The next layouts are those with
        the most columns of usual names, and last are guesses in the formats prompt-completion and
        text. Columns that cannot be guessed have the name `...`.

        Args:
            any_format: whether the user has chosen no format.
        """
        formats: list[FormatName] = [source.format]
        if any_format:
            formats = [
                name
                for name in _GUESSED_FORMATS
                if source.columns and source.columns.keys() <= set(ROW_FORMATS[name].columns)
            ]
        for name in formats:
            yield from self._guesses(replace(source, format=name))
        key = ROW_FORMATS[source.format].key
        if not any_format and source.columns.get(key, key) in self.values:
            return  # The row has the format's main column, so it is meant for this format.
        # The columns that the user has chosen are not kept for another format.
        unmapped = replace(source, columns={})
        usual = self.layouts(unmapped)
        if any(map(is_named_rejected, self.values)):
            # Without a format for pairs, training would ignore the rejected answers.
            yield from (layout for layout in usual if layout.format == "preference")
            yield from self._guesses(replace(unmapped, format="preference"))
        else:
            yield from sorted(usual, key=lambda layout: -len(layout.columns))
            yield from self._guesses(replace(unmapped, format="prompt-completion"))
            yield from self._guesses(replace(unmapped, format="text"))

    def _guesses(self, source: Source) -> Iterator[Source]:
        """Yield each layout of the source's format with guessed columns."""
        form = ROW_FORMATS[source.format]
        chosen = {name: own for name, own in source.columns.items() if name in form.columns}
        source = replace(source, columns=chosen)
        for column_set in form.layouts:
            guessed = self._guess(source, column_set)
            names = dict.fromkeys([*column_set.needed, *guessed])
            yield replace(source, columns={name: guessed.get(name, UNKNOWN) for name in names})

    def _guess(self, source: Source, column_set: ColumnSet) -> dict[str, str]:
        """Guess the columns of the source's format.

        A column that the user has chosen is kept if it exists. The candidates for the others are
        tried in this order: columns with a name similar to the name that the user has chosen, with
        a usual name, and with a name similar to the format's name, and last columns with texts.
        """
        guessed: dict[str, str] = {}

        def take(name: str, columns: Iterable[str]) -> None:
            free = self.values.keys() - set(guessed.values())
            candidates = [column for column in columns if column in free]
            if candidates and name not in guessed:
                guessed[name] = candidates[0]

        needed, optional = column_set
        for name, column in source.columns.items():
            take(name, [column])
        for name, usual_names in needed.items():
            if name in source.columns:
                take(name, self._similar_columns(source.columns[name], usual_names))
        for name, usual_names in needed.items():
            take(name, [name, *self._usual_columns(source.format, usual_names)])
        for name, usual_names in needed.items():
            take(name, self._similar_columns(name, usual_names))
        for name, usual_names in needed.items():
            # A wrong guess of a chat or of a chosen answer would train on the wrong texts.
            lacks_chosen = "chosen" in needed and "chosen" not in guessed
            if not lacks_chosen and not isinstance(usual_names, ChatColumn):
                take(name, self._columns_with_values(name, optional))
        for name, usual_names in optional.items():
            # A column with the format's own name is read even if it is not named.
            if name not in READ_BY_ANY_NAME and name not in self.values:
                take(name, self._usual_columns(source.format, usual_names))
        return guessed

    def _similar_columns(self, word: str, usual_names: tuple[str, ...]) -> list[str]:
        """Return the columns whose names are similar to a word, the most similar first.

        `usual_names` are the usual names of the format's column in files.
        """
        columns = {
            plain(column): column
            for column, values in self.values.items()
            if not isinstance(usual_names, ChatColumn) or any(map(looks_like_list, values))
        }
        names = _similar(word, tuple(columns))
        if word in ("chosen", "rejected"):
            names = [*names, *(name for name in columns if word in name.split("_"))]
        return [columns[name] for name in names]

    def _columns_with_values(self, name: str, optional: Names) -> list[str]:
        """Return the columns whose values can be the format's column `name`, whatever their names.

        They are columns with texts, or with true and false for a label.
        """
        columns = []
        for column, values in self.values.items():
            given = [value for value in values if value is not None]
            is_fitting = all(isinstance(value, bool if name == "label" else str) for value in given)
            # The value of a single row can be missing.
            has_values = bool(given) or len(values) == 1
            is_metadata = plain(column) in _NO_TEXTS or is_named_rejected(column)
            if is_fitting and has_values and not is_metadata and column not in optional:
                columns.append(column)
        # Prefer a column that is not an optional column of the format, such as `context`.
        usual = set(itertools.chain.from_iterable(optional.values()))
        return sorted(columns, key=lambda column: plain(column) in usual)

    def class_of_text(self, layout: Source) -> str:
        """Return the column with the class of the text that the layout reads, or ""."""
        for column in self.values if layout.format == "text" else ():
            name = plain(column)
            # Compare also the last word of the name, for example `label` in `coarse_label`.
            is_class = not _CLASS_NAMES.isdisjoint((name, name.rpartition("_")[2]))
            if is_class and column != layout.columns["text"]:
                return column
        return ""


def propose_fix(
    columns: RowColumns, source: Source, *, any_format: bool = False, otherwise: str = ""
) -> str:
    """Return the fix of an error about the columns of rows, with the settings that read the rows.

    Args:
        source: the data source with the user's format and columns.
        any_format: whether the user has chosen no format.
        otherwise: another way to fix the error. It is mentioned first if the source's format cannot
            be used.
    """
    # Prefer a layout whose columns are all known. Stop at the first one, because this function is
    # called for each bad row.
    layout = None
    for proposal in columns.proposals(source, any_format):
        layout = layout or proposal
        if UNKNOWN not in proposal.columns.values():
            layout = proposal
            break
    assert layout is not None  # the format of the source is always proposed
    guessed = set(layout.columns.values())
    is_other = any_format or layout.format != source.format
    current = {name: source.columns.get(name, name) for name in layout.columns}
    if not is_other and layout.columns == current:
        return otherwise
    if guessed == {UNKNOWN}:
        return otherwise or "add columns with texts, such as prompt and completion"
    fix = _settings(source, layout, any_format)
    class_column = columns.class_of_text(layout) if is_other else ""
    if UNKNOWN in guessed:
        fix = f"name the columns with {fix}"
    elif class_column:
        pair = {"prompt": layout.columns["text"], "completion": class_column}
        as_answer = replace(source, format="prompt-completion", columns=pair)
        fix = (
            f"use {_settings(source, as_answer, any_format)} to train on the class, written as a"
            f" text, as the answer, or {fix} to train on the text only"
        )
    else:
        fix = f"{columns.header}use {fix}"
    return f"{otherwise}, or {fix}" if otherwise and (is_other or UNKNOWN in guessed) else fix


def _settings(source: Source, layout: Source, any_format: bool) -> str:
    """Return the settings that change the format and the columns of a source to a layout."""
    settings: dict[str, object] = {}
    if not any_format and layout.format != source.format:
        methods = {name: method for method, name in reversed(METHOD_FORMATS.items())}
        method = methods.get(layout.format, "sft")
        if method != methods.get(source.format, "sft"):
            settings["method"] = method
        settings["format"] = layout.format
    is_named = any(name != column for name, column in layout.columns.items())
    if is_named or source.columns or not settings:
        settings["columns"] = layout.columns
    return row_fix(source.source, **settings)


def select_training_kind(layouts: list[Source]) -> list[Source]:
    """Keep only the layouts for one kind of training: pairs, labeled answers, answers or text.

    Pairs come first and labeled answers second, because any other format would train on the bad
    answers, too. The format text comes last, because it can read any column of text, and many data
    sets have an additional column with the complete text of the example.
    """
    for format_name in ("preference", "feedback"):
        matching = [layout for layout in layouts if layout.format == format_name]
        if matching:
            return matching
    return [layout for layout in layouts if layout.format != "text"] or layouts

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
from functools import lru_cache, partial

from tunesmith.config.methods import DEFAULT_METHOD, METHOD_FACTS
from tunesmith.config.row_formats import (
    CHAT_ROLES,
    READ_BY_ANY_NAME,
    ROW_FORMATS,
    ChatColumn,
    ColumnSet,
    FormatName,
)
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.rows.source.csv_files import propose_header

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
# Usual names of questions and of answers. An error never proposes one as the other, or as text.
_QUESTIONS = (
    *ROW_FORMATS["alpaca"].names("instruction"),
    *ROW_FORMATS["alpaca"].names("input"),
    *("passage", "document", "article", "paragraph", "background", "evidence", "source_text"),
)
_ANSWERS = ("chosen", "rejected", *ROW_FORMATS["alpaca"].names("output"))
# Names of the column that says who speaks, if each row is one message. Columns with the names in
# the last group can also be metadata.
SPEAKER = re.compile(r"(\w+_)?(?:role|speaker|sender|from|who|participant|(author|type))(_\w+)?")
# Names of the column with the text, if each row is one message.
MESSAGE_TEXT = re.compile(r"(\w+_)?(content|text|body)|value|message|msg|utterance|comment")
# Two words, or a text in a script that has no spaces between words.
_WORDS = re.compile(
    r"[^\W\d_]{2,}[\W\d_]*\s[\W\d_]*[^\W\d_]{2,}|[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]{6,}"
)
# JSON, the path or the address of a file, or the name of a person.
_NO_WORDS = re.compile(
    r"\s*[\[{]|(?:\w*:|~|\.+)?[/\\]|[^.\n]*\.\w{2,5}$|(?:[A-ZÀ-ÞА-Я][\w'’.-]*\s?){2,4}$"
)
# Words of pandas, Python, SQL and Excel for a missing value.
_NULL_WORDS = ("nan", "none", "null", "n/a", "#n/a", "<na>", "nat")
# Number of characters in which `holds_text` searches for words.
_MAX_WORDS_CHARS = 500


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


def is_answer_name(column: str) -> bool:
    """Return whether a column has a usual name of answers."""
    return plain(column) in _ANSWERS


def is_null_word(value: object) -> bool:
    """Return whether a value is a word that programs write for a missing value."""
    return isinstance(value, str) and value.strip().lower() in _NULL_WORDS


def role_of(speaker: object) -> str:
    """Return the role of a message from the data's word for the speaker, or "" if it is unknown."""
    return CHAT_ROLES.get(str(speaker).strip().lower(), "")


def holds_text(value: object) -> bool:
    """Return whether a value is a text of several words, from which a model can learn."""
    if not isinstance(value, str) or _NO_WORDS.match(value):
        return False
    return _WORDS.search(value, 0, _MAX_WORDS_CHARS) is not None


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
    return "rejected" in name.split("_") or _similarity("rejected", name) > _MIN_SIMILARITY


# Cache the results, because all rows have the same column names.
@lru_cache(maxsize=1 << 10)
def _similarity(word: str, name: str) -> float:
    """Return the similarity of two normalized names, from 0 to 1."""
    return difflib.SequenceMatcher(None, name, word).ratio()


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
        needed, optional = column_set
        guessed: dict[str, str] = {}

        def take(name: str, columns: Iterable[str]) -> None:
            free = [own for own in columns if own in self.values and own not in guessed.values()]
            for column in free[:1]:
                guessed.setdefault(name, column)

        def columns_with_texts(name: str) -> Iterable[str]:
            # A wrong guess of a chat or of a chosen answer would train on the wrong texts.
            lacks_chosen = "chosen" in needed.keys() - guessed.keys()
            return () if lacks_chosen or isinstance(needed[name], ChatColumn) else self.values

        for name, column in source.columns.items():
            take(name, [column])
        for candidates in (
            lambda name: self._similar_columns(source.columns.get(name, "")),
            lambda name: [name, *self._usual_columns(source.format, needed[name])],
            self._similar_columns,
            columns_with_texts,
        ):
            for name, usual_names in needed.items():
                can_be = partial(self._can_be, name, usual_names)
                take(name, filter(can_be, candidates(name)))
        for name, usual_names in optional.items():
            # A column with the format's own name is read even if it is not named.
            if name not in READ_BY_ANY_NAME and name not in self.values:
                take(name, self._usual_columns(source.format, usual_names))
        return guessed

    def _similar_columns(self, word: str) -> list[str]:
        """Return the columns whose names are similar to a word, the most similar first.

        They have a word in common with it, or nearly the same letters.
        """
        words = set(plain(word).split("_"))
        found = []
        for column in self.values:
            name = plain(column)
            shared = len(words.intersection(name.split("_")))
            similarity = _similarity(plain(word), name)
            if shared or similarity > _MIN_SIMILARITY:
                found.append((shared, similarity, column))
        return [column for _, _, column in sorted(found, reverse=True)]

    def _can_be(self, name: str, usual_names: tuple[str, ...], column: str) -> bool:
        """Return whether an error can propose a column as the format's column `name`.

        Ids, numbers, paths, single words and names of people are not proposed as texts.
        """
        own = plain(column)
        values = self.values.get(column, [])
        if own == name or own in usual_names:
            return True
        if isinstance(usual_names, ChatColumn):
            return any(map(looks_like_list, values))
        if own in _QUESTIONS or own in _ANSWERS:
            return name in (_QUESTIONS if own in _QUESTIONS else _ANSWERS)
        if name == "label":
            return all(isinstance(value, bool) for value in values)
        if own in _NO_TEXTS or is_named_rejected(column) != (name == "rejected"):
            return False
        texts = [value for value in values if holds_text(value) or role_key_of(value)]
        return 2 * len(texts) > len(values)

    @property
    def speaker(self) -> str:
        """The column that says who speaks, if each row is one message, or ""."""
        texts = []
        for column, values in self.values.items():
            if not is_harmless(column) and any(map(holds_text, values)):
                texts.append(plain(column))
        # Several texts are rather a question and its answer.
        if len(texts) > 1 and not any(map(MESSAGE_TEXT.fullmatch, texts)):
            return ""
        for column, values in self.values.items():
            match = SPEAKER.fullmatch(plain(column))
            given = [value for value in values if not is_absent(value)]
            if match and given and (not match[2] or all(map(role_of, given))):
                return column
        return ""

    def beside_text(self, layout: Source) -> str:
        """Return a column that the format text would ignore although it is not metadata, or ""."""
        for column, values in self.values.items() if layout.format == "text" else ():
            name = plain(column)
            # Compare also the last word of the name, for example `label` in `coarse_label`.
            is_class = not _CLASS_NAMES.isdisjoint((name, name.rpartition("_")[2]))
            is_question = name in _QUESTIONS or name in _ANSWERS
            has_texts = not is_harmless(column) and any(map(holds_text, values))
            is_needed = is_class or is_question or has_texts or column == self.speaker
            if is_needed and column != layout.columns["text"]:
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
    if columns.speaker and source.format in ("messages", "sharegpt") and not source.columns:
        return (
            'write one row per conversation: {"messages": [{"role": "user", "content": "..."},'
            " ...]}; or one message per row with the columns conversation_id, role and content,"
            " where role is user, assistant, system or tool, and all rows of a conversation have"
            " the same conversation_id"
        )
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
        fix = f"{columns.header}add columns with texts, such as prompt and completion"
        return otherwise or fix
    fix = _settings(source, layout, any_format)
    other = columns.beside_text(layout) if is_other else ""
    if UNKNOWN in guessed:
        fix = f"name the columns with {fix}"
    elif other:
        texts = [layout.columns["text"], other]
        texts.sort(key=lambda column: plain(column) not in _QUESTIONS)
        pair = {"prompt": texts[0], "completion": texts[1]}
        as_answer = replace(source, format="prompt-completion", columns=pair)
        fix = (
            f"use {_settings(source, as_answer, any_format)} to train on {pair['completion']} as"
            f" the answer, or {fix} to train on {layout.columns['text']} only"
        )
    else:
        fix = f"{columns.header}use {fix}"
    return f"{otherwise}, or {fix}" if otherwise and (is_other or UNKNOWN in guessed) else fix


def _settings(source: Source, layout: Source, any_format: bool) -> str:
    """Return the settings that change the format and the columns of a source to a layout."""
    settings: dict[str, object] = {}
    if not any_format and layout.format != source.format:
        methods = {f.row_format: name for name, f in reversed(METHOD_FACTS.items())}
        method = methods.get(layout.format, DEFAULT_METHOD)
        if method != methods.get(source.format, DEFAULT_METHOD):
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

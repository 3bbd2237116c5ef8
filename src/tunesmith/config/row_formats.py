"""The formats of rows: the columns that each needs and may have, by their names in files.

A new format has its entry here, and its reader in data/rows/formats.py; the recipe's schema, the
detection, templates and the commands follow from them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

FormatName = Literal[
    "alpaca", "messages", "sharegpt", "prompt-completion", "text", "preference", "feedback"
]

# Names of columns as `data/rows/detect.py` writes them: in small letters, without accents, words
# joined by underscores.
_QUESTION_NAMES = (
    *("prompt", "question", "query", "input", "problem", "user", "human", "q"),
    *("user_message", "user_input"),
    *("frage", "pregunta", "domanda", "pergunta", "vraag", "fraga", "sporsmal", "pytanie"),
    *("вопрос", "问题", "問題", "質問", "질문", "soru", "سؤال"),
)
_ANSWER_NAMES = (
    *("completion", "answer", "response", "output", "reply", "assistant", "solution", "a"),
    *("assistant_message", "assistant_response", "model_response"),
    *("antwort", "reponse", "respuesta", "risposta", "resposta", "antwoord", "svar", "odpowiedz"),
    *("ответ", "回答", "答案", "답변", "대답", "cevap", "جواب"),
)
_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
# Where the turns are a list, instructions are what OpenAI's and Anthropic's interfaces put first.
_CHAT_SYSTEM_NAMES = (*_SYSTEM_NAMES, "instructions")
_TOOLS_NAMES = ("tools", "functions")
_INPUT_NAMES = ("input", "context")
PICTURE_NAMES = ("images", "image", "image_path", "image_paths", "pictures", "picture")
_LABEL_NAMES = ("label", "kto_tag", "is_desirable", "desirable", "thumbs", "thumbs_up")


class ChatColumn(tuple[str, ...]):
    """A column of any name with lists of objects, or JSON text of them, that have one of these keys
    for who speaks.
    """


_ROLE_CHAT = ChatColumn(("role",))
_FROM_CHAT = ChatColumn(("from",))
_ANY_CHAT = ChatColumn(("role", "from"))

# The format's name of a column -> its names in files.
Names = Mapping[str, tuple[str, ...]]


class ColumnSet(NamedTuple):
    """Columns that rows of a format need, and those that they may have."""

    needed: Names
    optional: Names


class RowFormat(NamedTuple):
    """A format of rows.

    Attributes:
        layouts: the sets of columns that rows may have.
        answer: the column with the answer.
        key: the column that tells the format from others.
        has_turns: False for plain text, which has no place for a system message.
        is_plain: its rows need no chat template.
    """

    layouts: tuple[ColumnSet, ...]
    answer: str
    key: str
    has_turns: bool = True
    is_plain: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that rows may have, those that are needed first."""
        names: dict[str, None] = {}
        for layout in self.layouts:
            names |= dict.fromkeys([*layout.needed, *layout.optional])
        return tuple(names)

    @property
    def answers_in_text(self) -> bool:
        """True where a column of its own holds the answer; False where a list of turns does."""
        names = self.names(self.answer)
        return bool(names) and not isinstance(names, ChatColumn)

    def names(self, column: str) -> tuple[str, ...]:
        """The names that files have for one of these columns."""
        for layout in self.layouts:
            for names in (layout.needed, layout.optional):
                if column in names:
                    return names[column]
        return ()


ROW_FORMATS: dict[FormatName, RowFormat] = {
    "messages": RowFormat(
        (
            ColumnSet(
                {"messages": _ROLE_CHAT},
                {
                    "system": _CHAT_SYSTEM_NAMES,
                    "tools": _TOOLS_NAMES,
                    "images": PICTURE_NAMES,
                },
            ),
        ),
        answer="messages",
        key="messages",
    ),
    "sharegpt": RowFormat(
        (
            ColumnSet(
                {"conversations": _FROM_CHAT},
                {
                    "system": _CHAT_SYSTEM_NAMES,
                    "tools": _TOOLS_NAMES,
                    "images": PICTURE_NAMES,
                },
            ),
        ),
        answer="conversations",
        key="conversations",
    ),
    "alpaca": RowFormat(
        (
            ColumnSet(
                {"instruction": ("instruction", *_QUESTION_NAMES), "output": _ANSWER_NAMES},
                {
                    "input": _INPUT_NAMES,
                    "system": _SYSTEM_NAMES,
                    "history": ("history",),
                    "images": PICTURE_NAMES,
                },
            ),
        ),
        answer="output",
        key="instruction",
    ),
    "prompt-completion": RowFormat(
        (
            ColumnSet({"prompt": _QUESTION_NAMES, "completion": _ANSWER_NAMES}, {}),
            ColumnSet(
                {"prompt": _QUESTION_NAMES, "completion": _ANSWER_NAMES, "images": PICTURE_NAMES},
                {},
            ),
            ColumnSet(
                {"prompt": _QUESTION_NAMES, "completion": _ANSWER_NAMES},
                {"system": _CHAT_SYSTEM_NAMES, "tools": _TOOLS_NAMES, "images": PICTURE_NAMES},
            ),
        ),
        answer="completion",
        key="prompt",
        is_plain=True,
    ),
    "text": RowFormat(
        (ColumnSet({"text": ("text", "content")}, {}),),
        answer="text",
        key="text",
        has_turns=False,
        is_plain=True,
    ),
    "preference": RowFormat(
        (
            ColumnSet(
                {
                    "chosen": ("chosen", "preferred_output"),
                    "rejected": ("rejected", "non_preferred_output"),
                },
                {
                    "prompt": ("prompt", "question", "instruction", "query", "input"),
                    "input": _INPUT_NAMES,
                    "conversations": ("conversations",),
                    "system": _SYSTEM_NAMES,
                    "tools": _TOOLS_NAMES,
                },
            ),
        ),
        answer="messages",
        key="chosen",
    ),
    "feedback": RowFormat(
        (
            ColumnSet(
                {
                    "prompt": (*_QUESTION_NAMES, "instruction"),
                    "completion": _ANSWER_NAMES,
                    "label": _LABEL_NAMES,
                },
                {"input": _INPUT_NAMES, "system": _SYSTEM_NAMES, "tools": _TOOLS_NAMES},
            ),
            ColumnSet(
                {"messages": _ANY_CHAT, "label": _LABEL_NAMES},
                {"system": _CHAT_SYSTEM_NAMES, "tools": _TOOLS_NAMES},
            ),
        ),
        answer="messages",
        key="label",
    ),
}
# The column names of each format; `columns` maps them to those of a file.
FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    name: form.columns for name, form in ROW_FORMATS.items()
}
# Columns that are read by any of their names where `columns` does not map them: rows that have one
# mean it, whether the recipe names it or not.
READ_BY_ANY_NAME = ("system", "tools", "images")

"""The formats of rows: the columns that each needs and may have, by their names in files.

A new format has its entry here, and its reader in data/formats.py; the recipe's schema, the
detection, templates and the commands follow from them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

FormatName = Literal[
    "alpaca", "messages", "sharegpt", "prompt-completion", "text", "preference", "feedback"
]

# Names of columns as `data/detect.py` writes them: in small letters, without accents, words joined
# by underscores.
_QUESTION = (
    *("prompt", "question", "query", "input", "problem", "user", "human", "q"),
    *("user_message", "user_input"),
    *("frage", "pregunta", "domanda", "pergunta", "vraag", "fraga", "sporsmal", "pytanie"),
    *("вопрос", "问题", "問題", "質問", "질문", "soru", "سؤال"),
)
_ANSWER = (
    *("completion", "answer", "response", "output", "reply", "assistant", "solution", "a"),
    *("assistant_message", "assistant_response", "model_response"),
    *("antwort", "reponse", "respuesta", "risposta", "resposta", "antwoord", "svar", "odpowiedz"),
    *("ответ", "回答", "答案", "답변", "대답", "cevap", "جواب"),
)
_SYSTEM = ("system", "system_prompt", "system_message")
# Where the turns are a list, instructions are what OpenAI's and Anthropic's interfaces put first.
_SYSTEM_OF_CHAT = (*_SYSTEM, "instructions")
_TOOLS = ("tools", "functions")
_INPUT = ("input", "context")
_LABEL = ("label", "kto_tag", "is_desirable", "desirable", "thumbs", "thumbs_up")


class ChatColumn(tuple[str, ...]):
    """A column of any name with lists of objects, or JSON text of them, that have one of these keys
    for who speaks.
    """


_ROLES = ChatColumn(("role",))
_FROMS = ChatColumn(("from",))
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

    def names(self, column: str) -> tuple[str, ...]:
        """The names that files have for one of these columns."""
        for layout in self.layouts:
            for names in (layout.needed, layout.optional):
                if column in names:
                    return names[column]
        return ()


ROW_FORMATS: dict[FormatName, RowFormat] = {
    "messages": RowFormat(
        (ColumnSet({"messages": _ROLES}, {"system": _SYSTEM_OF_CHAT, "tools": _TOOLS}),),
        answer="messages",
        key="messages",
    ),
    "sharegpt": RowFormat(
        (ColumnSet({"conversations": _FROMS}, {"system": _SYSTEM_OF_CHAT, "tools": _TOOLS}),),
        answer="conversations",
        key="conversations",
    ),
    "alpaca": RowFormat(
        (
            ColumnSet(
                {"instruction": ("instruction", *_QUESTION), "output": _ANSWER},
                {"input": _INPUT, "system": _SYSTEM, "history": ("history",)},
            ),
        ),
        answer="output",
        key="instruction",
    ),
    "prompt-completion": RowFormat(
        (
            ColumnSet({"prompt": _QUESTION, "completion": _ANSWER}, {}),
            ColumnSet(
                {"prompt": _QUESTION, "completion": _ANSWER},
                {"system": _SYSTEM, "tools": _TOOLS},
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
                {"chosen": ("chosen",), "rejected": ("rejected",)},
                {
                    "prompt": ("prompt", "question", "instruction", "query", "input"),
                    "input": _INPUT,
                    "conversations": ("conversations",),
                    "system": _SYSTEM,
                    "tools": _TOOLS,
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
                    "prompt": (*_QUESTION, "instruction"),
                    "completion": _ANSWER,
                    "label": _LABEL,
                },
                {"input": _INPUT, "system": _SYSTEM, "tools": _TOOLS},
            ),
            ColumnSet(
                {"messages": _ANY_CHAT, "label": _LABEL},
                {"system": _SYSTEM_OF_CHAT, "tools": _TOOLS},
            ),
        ),
        answer="messages",
        key="label",
    ),
}
# The column names of each format; `columns` maps them to those of a file.
COLUMNS: dict[str, tuple[str, ...]] = {name: form.columns for name, form in ROW_FORMATS.items()}
# Columns that are read by any of their names where `columns` does not map them: rows that have one
# mean it, whether the recipe names it or not.
READ_BY_ANY_NAME = ("system", "tools")

"""Table of the row formats: their required and optional columns, and the names of these columns in
data files.

To add a format, add an entry to `ROW_FORMATS` and a reader to rows/formats.py. The schema, the
format detection, the templates and the commands are derived from this table.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

FormatName = Literal[
    "alpaca",
    "messages",
    "sharegpt",
    "prompt-completion",
    "text",
    "preference",
    "feedback",
    "prompt",
]

# Column names after the normalization of `rows/detect.py`: lower case, no accents, words
# joined by underscores.
_QUESTION_NAMES = tuple(
    "prompt question query input problem user human q user_message user_input frage pregunta"
    " domanda pergunta vraag fraga sporsmal pytanie вопрос 问题 問題 質問 질문 soru سؤال".split()
)
_ANSWER_NAMES = tuple(
    "completion answer response output reply assistant solution a assistant_message"
    " assistant_response model_response antwort reponse respuesta risposta resposta antwoord svar"
    " odpowiedz ответ 回答 答案 답변 대답 cevap جواب".split()
)
_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
# Formats with a list of turns also accept "instructions", which is the system message of OpenAI's
# API.
_CHAT_SYSTEM_NAMES = (*_SYSTEM_NAMES, "instructions")
_TOOLS_NAMES = ("tools", "functions")
_INPUT_NAMES = ("input", "context")
PICTURE_NAMES = tuple("images image image_path image_paths pictures picture".split())
_LABEL_NAMES = tuple("label kto_tag is_desirable desirable thumbs thumbs_up".split())


class ChatColumn(tuple[str, ...]):
    """A column whose values are chats. It may have any name in the file.

    Each value is a list of turns, or the JSON text of such a list. A turn is an object. The items
    of this tuple are the possible names of its key for the speaker, such as `role`.
    """


_ROLE_CHAT = ChatColumn(("role",))
_FROM_CHAT = ChatColumn(("from",))
_ANY_CHAT = ChatColumn(("role", "from"))

# Mapping from the name of a column in the row format to its possible names in files.
Names = Mapping[str, tuple[str, ...]]

# Optional columns of formats with a list of turns.
_CHAT_COLUMNS: Names = {"system": _CHAT_SYSTEM_NAMES, "tools": _TOOLS_NAMES}
_PICTURE_CHAT_COLUMNS: Names = {**_CHAT_COLUMNS, "images": PICTURE_NAMES}


class ColumnSet(NamedTuple):
    """Required and optional columns of a row format."""

    needed: Names
    optional: Names


class RowFormat(NamedTuple):
    """A row format of a data set.

    Attributes:
        layouts: the possible sets of columns.
        key: the column that distinguishes this format from the other formats.
        answer: the column that contains only the answer, or "" if the format has no such column.
        has_turns: whether rows consist of turns. False for plain text, which has no system message.
        is_plain: whether rows can be used without a chat template.
    """

    layouts: tuple[ColumnSet, ...]
    key: str
    answer: str = ""
    has_turns: bool = True
    is_plain: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns of the format.

        The required columns of a layout come before its optional columns.
        """
        return tuple(self._names)

    def names(self, column: str) -> tuple[str, ...]:
        """Return the names that a column can have in files, or () if the format does not have the
        column.
        """
        return self._names.get(column, ())

    @property
    def _names(self) -> Names:
        """The names of each column in files. The first layout that has the column determines
        them.
        """
        found: dict[str, tuple[str, ...]] = {}
        for layout in self.layouts:
            for column, names in (*layout.needed.items(), *layout.optional.items()):
                found.setdefault(column, names)
        return found


ROW_FORMATS: dict[FormatName, RowFormat] = {
    "messages": RowFormat(
        (ColumnSet({"messages": _ROLE_CHAT}, _PICTURE_CHAT_COLUMNS),),
        key="messages",
    ),
    "sharegpt": RowFormat(
        (ColumnSet({"conversations": _FROM_CHAT}, _PICTURE_CHAT_COLUMNS),),
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
                _PICTURE_CHAT_COLUMNS,
            ),
        ),
        answer="completion",
        key="prompt",
        is_plain=True,
    ),
    "text": RowFormat(
        (ColumnSet({"text": ("text", "content")}, {}),),
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
                _CHAT_COLUMNS,
            ),
        ),
        key="label",
    ),
    # Rows without an answer, for methods that sample the answers.
    "prompt": RowFormat(
        (
            ColumnSet(
                {"prompt": (*_QUESTION_NAMES, "instruction")},
                _CHAT_COLUMNS,
            ),
            ColumnSet({"prompt": _ANY_CHAT}, _CHAT_COLUMNS),
        ),
        key="prompt",
    ),
}
# Column names of each format. The recipe key `columns` maps these names to the names in the file.
FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    name: form.columns for name, form in ROW_FORMATS.items()
}
# Optional columns. They are found under any of their possible names, even if the recipe's `columns`
# does not list them.
READ_BY_ANY_NAME = ("system", "tools", "images")

# Role of a turn in the data -> role of the message. `call` means that the turn is a message of the
# assistant, and its entire content is a tool call. `_role_by_channel` of rows/messages.py has
# two more roles of this kind: `thought` and `recipient`.
CHAT_ROLES = {
    word: role
    for role, words in {
        "system": "system developer",
        # The words after `prompter` and `bard` are those of chat databases and of support desks.
        "user": "user human prompter customer client visitor caller end-user",
        "assistant": "assistant gpt model chatgpt bot ai bing bard agent operator support advisor"
        " admin",
        "call": "function_call tool_call",
        "tool": "observation tool function_response function_call_output tool_response function"
        " ipython",
    }.items()
    for word in words.split()
}

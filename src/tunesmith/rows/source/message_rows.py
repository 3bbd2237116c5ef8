"""Grouping of rows that are single messages: each conversation becomes one row with messages.

Chat databases and their exports have one message per row. A column such as `role` says who speaks,
and a column such as `conversation_id` says which conversation the message belongs to.
"""

import re
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from tunesmith.errors import DataError
from tunesmith.rows.columns import MESSAGE_TEXT, SPEAKER, is_absent, plain, role_of
from tunesmith.rows.source.table import Row, Rows, Table

# Names of the column that says which conversation a message belongs to.
_CONVERSATION = re.compile(
    r"(\w+_)?(conversation|conv|convo|thread|session|chat|dialog|dialogue|ticket|case|call|room"
    r"|discussion|transcript|tree|episode|trajectory)(_?(id|uuid|key|hash|nr|no|number))?"
)
# Names of the column with the message that a message replies to.
_PARENT = re.compile(r"(parent|reply_to|in_reply_to)(_message)?(_id)?")


def find_conversation_column(columns: Iterable[str]) -> str:
    """Return the column that says which conversation a message belongs to, or ""."""
    return _find_column(columns, _CONVERSATION)


def _find_column(columns: Iterable[str], names: re.Pattern[str]) -> str:
    return next((column for column in columns if names.fullmatch(plain(column))), "")


def group_messages(table: Table) -> Table:
    """Join the messages of each conversation to one row, if all rows of the table are messages.

    The rows of a conversation need not be consecutive. Without a column for the conversation, only
    a JSON array is one conversation. Any other table is returned unchanged.

    Raises:
        DataError: a message cannot be read, has no conversation, or replies to the same message as
            an earlier one.
    """
    rows = Rows("", [table])
    columns: Row = {}
    with suppress(DataError, IndexError):
        columns = rows[0]
    content = _find_column(columns, MESSAGE_TEXT)
    conversation = find_conversation_column(columns)
    if not content or not (conversation or table.is_array):
        return table
    speaker, groups = _find_groups(rows, columns, conversation)
    if not speaker:
        return table

    def row(i: int) -> Row:
        turns = []
        for values in map(rows.__getitem__, groups[i]):
            turn = {"role": values[speaker], "content": values.get(content)}
            for column, value in values.items():
                if column not in (speaker, content, conversation):
                    turn[column] = value
            turns.append(turn)
        return {"messages": turns}

    by = f"grouped by {conversation}" if conversation else "one conversation"
    return replace(
        table,
        size=len(groups),
        row=row,
        where=lambda i: table.where(groups[i][0]),
        layout=", ".join(filter(None, [table.layout, "one message per row", by])),
    )


def _find_groups(
    rows: Rows, columns: Iterable[str], conversation: str
) -> tuple[str, "list[array[int]]"]:
    """Return the column that says who speaks, and the numbers of the rows of each conversation.

    The column is "" if the rows are not messages.

    Args:
        columns: the columns of the first row.
        conversation: the column that names the conversation, or "" if all rows are one.
    """
    # Column that can say who speaks -> the roles in it.
    roles = {column: set[str]() for column in columns if SPEAKER.fullmatch(plain(column))}
    parent = _find_column(columns, _PARENT)
    replies = set()
    # Hash of the name of a conversation -> its rows.
    groups: dict[int, array[int]] = {}
    faults = []
    for i in range(len(rows)):
        try:
            row = rows[i]
        except DataError as error:
            faults.append(error)
            continue
        for column in list(roles):
            roles[column].add(role_of(row.get(column)))
            if "" in roles[column]:
                del roles[column]
        if not roles:
            return "", []
        key = hash(str(row.get(conversation)))
        groups.setdefault(key, array("q")).append(i)
        reply = (key, hash(str(row.get(parent))))
        if conversation and is_absent(row.get(conversation)):
            faults.append(_no_place(f"the message has no {conversation}", rows.where(i)))
        elif reply in replies:
            faults.append(_no_place(f"an earlier message has the same {parent}", rows.where(i)))
        if not is_absent(row.get(parent)):
            replies.add(reply)
    speakers = [column for column, said in roles.items() if {"user", "assistant"} <= said]
    if speakers and faults:
        raise faults[0]
    return "".join(speakers[:1]), list(groups.values())


def _no_place(what: str, where: str) -> DataError:
    return DataError(
        what,
        where=where,
        why="each message belongs to a conversation, and has at most one reply",
        fix='write each conversation as one row: {"messages": [{"role": "user", "content": "..."},'
        " ...]}",
    )

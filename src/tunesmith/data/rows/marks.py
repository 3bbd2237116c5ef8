"""Marks of a turn, or of a row, that say whether an answer is trained on.

A mark that no mask of whole answers can follow (a weight of 0.5, two that differ) is refused.
"""

import json
from collections.abc import Mapping

from tunesmith.data.rows.row_reader import RowReader, plain

# Marks of a turn, or of a row, and whether true means that it is trained on.
_MARKS = {
    **dict.fromkeys(
        """
        train trainable train_on_turn training train_on trained is_trained learn learnable
        supervised loss loss_mask loss_weight compute_loss calculate_loss include_in_loss weight
        """.split(),
        True,
    ),
    **dict.fromkeys(
        "mask masked untrained ignore ignore_loss no_loss no_train exclude_from_loss".split(), False
    ),
}
# Marks of a part of a turn, which no mask of whole answers can follow.
PARTIAL_MARKS = ("train_detail", "training_detail")


def is_trained_turn(row: RowReader, role: str, turn: Mapping[str, object], at: str) -> bool:
    """False where a turn says that it is not trained on: by `train`, OpenAI's `weight`, or others.

    DataError for a mark that no mask of whole answers follows, and where two differ.
    """
    marks: dict[str, bool] = {}
    for key, value in turn.items():
        name = plain(key)
        if value is None:
            continue
        if name in PARTIAL_MARKS and value:
            why = "an answer is trained on as a whole, or not at all"
            raise row.error(f"a turn has {key}", why, f"split the turn, or remove {key}", at)
        if name not in _MARKS:
            continue
        marks[key] = _mark(row, key, value, role, at)
    if len(set(marks.values())) > 1:
        what = f"{' and '.join(marks)} contradict each other"
        raise row.error(what, "one says that the turn is trained on", "remove one of them", at)
    return all(marks.values())


def _mark(row: RowReader, key: str, value: object, role: str, at: str) -> bool:
    """Return whether a mark says that its turn is trained on. Raise DataError if it is unclear."""
    # A mask of numbers is as often that of the trained tokens.
    is_clear = isinstance(value, bool) or (value in (0, 1) and plain(key) != "mask")
    is_trained = bool(value) == _MARKS[plain(key)]
    if not is_clear or (is_trained and role != "assistant"):
        why = (
            "an assistant's turn is trained on (true, or weight 1) or not (false, or 0),"
            " and no other turn is"
        )
        what = f"the message of the {role} has {key}: {value}"
        raise row.error(what, why, f'write "train": true or false, or remove {key}', at)
    return is_trained


def is_mark(column: str) -> bool:
    """Tell whether a column has the name of a mark."""
    return plain(column) in _MARKS


def check_row_marks(row: RowReader) -> None:
    """DataError for a mark of a whole row that training would ignore."""
    for column, as_written in row.unread_columns().items():
        name = plain(column)
        is_weight = name in ("weight", "loss_weight", "sample_weight")
        if not is_weight and not is_mark(column):
            continue
        value = value_of_cell(as_written)
        is_plain_mark = isinstance(value, bool | int | float) and value in (0, 1)
        if is_plain_mark and bool(value) == _MARKS.get(name, True):
            row.read.add(column)
            continue
        if is_plain_mark or is_weight or isinstance(value, list):
            what = f"the row has {column}: {value}"
            why = "a row is trained on as its turns say, and all rows of a source weigh the same"
            fix = (
                f'delete the row, or remove {column}; write "train": false in turns that are'
                " context only; rows in a file of their own may have a source's weight"
            )
            raise row.error(what, why, fix)


def value_of_cell(value: object) -> object:
    """Return the truth value, number or list that a cell of a CSV file holds as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.strip().lower().removeprefix("+"))
    except (ValueError, RecursionError):
        return value

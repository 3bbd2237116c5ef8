"""Reading of loss masks in the data.

A loss mask is a key of a turn or a column of a row, such as `train`, that excludes an answer from
training.

A mask can only include or exclude an entire answer. All other masks raise an error, for example a
weight of 0.5, two keys that contradict each other, or different masks on the parts of an answer.
"""

import json
from collections.abc import Mapping, Sequence

from tunesmith.rows.columns import plain
from tunesmith.rows.row_reader import RowReader

# Name of a loss mask key -> whether the value true includes the answer in training (True) or
# excludes it (False).
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
# Keys that mask a part of a turn. They raise an error, because only entire answers can be masked.
PARTIAL_MARKS = ("train_detail", "training_detail")


def is_trained_turn(
    row: RowReader,
    role: str,
    turn: Mapping[str, object],
    at: str,
    parts: Sequence[Mapping[str, object]] = (),
) -> bool:
    """Return whether a turn is included in training, according to its loss mask keys.

    Args:
        row: the reader of the row, which builds the errors.
        role: the role of the turn.
        turn: the keys of the turn with their values, such as `train` or OpenAI's `weight`.
        at: the position of the turn in the row, such as "message 2".
        parts: the keys of the content parts and of the tool calls, which can have masks, too.

    Raises:
        DataError: the keys mask only a part of the turn, a value is unclear, or two keys
            contradict each other.
    """
    own_mask = _read_mask(row, role, turn, at)
    masks = {_read_mask(row, role, part, at) for part in parts}
    # A part without a mask has the mask of the turn, which is trained by default.
    is_trained = own_mask is not False
    if masks <= {None, is_trained}:
        return is_trained
    # All parts have the other mask, and the turn has no mask.
    if len(masks) == 1 and own_mask is None:
        return not is_trained
    # The messages of the other roles are never trained.
    if role != "assistant":
        return is_trained
    raise row.error(
        "the loss masks of the parts of an answer differ from each other or from the answer's mask",
        why="training on only a part of an answer is not supported",
        fix="write the same mask into all parts, or split the turn",
        at=at,
    )


def _read_mask(row: RowReader, role: str, turn: Mapping[str, object], at: str) -> bool | None:
    """Return the value of the loss mask keys of a turn or a part. Return None if it has none."""
    marks = {}
    for key, value in turn.items():
        name = plain(key)
        if name in PARTIAL_MARKS and value:
            raise row.error(
                f"a turn has the key {key}",
                why="training on only a part of an answer is not supported",
                fix=f"split the turn, or remove {key}",
                at=at,
            )
        if name in _MARKS and value is not None:
            marks[key] = _read_mask_value(row, key, value, role, at)
    if len(set(marks.values())) > 1:
        raise row.error(
            f"the keys {' and '.join(marks)} contradict each other",
            fix="remove the wrong key",
            at=at,
        )
    return next(iter(marks.values()), None)


def _read_mask_value(row: RowReader, key: str, value: object, role: str, at: str) -> bool:
    """Return whether the value of a loss mask key includes the turn in training.

    Raise DataError if the value is unclear, or if it includes a turn that is not an answer.
    """
    # The value of `mask` must be true or false, because the numbers are ambiguous: mask = 1 means
    # "trained" in some data sets and "not trained" in others.
    is_clear = isinstance(value, bool) or (value in (0, 1) and plain(key) != "mask")
    is_trained = bool(value) == _MARKS[plain(key)]
    if not is_clear or (is_trained and role != "assistant"):
        raise row.error(
            f"the message of the {role} has {key}: {value}",
            why="only turns of the assistant can be trained on, and the value must be true or"
            " false, or a weight of 1 or 0",
            fix=f'write "train": true or false, or remove {key}',
            at=at,
        )
    return is_trained


def is_mask_column(column: str) -> bool:
    """Return True if the name of a column or key is the name of a loss mask, such as `train`."""
    return plain(column) in _MARKS


def check_row_mask(row: RowReader) -> None:
    """Raise DataError if a loss mask or a weight of the entire row would have no effect."""
    for column, as_written in row.unread_columns().items():
        name = plain(column)
        is_weight = name in ("weight", "loss_weight", "sample_weight")
        if not is_weight and name not in _MARKS:
            continue
        value = value_of_cell(as_written)
        is_plain_mark = isinstance(value, bool | int | float) and value in (0, 1)
        if is_plain_mark and bool(value) == _MARKS.get(name, True):
            row.read.add(column)
            continue
        if is_plain_mark or is_weight or isinstance(value, list):
            raise row.error(
                f"the row has a loss mask or a weight, {column}: {value}",
                why="loss masks belong to the turns of a row, and all rows of a source have the"
                " same weight",
                fix=f'delete the row, or remove {column}; to mask a turn, write "train": false into'
                " it; to give rows another weight, write them into a separate file and set the"
                " weight of this source",
            )


def value_of_cell(value: object) -> object:
    """Convert the text of a CSV cell to the bool, number or list that it represents.

    Other values are returned unchanged.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.strip().lower().removeprefix("+"))
    except (ValueError, RecursionError):
        return value

"""Columns that say whether an answer is good, such as `is_correct`.

Supervised training must not learn an answer that its row calls bad. Other columns that can rate an
answer, such as grades and scores, are columns that training does not read.
"""

import json
import re
from collections.abc import Mapping

from tunesmith.config.methods import METHOD_OF_FORMAT
from tunesmith.config.row_formats import ROW_FORMATS
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.rows.columns import plain
from tunesmith.rows.row_masks import value_of_cell
from tunesmith.rows.row_reader import RowReader

# Words, in lower case, that label an answer as good, and words that label it as bad.
_GOOD_LABELS = frozenset(
    "true,yes,y,t,1,1.0,good,desirable,chosen,accepted,preferred,thumbs up,thumb up,thumbsup,up,"
    "upvote,upvoted,like,liked,👍,correct,right,pass,passed,approved,helpful,success,successful,✅,✓,✔,"
    "accept,approve,ok,okay,valid,keep".split(",")
)
_BAD_LABELS = frozenset(
    "false,no,n,f,0,0.0,bad,undesirable,rejected,thumbs down,thumb down,thumbsdown,down,"
    "downvote,downvoted,dislike,disliked,👎,incorrect,not correct,wrong,fail,failed,not approved,"
    "unhelpful,not helpful,failure,unsuccessful,❌,✗,✘,reject,not accepted,invalid,not valid,"
    "discard,discarded".split(",")
)
# Characters that can follow a thumb emoji: a skin tone or the emoji variation selector.
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")
# Names of columns with labels, without `is_`. In the columns of the second group, the value true
# means a bad answer.
_LABEL_COLUMNS = (
    *ROW_FORMATS["feedback"].names("label"),
    *"correct accepted approved passed helpful good valid success solved liked feedback".split(),
    "verdict",
)
_REVERSED_COLUMNS = "incorrect wrong bad rejected thumbs_down disliked unhelpful".split()


def read_label(value: object) -> bool | None:
    """Return True if the label means a good answer, False for a bad answer, and None otherwise.

    Numbers other than 0 and 1 give None because they can be ranks. Words such as "positive" give
    None because they can describe the text.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if not isinstance(value, str):
        return None
    word = _SKIN_TONES.sub("", value).strip().lower().replace("_", " ").replace("-", " ")
    if word in _GOOD_LABELS:
        return True
    return False if word in _BAD_LABELS else None


def bad_labels(fields: Mapping[str, object]) -> list[tuple[str, object]]:
    """Return the fields, as (name, value), that label an answer as bad.

    Args:
        fields: the columns of a row, or the keys of a turn, with their values.
    """
    return [label for label in fields.items() if _is_bad_label(*label)]


def _is_bad_label(column: str, value: object) -> bool:
    """Return whether the value of the column in this row labels the answer as bad."""
    name = plain(column)
    if name.removeprefix("is_") in _REVERSED_COLUMNS:
        return read_label(value) is True
    is_label = {name, name.removeprefix("is_")}.intersection(_LABEL_COLUMNS)
    return bool(is_label) and (read_label(value) is False or value_of_cell(value) == -1)


def check_no_bad_label(row: RowReader) -> None:
    """Raise DataError if the row labels its answer as bad, because training learns every answer."""
    labels = [("", *label) for label in bad_labels(row.unread_columns())]
    bad = [*labels, *row.bad_turns]
    if not bad:
        return
    at, name, value = bad[0]
    if at:  # the label of a turn
        fix = 'write "train": false into the turn'
    else:
        fix = _use_labels(row.source, name)
    shown = json.dumps(value, default=str, ensure_ascii=False)
    raise row.error(
        f"the answer is labeled bad: {name} is {shown}",
        f"format {row.source.format} trains on every answer as if it were good",
        f"{fix}, delete the row, or rename {name} if it is not a rating",
        at,
    )


def _use_labels(source: Source, column: str) -> str:
    """Return the settings that train with KTO and read good and bad labels from the column."""
    own_names = ROW_FORMATS[source.format].layouts[0].needed
    names = ["prompt", "completion"] if len(own_names) == 2 else ["messages"]
    own_columns = [source.columns.get(own, own) for own in own_names]
    columns = {**dict(zip(names, own_columns, strict=True)), "label": column}
    settings = row_fix(
        source.source, method=METHOD_OF_FORMAT["feedback"], format="feedback", columns=columns
    )
    return f"learn from good and bad answers, labeled true and false, with {settings}"

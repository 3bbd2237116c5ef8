"""Detection of columns that rate an answer: labels, grades, and the scores of a preference pair.

Supervised training must not learn an answer that another column of its row calls bad. A label, such
as "incorrect", is checked when its row is read. A number can be a grade, whose meaning depends on
the values in the other rows. Therefore numbers are counted, and checked after all rows are read.
"""

import json
import re
from collections.abc import Mapping, Sequence

from tunesmith.config.row_formats import ROW_FORMATS
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.data.rows.columns import plain
from tunesmith.data.rows.row_masks import value_of_cell
from tunesmith.data.rows.row_reader import RowReader
from tunesmith.data.source.open_source import Rows
from tunesmith.errors import DataError
from tunesmith.units import count_of

# Words, in lower case, that label an answer as good, and words that label it as bad.
_GOOD_LABELS = frozenset(
    "true,yes,y,t,1,1.0,good,desirable,chosen,accepted,preferred,thumbs up,thumb up,thumbsup,up,"
    "upvote,upvoted,like,liked,👍,correct,right,pass,passed,approved,helpful,success,successful,✅,✓,✔,"
    "accept,approve,ok,okay,valid,keep,faithful,solved,resolved,satisfied".split(",")
)
_BAD_LABELS = frozenset(
    "false,no,n,f,0,0.0,bad,undesirable,rejected,thumbs down,thumb down,thumbsdown,down,"
    "downvote,downvoted,dislike,disliked,👎,incorrect,not correct,wrong,fail,failed,not approved,"
    "unhelpful,not helpful,failure,unsuccessful,❌,✗,✘,reject,not accepted,not ok,invalid,"
    "not valid,discard,discarded,unfaithful,hallucinated,unsolved,unresolved,unsatisfied,"
    "dissatisfied,wrong answer,time limit exceeded,memory limit exceeded,runtime error,"
    "compile error,compilation error".split(",")
)
# Words for a low grade. `read_label` returns None for them, because they are not labels.
_LOW_GRADES = frozenset(
    "low,very low,poor,very poor,very bad,terrible,awful,negative,1 star,one star,2 stars"
    ",two stars".split(",")
)
# Characters that can follow a thumb emoji: a skin tone or the emoji variation selector.
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")

# Pattern of column names that rate an answer. `%s` is the word for the rating. The other words say
# what is rated and by whom. The column `correct_label` holds the right answer, not a rating.
_RATING = (
    r"(?:(?:is|was|answer|response|completion|output|solution|generation|assistant|model|human"
    r"|user|annotator|expert|judge|llm|overall|final|binary|this|has|contains|tests?|unit|all|qa"
    r"|review|reviewer|moderator|moderation|approval|verifier|task|code)_)*+(?:%s)"
    r"(?:_(?:score|flag|feedback|rating|(?<!correct_)label))?"
)
_LABEL_WORDS = "|".join(ROW_FORMATS["feedback"].names("label")) + (
    "|correct|accepted|approved|passed|pass|good|helpful|thumbs?_up|liked|upvoted|preferred|success"
    "|successful|succeeded|solved|resolved|ok|okay|acceptable|usable|accurate|faithful|satisfied"
    "|satisfactory|(?<=_)(?:valid|chosen|selected)"
)
# Words in column names such as `is_wrong`, in which the value true means a bad answer.
_REVERSED_WORDS = (
    "incorrect|wrong|bad|thumbs?_down|downvoted|disliked|hallucinated|hallucinations?|unhelpful"
    "|inaccurate|unfaithful|low_quality|discarded|(?<=_)(?:rejected|invalid)"
)
_SCORE_WORDS = "score|reward|rating|quality|stars|grade|correctness|helpfulness"
# Words in column names such as `answer_rating`. In these columns, a number is a grade, and any
# other value (a word, true or false) is a label.
_OPINION_WORDS = f"{_SCORE_WORDS}|feedback|verdict|thumbs?|votes?|judge?ment|outcome"
# Words in names of columns that often do not rate the answer, such as `status`. In these columns,
# the values in _VAGUE_LABELS are not labels.
_REMARK_WORDS = "status|result|evaluation|annotation|assessment|preference|reaction|emoji|decision"
_VAGUE_LABELS = frozenset("false,no,n,f,0,0.0,down".split(","))
_is_remark = re.compile(_RATING % _REMARK_WORDS).fullmatch
_is_label = re.compile(_RATING % _LABEL_WORDS).fullmatch
_is_reversed = re.compile(_RATING % _REVERSED_WORDS).fullmatch
_is_opinion = re.compile(_RATING % _OPINION_WORDS).fullmatch
_has_score = re.compile(rf"(?:.*_)?(?:{_SCORE_WORDS})s?(?:_.*)?").fullmatch
# Numbers that can be labels. `grades_of` replaces every other number by _NO_GRADE_LABEL, which
# shows that the column holds grades and no labels.
_NUMBERED_LABELS = (-1, 0, 1)
_NO_GRADE_LABEL = 99


def read_label(value: object) -> bool | None:
    """Return True if the label means a good answer, False for a bad answer, and None otherwise.

    Numbers other than 0 and 1 give None because they can be ranks. Words such as "positive" give
    None because they can describe the text.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if not isinstance(value, str):
        return None
    word = _word(value)
    if word in _GOOD_LABELS:
        return True
    if word in _BAD_LABELS:
        return False
    return None


def _word(value: str) -> str:
    return _SKIN_TONES.sub("", value).strip().lower().replace("_", " ").replace("-", " ")


def rates_answers(column: str) -> bool:
    """Return whether the column's name suggests that the column rates answers."""
    name = plain(column)
    return bool(_is_label(name) or _is_reversed(name) or _is_opinion(name))


def bad_labels(fields: Mapping[str, object]) -> list[tuple[str, object]]:
    """Return the fields, as (name, value), that label an answer as bad.

    Args:
        fields: the columns of a row, or the keys of a turn, with their values. Fields of a nested
            object are checked, too, and are returned with a dotted name: `feedback.rating`.
    """
    labels = dict(fields)
    for name, value in fields.items():
        if isinstance(value, Mapping):
            labels |= {f"{name}.{key}": part for key, part in value.items()}
    return [label for label in labels.items() if _is_bad_label(*label)]


def _is_bad_label(column: str, value: object) -> bool:
    """Return whether the value of the column in this row labels the answer as bad."""
    parent, _, name = plain(column).rpartition(".")
    # In a nested object, such as metadata, ignore numbers and the key `label`, because they often
    # are not a rating of the answer.
    if parent and (name == "label" or not isinstance(value, str | bool)):
        return False
    label = read_label(value)
    if _is_label(name):
        return label is False or value_of_cell(value) == -1
    if _is_reversed(name):
        return label is True
    if _is_remark(name) and isinstance(value, str):
        return label is False and _word(value) not in _VAGUE_LABELS
    if not _is_opinion(name):
        return False
    if not isinstance(value_of_cell(value), str | bool):
        return False  # A number is a grade, see `check_grades`.
    if label is False:
        return True
    return isinstance(value, str) and _word(value) in _LOW_GRADES


def check_no_bad_label(row: RowReader) -> None:
    """Raise DataError if the row labels its answer as bad, because training learns every answer."""
    labels = [("", *label) for label in bad_labels(row.unread_columns())]
    bad = [*labels, *row.bad_turns]
    if not bad:
        return
    at, name, value = bad[0]
    shown = json.dumps(value, default=str, ensure_ascii=False)
    if at:  # the label of a turn
        fix = 'write "train": false into the turn'
    elif name in row.row:  # a column
        fix = _use_labels(row.source, name)
        if read_label(value) is None:
            fix += " (first write true or false for each of its values)"
    else:  # a key inside of a column, such as `feedback.rating`
        fix = f"copy {name} into a separate column"
    raise row.error(
        f"the answer is labeled bad: {name} is {shown}",
        f"format {row.source.format} trains on every answer as if it were good",
        f"{fix}, delete the row, or rename {name} if it is not a rating",
        at,
    )


def _use_labels(source: Source, column: str) -> str:
    """Return the settings that train with KTO and read good and bad labels from the
    column.
    """
    own_names = ROW_FORMATS[source.format].layouts[0].needed
    names = ["prompt", "completion"] if len(own_names) == 2 else ["messages"]
    own_columns = [source.columns.get(own, own) for own in own_names]
    columns = {**dict(zip(names, own_columns, strict=True)), "label": column}
    settings = row_fix(source.source, method="kto", format="feedback", columns=columns)
    fix = f"learn from good and bad answers with {settings}"
    if _is_reversed(plain(column)):
        fix += f" (first swap true and false in {column})"
    return fix


def grades_of(row: RowReader) -> tuple[str, ...]:
    """Return name and number of each column that can contain a grade, for example `rating 1`.

    Numbers other than -1, 0 and 1 cannot be labels. They are replaced by 99, which shows that the
    column holds grades.
    """
    grades = []
    for column, cell in row.unread_columns().items():
        value = value_of_cell(cell)
        if isinstance(value, int | float) and _is_opinion(plain(column)):
            grade = int(value) if value in _NUMBERED_LABELS else _NO_GRADE_LABEL
            grades.append(f"{column} {grade}")
    return tuple(grades)


def check_grades(grades: Mapping[str, Sequence[int]], rows: Rows, source: Source) -> None:
    """Raise DataError if all numbers in a column are labels: 1 for good, and 0 or -1 for bad.

    Args:
        grades: maps a column with a number, such as `rating 1` (see `grades_of`), to the number of
            rows that have it and the index of the first of these rows.
    """
    by_column: dict[str, dict[int, Sequence[int]]] = {}
    for text, found in grades.items():
        column, _, grade = text.rpartition(" ")
        by_column.setdefault(column, {})[int(grade)] = found
    for column, rows_by_grade in by_column.items():
        low = min(rows_by_grade)
        if max(rows_by_grade) == 1 and low < 1:
            count, first = rows_by_grade[low]
            answers = count_of(sum(found[0] for found in rows_by_grade.values()), "answer")
            raise DataError(
                f"the column {column} seems to rate the answers: it is {low} in {count:,} of "
                f"{answers}, and 1 in all others",
                where=rows.where(first),
                why=f"format {source.format} trains on every answer as if it were good",
                fix=f"{_use_labels(source, column)}, delete the rows with bad answers, "
                f"or rename {column} if it is not a rating",
            )


def has_other_preference(row: RowReader) -> bool:
    """Return True if the row has scores, and the score of the chosen answer is not higher than the
    score of the rejected answer.
    """
    columns = {plain(column): column for column in row.unread_columns()}
    is_other = False
    for name, column in columns.items():
        other_column = columns.get(name.replace("chosen", "rejected"), column)
        if not _has_score(name) or other_column == column:
            continue
        chosen = value_of_cell(row.row[column])
        rejected = value_of_cell(row.row[other_column])
        if isinstance(chosen, int | float) and isinstance(rejected, int | float):
            is_other = is_other or chosen <= rejected
            row.read |= {column, other_column}
    return is_other

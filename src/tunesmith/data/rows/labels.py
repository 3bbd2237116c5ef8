"""Columns that rate an answer: labels, grades, and the scores of a pair.

A row that is trained on as it is must not have an answer that its own columns call bad. A label is
judged row by row. A number may be a grade, whose meaning depends on the other rows: grades are
counted, and judged when all rows are known.
"""

import json
import re
from collections.abc import Mapping, Sequence

from tunesmith.config.row_formats import ROW_FORMATS
from tunesmith.config.schema import Source
from tunesmith.data.rows.marks import value_of_cell
from tunesmith.data.rows.row_reader import RowReader, plain
from tunesmith.data.source.open_source import Rows
from tunesmith.errors import DataError
from tunesmith.host.shell import shell_word
from tunesmith.units import count_of

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
# Words that are low grades, but no labels.
_LOW_GRADES = frozenset(
    "low,very low,poor,very poor,very bad,terrible,awful,negative,1 star,one star,2 stars"
    ",two stars".split(",")
)
# What may follow a thumb: a skin tone, or the character that makes it an emoji.
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")

# Names of columns: a word for the rating (%s), with words around it for what is rated and by whom.
# A column `correct_label` holds the right answer, not a rating.
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
# Columns in which true means a bad answer.
_REVERSED_WORDS = (
    "incorrect|wrong|bad|thumbs?_down|downvoted|disliked|hallucinated|hallucinations?|unhelpful"
    "|inaccurate|unfaithful|low_quality|discarded|(?<=_)(?:rejected|invalid)"
)
_SCORE_WORDS = "score|reward|rating|quality|stars|grade|correctness|helpfulness"
# Columns in which words and truth values are labels, and numbers are grades.
_OPINION_WORDS = f"{_SCORE_WORDS}|feedback|verdict|thumbs?|votes?|judge?ment|outcome"
# Columns that may hold other things, too: only unambiguous words are labels there.
_REMARK_WORDS = "status|result|evaluation|annotation|assessment|preference|reaction|emoji|decision"
_VAGUE_LABELS = frozenset("false,no,n,f,0,0.0,down".split(","))
_is_remark = re.compile(_RATING % _REMARK_WORDS).fullmatch
_is_label = re.compile(_RATING % _LABEL_WORDS).fullmatch
_is_reversed = re.compile(_RATING % _REVERSED_WORDS).fullmatch
_is_opinion = re.compile(_RATING % _OPINION_WORDS).fullmatch
_has_score = re.compile(rf"(?:.*_)?(?:{_SCORE_WORDS})s?(?:_.*)?").fullmatch
# Numbers that may be labels. Any other number becomes _NO_GRADE_LABEL: its column is no label.
_NUMBERED_LABELS = (-1, 0, 1)
_NO_GRADE_LABEL = 99


def read_label(value: object) -> bool | None:
    """Return whether a label calls its answer good. Return None if it says neither good nor bad.

    A number other than 0 and 1 may be a rank, and a word such as positive may describe a text.
    """
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    if not isinstance(value, str):
        return None
    word = _word(value)
    if word in _GOOD_LABELS:
        return True
    return False if word in _BAD_LABELS else None


def _word(value: str) -> str:
    return _SKIN_TONES.sub("", value).strip().lower().replace("_", " ").replace("-", " ")


def rates_answers(column: str) -> bool:
    """Return whether a column has a name that labels and grades of answers have."""
    name = plain(column)
    return bool(_is_label(name) or _is_reversed(name) or _is_opinion(name))


def bad_labels(fields: Mapping[str, object]) -> list[tuple[str, object]]:
    """Return the names and values of columns, or of keys of a turn, that label an answer as bad.

    A label in an object is named by its path: `feedback.rating`.
    """
    labels = dict(fields)
    for name, value in fields.items():
        if isinstance(value, Mapping):
            labels |= {f"{name}.{key}": part for key, part in value.items()}
    return [label for label in labels.items() if _is_bad_label(*label)]


def _is_bad_label(column: str, value: object) -> bool:
    """Return whether a value labels its answer as bad, whatever the values of other rows are."""
    parent, _, name = plain(column).rpartition(".")
    # An object of metadata may have numbers of other meanings, and the class of a text as `label`.
    if parent and (name == "label" or not isinstance(value, str | bool)):
        return False
    label = read_label(value)
    if _is_label(name):
        return label is False or value_of_cell(value) == -1
    if _is_reversed(name):
        return label is True
    if _is_remark(name) and isinstance(value, str):
        return label is False and _word(value) not in _VAGUE_LABELS
    if not _is_opinion(name) or not isinstance(value_of_cell(value), str | bool):
        return False
    return label is False or (isinstance(value, str) and _word(value) in _LOW_GRADES)


def check_no_bad_label(row: RowReader) -> None:
    """DataError for a row whose answer is labeled as bad, because each answer is learned."""
    labels = [("", *label) for label in bad_labels(row.unread_columns())]
    for at, name, value in [*labels, *row.bad_turns]:
        shown = json.dumps(value, default=str, ensure_ascii=False)
        fix = 'write "train": false into the turn' if at else "copy it into a column of its own"
        if name in row.row and not at:
            fix = _use_labels(row.source, name)
            if read_label(value) is None:
                fix += ", after true or false is written for each of its values"
        raise row.error(
            f"the answer is labeled bad: {name} is {shown}",
            f"format {row.source.format} learns each answer as it is",
            f"{fix}; or delete the row; or rename {name} if it says something else",
            at,
        )


def _use_labels(source: Source, column: str) -> str:
    """Return the overrides that train on good and bad answers, by the labels in a column."""
    own_names = ROW_FORMATS[source.format].layouts[0].needed
    names = ("prompt", "completion") if len(own_names) == 2 else ("messages",)
    columns = dict(zip(names, own_names, strict=True))
    pairs = [f"{name}: {source.columns.get(own, own)}" for name, own in columns.items()]
    word = shell_word(f"data.train.columns={{{', '.join(pairs)}, label: {column}}}")
    swapped = (
        f", after true and false are swapped in {column}" if _is_reversed(plain(column)) else ""
    )
    return f"learn from good and bad answers: method=kto data.train.format=feedback {word}{swapped}"


def grades_of(row: RowReader) -> tuple[str, ...]:
    """Return the grade in each column that has one, as `rating 3`."""
    grades = []
    for column, cell in row.unread_columns().items():
        value = value_of_cell(cell)
        if isinstance(value, int | float) and _is_opinion(plain(column)):
            grades.append(
                f"{column} {int(value) if value in _NUMBERED_LABELS else _NO_GRADE_LABEL}"
            )
    return tuple(grades)


def check_grades(grades: Mapping[str, Sequence[int]], rows: Rows, source: Source) -> None:
    """Raise DataError if the grades in a column are labels: 1 for good, and 0 or -1 for bad ones.

    Args:
        grades: a grade, as `grades_of` writes it -> how many rows have it, and the first of them.
    """
    by_column: dict[str, dict[int, Sequence[int]]] = {}
    for text, found in grades.items():
        column, _, grade = text.rpartition(" ")
        by_column.setdefault(column, {})[int(grade)] = found
    for column, rows_of in by_column.items():
        low = min(rows_of)
        if max(rows_of) == 1 and low < 1:
            count, first = rows_of[low]
            answers = count_of(sum(found[0] for found in rows_of.values()), "answer")
            raise DataError(
                f"{column} is {low} in {count:,} of {answers}, and 1 in others",
                where=rows.where(first),
                why=f"format {source.format} learns each answer as it is",
                fix=f"{_use_labels(source, column)}; or delete these rows; or rename {column} if it"
                " says something else",
            )


def has_other_preference(row: RowReader) -> bool:
    """Return whether the scores of a pair contradict its preference, or are equal."""
    columns = {plain(column): column for column in row.unread_columns()}
    is_other = False
    for name in filter(_has_score, columns):
        other = name.replace("chosen", "rejected")
        if other == name or other not in columns:
            continue
        pair = [columns[name], columns[other]]
        chosen, rejected = (value_of_cell(row.row[column]) for column in pair)
        if isinstance(chosen, int | float) and isinstance(rejected, int | float):
            is_other = is_other or chosen <= rejected
            row.read.update(pair)
    return is_other

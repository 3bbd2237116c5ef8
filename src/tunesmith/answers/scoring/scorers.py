"""Scorers of answers. A scorer maps an answer and its row to a number from 0 to 1.

A scorer has a name, a function that checks a row, and a function that scores an answer. Scorers
need no torch and no model, so saved answers can be scored again quickly. All rows are checked
before the first answer is generated, and an invalid reference raises an error. If an answer is
invalid, its score is 0. Scorers run in other processes, see `process.py`. The user's own functions
are in `own_scorers.py`.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import regex

from tunesmith.answers.scoring import text
from tunesmith.answers.scoring.json_fields import equal_fields, parse_strict, schema_validator
from tunesmith.answers.scoring.tool_calls import CallReader, call_score
from tunesmith.errors import DataError, RunError, TunesmithError, UsageError, first_line
from tunesmith.host.shell import shell_path
from tunesmith.units import count_of

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

SCHEMA = "schema"  # name of the column with the JSON schema of a row
REFERENCE = "reference"  # name under which the user's scorer gets the answer of a row
MAX_SHOWN_REASON = 2000  # maximum length of a scorer's error


@dataclass(frozen=True)
class ScoredRow:
    """Row of an evaluation, with the reference that a model's answer is compared with.

    Attributes:
        reference: the answer in the row as the chat template renders it, without special tokens.
            If it consists only of special tokens, they are kept.
        raw_reference: the reference with special tokens.
        row: the row as it is in the file.
        where: file and line of the row, for error messages.
        calls: number of tool calls in the reference.
        has_tools: whether the row lists tools.
        is_special: whether the reference consists only of special tokens. If so, the special tokens
            of the model's answer are also compared.
        prompt: the prompt as TRL passes it: a text, or messages.
    """

    reference: str
    raw_reference: str
    row: dict[str, object] = field(repr=False)
    where: str
    calls: int = 0
    has_tools: bool = False
    is_special: bool = False
    prompt: object = ""

    @property
    def is_answered(self) -> bool:
        """Return whether the row has an answer."""
        return bool(self.raw_reference)

    def check(self, scorer: str) -> None:
        """Raise DataError if a scorer cannot score any answer to the row."""
        if scorer in SCORERS and not self.is_answered:
            raise DataError(
                "the row has no answer",
                where=self.where,
                why=f"the scorer {scorer} compares answers with it",
                fix="write the answer, delete the row, or use your own scorer",
            )
        if self.is_answered and self.row.get(REFERENCE, self.reference) != self.reference:
            raise DataError(
                f"the row has an answer and another column {REFERENCE}",
                where=self.where,
                why=f'a scorer reads the answer of a row as row["{REFERENCE}"]',
                fix=f"give the column {REFERENCE} another name",
            )


# The scores of one answer, by the labels of the scorers, and the values that they have logged.
AnswerScores = dict[str, float]


def scorer_label(name: str) -> str:
    """Return the name of a scorer in records: the function of `file.py:function`."""
    return name.rpartition(":")[2]


class RewardedAnswer(NamedTuple):
    """An answer to a row.

    Attributes:
        text: the text without special tokens.
        raw: the text with special tokens.
        ids: the tokens of the answer, with its end token.
        finished: whether the answer ended by itself. False: it was cut off.
        final: the text after the thought, without and with special tokens. If empty, the answer has
            no thought.
    """

    text: str
    raw: str
    row: ScoredRow
    ids: Sequence[int] = ()
    finished: bool = True
    final: Sequence[str] = ()

    def text_for(self, scorer: str) -> str:
        """Return the text that a scorer compares."""
        plain, special = self.final or (self.text, self.raw)
        # Tool calls and some references contain special tokens.
        return special if scorer == TOOL_CALL or self.row.is_special else plain


@dataclass(frozen=True)
class Scorer:
    """Named function that scores an answer, with a check of the rows.

    Attributes:
        name: the name on the command line.
        score: function of (answer, row) that returns a number from 0 to 1.
        check: function that raises DataError if the scorer cannot score the row. By default, every
            row is accepted.
    """

    name: str
    score: Callable[[str, ScoredRow], float]
    check: Callable[[ScoredRow], object] = lambda row: None
    takes_group = False

    def scores(self, answers: Sequence[RewardedAnswer], *_: object) -> list[AnswerScores]:
        """Return the score of each answer. Raise RunError if the scorer fails."""
        return [
            {self.name: score_answer(self, answer.text_for(self.name), answer.row)}
            for answer in answers
        ]


def find_scorer(name: str, call_reader: CallReader | None = None) -> Scorer:
    """Return the scorer of SCORERS with this name.

    Args:
        call_reader: parser for tool calls in the format of the chat template; None if the format is
            not supported.

    Raise UsageError if tool calls cannot be scored.
    """
    return _tool_call_scorer(call_reader) if name == TOOL_CALL else _TEXT_SCORERS[name]


def check_scorer_names(names: str | Sequence[str]) -> Sequence[str]:
    """Check the names of scorers, and return them as a list.

    Raise UsageError if a name is not a scorer and does not have the form file.py:function. The file
    is not executed.
    """
    if isinstance(names, str):
        names = [names]
    for name in names:
        if name not in SCORERS:
            own_scorer_file(name)
    return names


def score_answer(scorer: Scorer, answer: str, row: ScoredRow) -> float:
    """Return the score of one answer. Raise RunError if the scorer fails."""
    try:
        return scorer.score(answer, row)
    except Exception as error:
        raise RunError(
            f"the scorer {scorer.name} failed",
            where=row.where,
            why=error_reason(error),
            fix="fix the row, then run the same command again; the answers are kept",
        ) from error


def error_reason(error: BaseException) -> str:
    """Return the class and the text of an error as one text that can be written to any file."""
    try:
        text = f": {error}".rstrip(": ")
    except Exception:  # the error of a scorer can be of any class
        text = ""
    # The text can have 10 MB, and halves of surrogates, which have no encoding.
    reason = (type(error).__name__ + text)[:MAX_SHOWN_REASON]
    return reason.encode(errors="backslashreplace").decode()


def _check_not_blank(row: ScoredRow) -> None:
    if not row.reference.strip():
        raise _row_fault(
            row, "the reference answer is blank", "every answer would match a blank reference"
        )


def _row_fault(row: ScoredRow, what: str, why: str, column: str = "") -> DataError:
    """Build the error for a row that a scorer cannot score."""
    where = f"{row.where}, {column}" if column else row.where
    return DataError(what, where=where, why=why, fix="fix the row, or use another scorer")


def _check_pattern(row: ScoredRow) -> None:
    _check_not_blank(row)
    try:
        regex.compile(row.reference.strip())
    except (regex.error, RecursionError, OverflowError) as error:
        raise _row_fault(
            row,
            "the reference answer is not a regular expression",
            f"{error} (--score regex takes the row's answer as a pattern)",
        ) from error


def _json_score(answer: str, row: ScoredRow) -> float:
    """Return the fraction of equal fields of a JSON answer and its reference.

    Return 0 if the answer is not JSON, or does not match the row's schema.
    """
    try:
        value = parse_strict(answer)
    except ValueError:
        return 0.0
    validator = _row_validator(row)
    if validator is not None and not validator.is_valid(value):
        return 0.0
    return equal_fields(value, parse_strict(row.reference))


def _check_json(row: ScoredRow) -> None:
    try:
        reference = parse_strict(row.reference)
    except ValueError as error:
        why = f"{error} (--score json compares the row's answer field by field)"
        raise _row_fault(row, "the reference answer is not JSON", why) from error
    # Catch any exception, because an invalid schema in a row can raise any type of exception.
    problem = None
    try:
        validator = _row_validator(row)
        if validator is not None:
            problem = next(validator.iter_errors(reference), None)
    except TunesmithError:
        raise
    except Exception as error:
        raise _row_fault(
            row, f"the row's {SCHEMA} is not a JSON schema", first_line(error), SCHEMA
        ) from error
    if problem is not None:
        why = f"{problem.json_path}: {problem.message}"
        raise _row_fault(row, "the reference answer does not match the row's schema", why, SCHEMA)


def _row_validator(row: ScoredRow) -> "Validator | None":
    """Return the validator for the row's JSON schema, or None if the row has no schema.

    The schema can be an object or its JSON text.
    """
    schema = row.row.get(SCHEMA)
    if schema is None or schema == "":
        return None
    if not isinstance(schema, str):
        schema = json.dumps(schema)
    return _validator_of(schema)


@cache
def _validator_of(schema: str) -> "Validator":
    value = parse_strict(schema)
    if not isinstance(value, dict | bool):
        raise ValueError("the JSON schema is not an object")  # noqa: TRY004
    return schema_validator(value)


def _tool_call_scorer(read: CallReader | None) -> Scorer:
    if read is None:
        raise UsageError(
            "the tool calls of this model cannot be scored",
            where="--score tool-call",
            why="the chat template does not support tool calls, or it writes them in a format that "
            "tunesmith cannot parse",
            fix="write your own scorer: --score my_scorer.py:function",
        )

    def check(row: ScoredRow) -> None:
        if not row.has_tools:
            why = "--score tool-call compares tool calls, and the prompt must list the tools"
            raise _row_fault(row, "the row has no tools", why, "tools")
        # Check that the reference can be parsed: the number of parsed calls must be the number of
        # calls in the row.
        count = len(read(row.raw_reference))
        if count != row.calls:
            calls = count_of(row.calls, "tool call")
            why = f"the row has {calls}, but its rendered answer has {count}"
            raise _row_fault(row, "the row's tool calls cannot be parsed", why)

    def score(answer: str, row: ScoredRow) -> float:
        return call_score(read(answer), read(row.raw_reference))

    return Scorer(TOOL_CALL, score, check)


def _by_reference(
    compare: Callable[[str, str], float],
) -> Callable[[str, ScoredRow], float]:
    """Return a function that compares an answer with the reference of its row."""
    return lambda answer, row: compare(answer, row.reference)


_TEXT_SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer("exact", _by_reference(text.exact)),
        Scorer("contains", _by_reference(text.contains), _check_not_blank),
        Scorer("regex", _by_reference(text.matches), _check_pattern),
        Scorer("json", _json_score, _check_json),
        Scorer("f1", _by_reference(text.token_f1)),
        Scorer("rouge-l", _by_reference(text.rouge_l)),
    )
}
TOOL_CALL = "tool-call"
SCORERS = (*_TEXT_SCORERS, TOOL_CALL)


def own_scorer_file(name: str) -> tuple[Path, str]:
    """Return the file and the function that `file.py:function` names.

    Raise UsageError if the name has another form, or if there is no such file.
    """
    # A Python caller may pass a value that is not a str.
    file, _, function = str(name).rpartition(":")
    if not file.endswith(".py") or not re.fullmatch(r"[A-Za-z_]\w*", function):
        near = difflib.get_close_matches(str(name), SCORERS, n=1)
        raise UsageError(
            f"there is no scorer {name}",
            where="--score",
            why=f"the scorers are {', '.join(SCORERS)}, or file.py:function",
            fix=f"did you mean --score {near[0]}?" if near else "use one of these scorers",
        )
    path = Path(file)
    where = f"--score {name}"
    if not path.is_file():
        raise UsageError(
            f"there is no file {file}", where=where, fix="correct the path of the file"
        )
    # Look the name up without executing the file, because torch may not be loaded yet.
    source = path.read_bytes()
    try:
        names = compile(source, str(path), "exec").co_names
    except (SyntaxError, ValueError) as error:
        raise broken_scorer_file(path, where, error) from None
    if function not in names and b"import *" not in source:
        raise no_scorer_function(path, function, where, names)
    return path, function


def broken_scorer_file(path: Path, where: str, error: BaseException) -> UsageError:
    """Build the error for a file of a scorer that cannot be loaded."""
    return UsageError(
        f"{path.name} cannot be loaded",
        where=where,
        why=error_reason(error),
        fix=f"run the file alone to see the failing line: python {shell_path(path)}",
    )


def no_scorer_function(
    path: Path, function: str, where: str, names: Sequence[str] = ()
) -> UsageError:
    """Build the error for a file that does not define a function. `names` are the names it has."""
    near = difflib.get_close_matches(function, names, n=1)
    fix = f"define the function: def {function}(answer: str, row: dict) -> float"
    return UsageError(
        f"{path.name} has no function {function}",
        where=where,
        fix=f"did you mean {path.name}:{near[0]}?" if near else fix,
    )

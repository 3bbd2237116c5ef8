"""The scorers of `eval --score`: an answer and its row -> a number from 0 to 1.

A scorer is a name, a check of each row before the first answer, and a function. They need no torch
and no model: answers that were saved are scored again in a moment. What is wrong with a reference
is the row's fault and raised before any answer; what is wrong with an answer is a score of 0.
Scorers run in a process of their own (`scorer_process`), which is killed if a row takes too long.
"""

import difflib
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import regex

from tunesmith.data.workers import Worker
from tunesmith.errors import DataError, RunError, TunesmithError, UsageError, first_line
from tunesmith.host.shell import shell_path
from tunesmith.tools.evaluate import text
from tunesmith.tools.evaluate.json_fields import equal_fields, parse_strict, schema_validator
from tunesmith.tools.evaluate.tool_calls import CallReader, call_score

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

SCHEMA = "schema"  # the column of a row's JSON schema
# Time limits for a row, in seconds. The user's scorers may call services, or run code.
SCORER_SECONDS = 10
OWN_SCORER_SECONDS = 60


@dataclass(frozen=True)
class ScoredRow:
    """The row that an answer is scored against.

    Attributes:
        reference: the row's own answer as the model would write it, without special tokens unless
            it has no others.
        raw_reference: with them.
        row: as the file has it.
        where: the row's place, for errors.
        calls: how many tools the row's own answer calls.
        has_tools: whether the row offers tools.
        is_special: whether the answer has special tokens alone: with these it is compared.
    """

    reference: str
    raw_reference: str
    row: dict[str, object] = field(repr=False)
    where: str
    calls: int = 0
    has_tools: bool = False
    is_special: bool = False


def _accept(row: ScoredRow) -> None:
    """Every row can be scored."""


@dataclass(frozen=True)
class Scorer:
    """One way to score.

    Attributes:
        name: as on the command line.
        score: of (answer, row), from 0 to 1.
        check: DataError for a row that cannot be scored, whatever the answer.
    """

    name: str
    score: Callable[[str, ScoredRow], float]
    check: Callable[[ScoredRow], None] = _accept


def select_scorers(names: Sequence[str], call_reader: CallReader | None = None) -> list[Scorer]:
    """Return the scorers of these names.

    Args:
        names: of SCORERS, or `file.py:function` for one's own.
        call_reader: what reads the template's tool calls; None if it has no supported form.

    Raises:
        UsageError: there is no such scorer, or its file cannot be used.
    """
    scorers = []
    for name in names:
        if name in _TEXT_SCORERS:
            scorers.append(_TEXT_SCORERS[name])
        elif name == TOOL_CALL:
            scorers.append(_tool_call_scorer(call_reader))
        else:
            scorers.append(load_own_scorer(name))
    return scorers


def check_scorer_names(names: str | Sequence[str]) -> Sequence[str]:
    """Return the names, as a list if there is only one.

    Raise UsageError for a name that is neither a scorer's nor of the form file.py:function. Nothing
    of the file runs.
    """
    if isinstance(names, str):
        names = [names]
    for name in names:
        if name not in SCORERS:
            _own_scorer_file(name)
    return names


def score_answer(scorer: Scorer, answer: str, row: ScoredRow) -> float:
    """The score of one answer, checked; RunError names the row where a scorer fails."""
    try:
        value = scorer.score(answer, row)
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(
            f"the scorer {scorer.name} failed",
            where=row.where,
            why=f"{_reason(error)} ({Path(frame.filename).name}:{frame.lineno})",
            fix="fix it, then start the same command again: the answers are kept",
        ) from error
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if not is_number or not 0 <= value <= 1:
        raise RunError(
            f"the scorer {scorer.name} did not return a number from 0 to 1",
            where=row.where,
            why=f"it returned {value!r:.200}",
            fix="return a float from 0 to 1, then start the same command again: "
            "the answers are kept",
        )
    return float(value)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


# The name of a scorer, an answer (None: check the row), and the row.
_Call = tuple[str, str | None, ScoredRow]


def _run_scorer(
    names: tuple[str, ...], call_reader: CallReader | None, call: _Call | None
) -> float:
    """Return the score that a call asks for. Without a call, load the scorers only."""
    scorers = _scorers_by_name(names, call_reader)
    if call is None:
        return 0.0
    name, answer, row = call
    if answer is None:
        scorers[name].check(row)
        return 0.0
    return score_answer(scorers[name], answer, row)


@cache
def _scorers_by_name(names: tuple[str, ...], call_reader: CallReader | None) -> dict[str, Scorer]:
    return {scorer.name: scorer for scorer in select_scorers(names, call_reader)}


@contextmanager
def scorer_process(
    names: Sequence[str], call_reader: CallReader | None
) -> Iterator[Callable[[str, str | None, ScoredRow], float]]:
    """Start a process that scores, and is killed if a row takes too long.

    Yields:
        A function of (scorer's name, answer, row), which returns the score. Without an answer it
        checks the row.

    Raises:
        UsageError: as `select_scorers`.
    """
    worker = Worker(partial(_run_scorer, tuple(names), call_reader), "the scorers' process")

    def run(name: str, answer: str | None, row: ScoredRow) -> float:
        is_own = name not in SCORERS
        seconds = OWN_SCORER_SECONDS if is_own else SCORER_SECONDS
        try:
            return worker((name, answer, row), row.where, seconds)
        except TimeoutError:
            why = "a regular expression may backtrack exponentially on this text, as (a+)+$ does"
            fix = "change the row's pattern or schema, for example its nested repeats"
            if is_own:
                why = "it may be in an endless loop, or wait for something"
                fix = f"fix it: a row may take {seconds} seconds"
            error = DataError if answer is None else RunError
            raise error(
                f"the scorer {name} takes longer than {seconds:g} seconds",
                where=row.where,
                why=why,
                fix=f"{fix}, then start the same command again: existing answers are kept",
            ) from None

    try:
        # No time limit: the files of the user's scorers may import large packages.
        worker(None, "--score")
        yield run
    finally:
        worker.close()


def _check_not_blank(row: ScoredRow) -> None:
    if not row.reference.strip():
        raise _row_fault(row, "the reference is blank", "every answer would have it")


def _row_fault(row: ScoredRow, what: str, why: str, column: str = "") -> DataError:
    """Return the error for a row that a scorer cannot use."""
    where = f"{row.where}, {column}" if column else row.where
    return DataError(what, where=where, why=why, fix="fix the row, or use another scorer")


def _check_pattern(row: ScoredRow) -> None:
    _check_not_blank(row)
    try:
        regex.compile(row.reference.strip())
    except (regex.error, RecursionError, OverflowError) as error:
        why = f"{error} (--score regex takes the row's answer as a pattern)"
        raise _row_fault(row, "the reference is not a regular expression", why) from error


def _json_score(answer: str, row: ScoredRow) -> float:
    """0 for an answer that is no JSON or does not fit the schema, else the share of its fields that
    are right."""
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
        raise _row_fault(row, "the reference is not JSON", why) from error
    # A row may bring a schema of its own, in which anything may be wrong.
    problem = None
    try:
        validator = _row_validator(row)
        if validator is not None:
            problem = next(validator.iter_errors(reference), None)
    except TunesmithError:
        raise
    except Exception as error:
        what = f"the row's {SCHEMA} is not a JSON schema"
        raise _row_fault(row, what, first_line(error), SCHEMA) from error
    if problem is not None:
        why = f"{problem.json_path}: {problem.message}"
        raise _row_fault(row, "the reference does not match the row's schema", why, SCHEMA)


def _row_validator(row: ScoredRow) -> "Validator | None":
    """The validator of a row's schema, an object or JSON text of one; None without."""
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
        raise ValueError("it is not an object")  # noqa: TRY004
    return schema_validator(value)


def _tool_call_scorer(read: CallReader | None) -> Scorer:
    if read is None:
        raise UsageError(
            "the tool calls of this template cannot be parsed",
            where="--score tool-call",
            why="it does not support calls, or uses an unknown format",
            fix="write your own scorer: --score my_scorer.py:function",
        )

    def check(row: ScoredRow) -> None:
        if not row.has_tools:
            why = "--score tool-call compares calls, and the prompt must list what can be called"
            raise _row_fault(row, "the row has no tools", why, "tools")
        # A row whose own calls do not come back could not be scored.
        count = len(read(row.raw_reference))
        if count != row.calls:
            why = f"it has {row.calls}, and as the template writes them {count} are read"
            raise _row_fault(row, "the row's tool calls cannot be parsed", why)

    def score(answer: str, row: ScoredRow) -> float:
        return call_score(read(answer), read(row.raw_reference))

    return Scorer(TOOL_CALL, score, check)


_TEXT_SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer("exact", lambda answer, row: text.exact(answer, row.reference)),
        Scorer(
            "contains", lambda answer, row: text.contains(answer, row.reference), _check_not_blank
        ),
        Scorer("regex", lambda answer, row: text.matches(answer, row.reference), _check_pattern),
        Scorer("json", _json_score, _check_json),
        Scorer("f1", lambda answer, row: text.token_f1(answer, row.reference)),
        Scorer("rouge-l", lambda answer, row: text.rouge_l(answer, row.reference)),
    )
}
TOOL_CALL = "tool-call"
SCORERS = (*_TEXT_SCORERS, TOOL_CALL)


def _own_scorer_file(name: str) -> tuple[Path, str]:
    """The file and the function that `file.py:function` names; UsageError for anything else."""
    # From Python, anything may come.
    file, _, function = str(name).rpartition(":")
    if not file.endswith(".py") or not re.fullmatch(r"[A-Za-z_]\w*", function):
        near = difflib.get_close_matches(str(name), SCORERS, n=1)
        raise UsageError(
            f"there is no scorer {name}",
            where="--score",
            why=f"the scorers are {', '.join(SCORERS)}, or file.py:function",
            fix=f"did you mean --score {near[0]}?" if near else "use one of these",
        )
    path = Path(file)
    if not path.is_file():
        raise UsageError(
            f"there is no file {file}", where=f"--score {name}", fix="set the scorer's file"
        )
    return path, function


def load_own_scorer(name: str) -> Scorer:
    """The scorer `file.py:function`, called with (answer, row).

    The row is a copy, with `reference` added.
    """
    path, function_name = _own_scorer_file(name)
    where = f"--score {name}"
    module = ModuleType(f"tunesmith_scorer_{path.stem}")
    module.__file__ = str(path)
    # Its classes look their module up, some of them when the scorer is called.
    sys.modules[module.__name__] = module
    try:
        # Run, not imported: the import system would leave a folder of bytecode beside the file.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{path.name} cannot be loaded",
            where=where,
            why=_reason(error),
            fix=f"run it on its own to see where: python {shell_path(path)}",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(
            f"{path.name} has no function {function_name}",
            where=where,
            fix=f"define it: def {function_name}(answer: str, row: dict) -> float",
        )

    def score(answer: str, row: ScoredRow) -> float:
        value: float = function(answer, {**row.row, "reference": row.reference})
        return value

    return Scorer(name, score)

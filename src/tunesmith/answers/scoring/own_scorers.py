"""Reward functions of the user. The names of the parameters tell the form:

    def score(answer: str, row: dict) -> float                        one answer
    def score(prompts, completions, **columns) -> list[float | None]  all answers to a row, as TRL

A function of either form can be `async`. Functions for other tools are refused.
"""

import asyncio
import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tunesmith.answers.scoring.scorers import (
    REFERENCE,
    AnswerScores,
    RewardedAnswer,
    broken_scorer_file,
    error_reason,
    no_scorer_function,
    own_scorer_file,
    scorer_label,
)
from tunesmith.errors import RunError, UsageError

# Parameters that only functions for verl and verifiers have.
_OTHER_TOOLS = {"solution_str", "data_source", "ground_truth", "completion", "state"}


@dataclass(frozen=True)
class OwnScorer:
    """Reward function of the user.

    Attributes:
        name: `file.py:function`.
        takes_group: whether the function has TRL's form, so that it gets all answers to a row.
    """

    name: str
    function: Callable[..., Any]
    takes_group: bool

    def scores(
        self, answers: Sequence[RewardedAnswer], state: Mapping[str, float], limit: float
    ) -> list[AnswerScores]:
        """Return the scores of answers to one row.

        Args:
            answers: one answer, unless the function takes a group.
            state: attributes of TRL's `trainer_state`.
            limit: 1, if a score must be from 0 to 1; infinity, if any finite number is accepted.

        Raise RunError if the function fails, or does not return numbers.
        """
        scores: list[AnswerScores] = [{} for _ in answers]
        texts = [answer.text_for(self.name) for answer in answers]
        rows = [_columns(answer) for answer in answers]
        try:
            if not self.takes_group:
                value = _finished(self.function(texts[0], rows[0]))
                return [{scorer_label(self.name): _number(value, limit)}]
            values = self._call_group(answers, texts, rows, state, scores)
            for of_answer, value in zip(scores, values, strict=True):
                # TRL's functions return None for an answer that they do not reward.
                if value is not None:
                    of_answer[scorer_label(self.name)] = _number(value, limit)
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f" ({Path(frame.filename).name}:{frame.lineno})"
            raise RunError(
                f"the scorer {self.name} failed",
                where=answers[0].row.where,
                why=error_reason(error) + place * (frame.filename != __file__),
                fix="fix the scorer, then run the same command again; the answers are kept",
            ) from None
        return scores

    def _call_group(
        self,
        answers: Sequence[RewardedAnswer],
        texts: Sequence[str],
        rows: Sequence[Mapping[str, object]],
        state: Mapping[str, float],
        scores: Sequence[AnswerScores],
    ) -> list[Any]:
        """Call a function of TRL's form with the arguments of TRL 1.16 that it accepts."""

        def log_extra(column: str, values: Sequence[object]) -> None:
            for of_answer, value in zip(scores, values, strict=False):
                with suppress(ValueError):
                    of_answer[column] = _number(value)

        prompt = answers[0].row.prompt
        completions: Sequence[object] = texts
        if not isinstance(prompt, str):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        given = {name: [row[name] for row in rows] for name in rows[0]} | {
            "prompts": [prompt] * len(answers),
            "completions": completions,
            "completion_ids": [list(answer.ids) for answer in answers],
            "trainer_state": SimpleNamespace(**{"global_step": 0, "max_steps": -1, **state}),
            "log_extra": log_extra,
            "log_metric": lambda name, value: log_extra(name, [value] * len(answers)),
        }
        parameters = inspect.signature(self.function).parameters
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            given = {name: given[name] for name in parameters if name in given}
        values = [*_finished(self.function(**given))]
        if len(values) != len(answers):
            raise ValueError(f"it returned {len(values)} rewards for {len(answers)} answers")
        return values


def _number(value: Any, limit: float = math.inf) -> float:
    """Return a value as a float. Raise ValueError if it is no finite number, or not in the limits.

    Args:
        limit: if it is 1, the value must be from 0 to 1.
    """
    number = math.nan
    with suppress(Exception):  # a scorer can return an object of any class
        number = float(value if not isinstance(value, str | bytes) else "nan")
    if math.isfinite(number) and (limit == math.inf or 0 <= number <= limit):
        return number
    shown = type(value).__name__
    with suppress(Exception):  # such as ValueError for an int of 5,000 digits
        shown = reprlib.repr(value)
    needed = "finite number" if limit == math.inf else "number from 0 to 1"
    raise ValueError(f"it returned {shown}, which is no {needed}")


def _finished(value: Any) -> Any:
    """Return the result of a call, which is awaited if the function is `async`."""

    async def result() -> Any:
        return await value

    return asyncio.run(result()) if inspect.isawaitable(value) else value


def _columns(answer: RewardedAnswer) -> dict[str, object]:
    """Return what a function gets of a row and its answer. The row's own columns come first."""
    reference = {REFERENCE: answer.row.reference} if answer.row.is_answered else {}
    facts = {"finished": answer.finished, "answer_tokens": len(answer.ids)}
    return {**facts, **reference, **answer.row.row}


def load_own_scorer(name: str) -> OwnScorer:
    """Load the user's scorer `file.py:function`.

    Raise UsageError if the file cannot be loaded, lacks the function, or if the function has the
    form of another tool.
    """
    path, function_name = own_scorer_file(name)
    where = f"--score {name}"
    module = ModuleType(f"tunesmith_scorer_{path.stem}")
    module.__file__ = str(path)
    # Register the module in sys.modules, because decorators such as `dataclass` look up the module
    # of a class by name.
    sys.modules[module.__name__] = module
    try:
        # Execute the file instead of importing it. An import would write __pycache__ next to it.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise broken_scorer_file(path, where, error) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise no_scorer_function(path, function_name, where)
    return OwnScorer(name, function, _takes_group(function, function_name, where))


def _takes_group(function: Callable[..., Any], name: str, where: str) -> bool:
    """Return whether a function has TRL's form. Raise UsageError if it has another tool's form."""
    what = f"{name} is a class"
    if not inspect.isclass(function):
        what = f"{name}(...) is no scorer"
        # The parameters of some functions in C are not known, or do not fit.
        with suppress(TypeError, ValueError):
            signature = inspect.signature(function)
            names = signature.parameters.keys()
            if "completions" in names:
                return True
            what = f"{name}({', '.join(names)}) is no scorer"
            signature.bind("", {})
            if names.isdisjoint(_OTHER_TOOLS):
                return False
    raise UsageError(
        what,
        where=where,
        why="a scorer is a function f(answer, row), or TRL's f(completions, **columns)",
        fix=f"write a function that calls {name}: def score(answer, row): return {name}(...); "
        'answer is the text, and row["NAME"] is a column of the row',
    )

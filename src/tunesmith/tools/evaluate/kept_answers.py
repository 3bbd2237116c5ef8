"""Rejection sampling: the answers of a model that a scorer accepts become rows for SFT.

Sources: Zelikman et al. 2022, arXiv:2203.14465 (STaR); Yuan et al. 2023, arXiv:2308.01825 (RFT).
"""

import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.answers.scoring.process import ScorerPool
from tunesmith.answers.scoring.scorers import scorer_label
from tunesmith.config.schema import Source
from tunesmith.errors import UsageError
from tunesmith.tools.evaluate.generate import AnsweredRow, RowPrompt, row_with_answer
from tunesmith.units import count_of

_CONDITION = re.compile(r"\s*score\s*(>=|>|==)\s*(\d+\.?\d*|\.\d+)\s*")
_OPERATORS = {">=": operator.ge, ">": operator.gt, "==": operator.eq}
Condition = Callable[[float], bool]
# Formats whose rows have one answer, which a sampled answer can replace.
_SINGLE_ANSWER_FORMATS = ("prompt-completion", "alpaca", "messages", "sharegpt")


def read_condition(text: str) -> Condition:
    """Parse the condition of `--keep`, such as `score >= 1`, to a function of the score.

    Raise UsageError if it has another form.
    """
    match = _CONDITION.fullmatch(text)
    if not match:
        raise UsageError(
            f"the condition {text!r} cannot be read",
            where="--keep",
            why="a condition compares the score with a number, by >=, > or ==",
            fix='use for example --keep "score >= 1"',
        )
    accepts, limit = _OPERATORS[match[1]], float(match[2])
    return lambda score: bool(accepts(score, limit))


class KeptAnswers:
    """Selection of answers by their scores. Use its `pool` in a `with` statement.

    Args:
        scorer: name of the scorer.
        condition: the condition of `--keep`; None: all answers are written, with their scores.
        source: format and columns of the rows.
        cancelled: see `ScorerPool.score_all`.

    Attributes:
        pool: the processes of the scorer.
        sampled, cut, kept: the numbers of answers so far. Answers that were cut off at
            --max-new-tokens are not kept.

    Raise UsageError if the scorer cannot be used, or if rows of this format have no single answer.
    """

    def __init__(
        self,
        scorer: str,
        condition: Condition | None,
        source: Source,
        cancelled: Callable[[], bool],
    ) -> None:
        if condition is not None and source.format not in _SINGLE_ANSWER_FORMATS:
            raise UsageError(
                f"answers to rows of the format {source.format} cannot be kept as rows for SFT",
                where="--keep",
                why=f"only rows of the formats {', '.join(_SINGLE_ANSWER_FORMATS)} have one answer",
                fix="convert the rows to prompt and completion",
            )
        self.scorer = scorer
        self.cancelled = cancelled
        self.condition = condition
        self.source = source
        self.sampled = 0
        self.cut = 0
        self.kept = 0
        self.pool = ScorerPool([scorer], count=min(4, os.cpu_count() or 1))

    def check(self, prompts: Sequence[RowPrompt]) -> None:
        """Raise DataError if the scorer cannot score a row."""
        for prompt in prompts:
            self.pool.check(self.scorer, prompt.scored)

    def select(self, answered: AnsweredRow) -> Iterator[dict[str, Any]]:
        """Yield the rows to write for the answers to one row. Equal answers are kept once.

        Raise RunError if the scorer fails for several answers.
        """
        asked = answered.scored
        scores = self.pool.score_all(self.scorer, answered.answers, self.cancelled)
        self.sampled += len(scores)
        seen = set()
        label = scorer_label(self.scorer)
        for row, answer, found in zip(
            answered.with_output(), answered.answers, scores, strict=True
        ):
            score = found[label] if found else None
            self.cut += not answer.finished
            if self.condition is None:
                yield {**row, "score": score}
                continue
            text = row.pop("output")
            is_accepted = score is not None and self.condition(score)
            if not answer.finished or not is_accepted or text in seen:
                continue
            seen.add(text)
            self.kept += 1
            kept = row_with_answer(asked.row, self.source, asked.where, text)
            yield {**row, **kept, "score": score, "where": Path(asked.where).name}

    def summary(self) -> str:
        """Return the line that the command prints at its end."""
        text = f"kept {self.kept:,} of {count_of(self.sampled, 'answer')}"
        if self.cut:
            text += f"; {self.cut:,} were cut off at --max-new-tokens and are not kept"
        return text

"""The reward of reinforcement learning: the weighted sum of the recipe's scorers."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tunesmith.answers.scoring.process import ScorerPool
from tunesmith.answers.scoring.rows import read_call_form
from tunesmith.answers.scoring.scorers import (
    TOOL_CALL,
    AnswerScores,
    RewardedAnswer,
    check_scorer_names,
    scorer_label,
)
from tunesmith.config.schema import MethodConfig
from tunesmith.tokens.text.template import Template


class Reward(ScorerPool):
    """The reward of a recipe. Its scorers run in several processes.

    Args:
        method: the recipe's `method`, with `reward`.
        template: template of the model, which determines the form of tool calls.
        count: number of processes.

    Raise UsageError if a scorer does not exist.
    """

    def __init__(self, method: MethodConfig, template: Template, count: int = 1) -> None:
        self.names = check_scorer_names(method.reward)
        self.weights = method.reward_weights or (1.0,) * len(self.names)
        reader = read_call_form(template) if TOOL_CALL in self.names else None
        super().__init__(self.names, reader, method.reward_seconds, math.inf, count=count)

    def of(
        self,
        answers: Sequence[RewardedAnswer],
        cancelled: Callable[[], bool] = lambda: False,
        state: Mapping[str, float] = {},
    ) -> tuple[np.ndarray, list[AnswerScores]]:
        """Return the reward of each answer, fp64 [n], and its scores by the names in records.

        A reward is the weighted sum of the scores. A scorer that fails gives 0. A function of TRL's
        form can leave an answer out (None). An answer without any score gets the mean reward of the
        other answers to its row, so that it teaches nothing.

        Args:
            answers: answers to several rows. All answers to one row follow each other.
            cancelled, state: see `ScorerPool.score_all`.

        Raise RunError if a scorer fails often.
        """
        scores: list[AnswerScores] = [{} for _ in answers]
        sums = np.zeros(len(answers))
        counts = np.zeros(len(answers))
        for name, weight in zip(self.names, self.weights, strict=True):
            label = scorer_label(name)
            for i, found in enumerate(self.score_all(name, answers, cancelled, state)):
                scores[i] |= {label: 0.0} if found is None else found
                if label in scores[i]:
                    sums[i] += weight * scores[i][label]
                    counts[i] += 1
        rows = np.array([id(answer.row) for answer in answers])
        for i in np.flatnonzero(counts == 0).tolist():
            others = sums[(rows == rows[i]) & (counts > 0)]
            sums[i] = others.mean() if len(others) else 0.0
        return sums, scores

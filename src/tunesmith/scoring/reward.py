"""The reward of reinforcement learning: the weighted sum of the recipe's scorers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tunesmith.config.schema import MethodConfig
from tunesmith.data.text.template import Template
from tunesmith.scoring.process import ScorerPool
from tunesmith.scoring.rows import read_call_form
from tunesmith.scoring.scorers import TOOL_CALL, ScoredRow, check_scorer_names


class RewardedAnswer(NamedTuple):
    """An answer to a row.

    Attributes:
        text: the text without special tokens.
        raw: the text with special tokens.
    """

    text: str
    raw: str
    row: ScoredRow


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
        super().__init__(self.names, reader, method.reward_seconds, count=count)

    def of(
        self,
        answers: Sequence[RewardedAnswer],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Return the reward of each answer, fp64 [n]. A scorer that fails gives 0.

        Args:
            cancelled: function that is called after each score. If it returns True, the remaining
                answers are not scored.

        Raise RunError if a scorer fails often.
        """
        rewards = np.zeros(len(answers))
        for name, weight in zip(self.names, self.weights, strict=True):
            # Tool calls and some references contain special tokens.
            items = [
                (raw if name == TOOL_CALL or row.is_special else text, row)
                for text, raw, row in answers
            ]
            scores = self.scores(name, items, cancelled)
            rewards += weight * np.array([score or 0.0 for score in scores])
        return rewards

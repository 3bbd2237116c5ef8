"""Odds ratio preference optimization: Hong et al. 2024, arXiv:2403.07691.

    odds(y) = p(y) / (1 - p(y))        with p(y) of the mean log-probability of a token
    loss = cross-entropy of chosen - beta * log sigmoid(log (odds(chosen) / odds(rejected)))

It needs no reference. The cross-entropy is that of the supervised tokens, as everywhere here;
TRL's takes the prompt's too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches.batch import Batch
from tunesmith.methods.answers import PAIR_METRICS, answer_logprobs, pair_metrics
from tunesmith.methods.base import MethodOutput, OfExamples, StepTotals, TrainModel


class OddsRatioPreferenceOptimization(OfExamples):
    """Mean over the pairs of the global batch, and over the tokens of its chosen answers."""

    metrics = PAIR_METRICS

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        answers = answer_logprobs(model, batch)
        chosen_sum, _ = answers.pairs(answers.logprobs)
        chosen, rejected = answers.pairs(answers.per_token())
        log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
        beta = self.config.beta
        loss = -beta * F.logsigmoid(log_odds_ratio).sum()
        loss = loss + self.cross_entropy(chosen_sum, batch, totals)
        metrics = pair_metrics(beta * chosen, beta * rejected, chosen, rejected)
        return MethodOutput(loss, self.denominator(batch), metrics)


def _log_odds(logprobs: Tensor) -> Tensor:
    """log (p / (1 - p)) of log p, exact for p near 0 and near 1."""
    return logprobs - torch.log(-torch.expm1(logprobs))

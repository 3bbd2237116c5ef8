"""Odds ratio preference optimization (ORPO): Hong et al. 2024, arXiv:2403.07691.

    odds(y) = p(y) / (1 - p(y)), where log p(y) is the mean log-probability per token
    loss = cross-entropy of chosen - beta * log sigmoid(log (odds(chosen) / odds(rejected)))

The method needs no reference model. The cross-entropy includes only supervised tokens, as in all
methods of tunesmith. TRL also includes the tokens of the prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.batches.batch import Batch
from tunesmith.methods.pairs import PAIR_METRICS, answer_logprobs, pair_metrics, split_pairs
from tunesmith.train_model import MeanOverExamples, MethodOutput, StepTotals, TrainModel


class OddsRatioPreferenceOptimization(MeanOverExamples):
    """ORPO loss: the mean preference loss per pair, plus the cross-entropy per token of chosen
    answers. Both are means over the global batch.
    """

    metrics = PAIR_METRICS

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        answers = answer_logprobs(model, batch)
        chosen_sum, _ = split_pairs(answers.logprobs)
        chosen, rejected = split_pairs(answers.per_token())
        preference = F.logsigmoid(_log_odds(chosen) - _log_odds(rejected)).sum()
        beta = self.config.beta
        loss = -beta * preference + self.cross_entropy(chosen_sum, batch, totals)
        metrics = pair_metrics(beta * chosen, beta * rejected, chosen, rejected)
        return MethodOutput(loss, self.denominator(batch), metrics)


def _log_odds(logprobs: Tensor) -> Tensor:
    """Compute log (p / (1 - p)) from log p, accurately for p near 0 and near 1."""
    return logprobs - torch.log(-torch.expm1(logprobs))

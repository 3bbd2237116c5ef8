"""Direct preference optimization, and its variants.

    margin = log (p(chosen) / p_ref(chosen)) - log (p(rejected) / p_ref(rejected))

sigmoid: Rafailov et al. 2023, arXiv:2305.18290. ipo: Azar et al. 2023, arXiv:2310.12036, with
log-probabilities a token, as its authors compute it. hinge: Zhao et al. 2023, arXiv:2305.10425.
robust: Chowdhury et al. 2024, arXiv:2403.00409.
"""

import torch.nn.functional as F
from torch import Tensor

from tunesmith.config.schema import MethodConfig
from tunesmith.data.batches.batch import Batch
from tunesmith.methods.answers import (
    PAIR_METRICS,
    answer_logprobs,
    pair_metrics,
    reference_logprobs,
)
from tunesmith.methods.base import MethodOutput, OfExamples, StepTotals, TrainModel


def _losses(margin: Tensor, config: MethodConfig) -> Tensor:
    """Compute the loss of each pair by `method.loss_type`, [pairs]."""
    scaled = config.beta * margin
    if config.loss_type == "ipo":
        return (margin - 1 / (2 * config.beta)) ** 2
    if config.loss_type == "hinge":
        return F.relu(1 - scaled)
    if config.loss_type == "robust":
        swapped = config.label_smoothing
        as_labeled = F.logsigmoid(scaled)
        as_swapped = F.logsigmoid(-scaled)
        return (swapped * as_swapped - (1 - swapped) * as_labeled) / (1 - 2 * swapped)
    return -F.logsigmoid(scaled)


class DirectPreferenceOptimization(OfExamples):
    """Mean loss of a pair over the global batch, by `method.loss_type`.

    With `sft_weight` the mean cross-entropy of the chosen answers' tokens is added.
    """

    metrics = PAIR_METRICS
    needs_reference = True

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        reference = reference_logprobs(model, batch)
        answers = answer_logprobs(model, batch)
        chosen, rejected = answers.pairs(answers.logprobs)
        chosen_ratio, rejected_ratio = answers.pairs(answers.logprobs - reference)
        margin = chosen_ratio - rejected_ratio
        if self.config.loss_type == "ipo":
            ratios = (answers.logprobs - reference) / answers.lengths
            chosen_mean, rejected_mean = answers.pairs(ratios)
            margin = chosen_mean - rejected_mean
        loss = _losses(margin, self.config).sum()
        if self.config.sft_weight:
            loss = loss + self.config.sft_weight * self.cross_entropy(chosen, batch, totals)
        beta = self.config.beta
        metrics = pair_metrics(beta * chosen_ratio, beta * rejected_ratio, chosen, rejected)
        return MethodOutput(loss, self.denominator(batch), metrics)

"""Direct preference optimization (DPO) and its variants.

    margin = log (p(chosen) / p_ref(chosen)) - log (p(rejected) / p_ref(rejected))

Sources: sigmoid: Rafailov et al. 2023, arXiv:2305.18290. ipo: Azar et al. 2023, arXiv:2310.12036,
with log-probabilities per token, as its authors compute it. hinge: Zhao et al. 2023,
arXiv:2305.10425. robust: Chowdhury et al. 2024, arXiv:2403.00409.
"""

import torch.nn.functional as F
from torch import Tensor

from tunesmith.batches.batch import Batch
from tunesmith.config.schema import MethodConfig
from tunesmith.methods.pairs import (
    PAIR_METRICS,
    answer_logprobs,
    pair_metrics,
    reference_logprobs,
    split_pairs,
)
from tunesmith.train_model import MeanOverExamples, MethodOutput, StepTotals, TrainModel


def _losses(margin: Tensor, config: MethodConfig) -> Tensor:
    """Compute the loss of each pair for `method.loss_type`, [pairs]."""
    scaled = config.beta * margin
    if config.loss_type == "ipo":
        return (margin - 1 / (2 * config.beta)) ** 2
    if config.loss_type == "hinge":
        return F.relu(1 - scaled)
    if config.loss_type == "robust":
        swapped = config.label_smoothing
        as_swapped = swapped * F.logsigmoid(-scaled)
        as_labeled = (1 - swapped) * F.logsigmoid(scaled)
        return (as_swapped - as_labeled) / (1 - 2 * swapped)
    return -F.logsigmoid(scaled)


class DirectPreferenceOptimization(MeanOverExamples):
    """DPO loss: the mean over the pairs of the global batch. `method.loss_type` selects the
    variant.

    If `sft_weight` is set, the mean cross-entropy of the chosen answers' tokens is added.
    """

    metrics = PAIR_METRICS

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        config = self.config
        reference = reference_logprobs(model, batch)
        answers = answer_logprobs(model, batch)
        chosen, rejected = split_pairs(answers.logprobs)
        ratios = answers.logprobs - reference
        chosen_ratio, rejected_ratio = split_pairs(ratios)
        margin = chosen_ratio - rejected_ratio
        if config.loss_type == "ipo":
            chosen_mean, rejected_mean = split_pairs(ratios / answers.lengths)
            margin = chosen_mean - rejected_mean
        loss = _losses(margin, config).sum()
        if config.sft_weight:
            loss = loss + config.sft_weight * self.cross_entropy(chosen, batch, totals)
        beta = config.beta
        metrics = pair_metrics(beta * chosen_ratio, beta * rejected_ratio, chosen, rejected)
        return MethodOutput(loss, self.denominator(batch), metrics)

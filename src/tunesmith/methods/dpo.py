"""Direct preference optimization, and its variants.

    margin = log (p(chosen) / p_ref(chosen)) - log (p(rejected) / p_ref(rejected))

sigmoid: Rafailov et al. 2023, arXiv:2305.18290. ipo: Azar et al. 2023, arXiv:2310.12036, with
log-probabilities a token, as its authors compute it. hinge: Zhao et al. 2023, arXiv:2305.10425.
robust: Chowdhury et al. 2024, arXiv:2403.00409.
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from tunesmith.config.schema import MethodConfig
from tunesmith.data.batches.batch import Batch
from tunesmith.methods.answers import (
    PAIR_METRICS,
    Answers,
    answer_logprobs,
    pair_metrics,
    reference_logprobs,
)
from tunesmith.methods.base import MethodOutput, OfExamples, StepTotals, TrainModel


def _sigmoid(margin: Tensor, config: MethodConfig) -> Tensor:
    return -F.logsigmoid(config.beta * margin)


def _hinge(margin: Tensor, config: MethodConfig) -> Tensor:
    return F.relu(1 - config.beta * margin)


def _ipo(margin: Tensor, config: MethodConfig) -> Tensor:
    return (margin - 1 / (2 * config.beta)) ** 2


def _robust(margin: Tensor, config: MethodConfig) -> Tensor:
    swapped = config.label_smoothing
    as_labeled = F.logsigmoid(config.beta * margin)
    as_swapped = F.logsigmoid(-config.beta * margin)
    return (swapped * as_swapped - (1 - swapped) * as_labeled) / (1 - 2 * swapped)


_LOSSES: Mapping[str, Callable[[Tensor, MethodConfig], Tensor]] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
}


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
        loss = _LOSSES[self.config.loss_type](self._margin(answers, reference), self.config).sum()
        if self.config.sft_weight:
            loss = loss + self.config.sft_weight * self.cross_entropy(chosen, batch, totals)
        beta = self.config.beta
        metrics = pair_metrics(beta * chosen_ratio, beta * rejected_ratio, chosen, rejected)
        return MethodOutput(loss, self.denominator(batch), metrics)

    def _margin(self, answers: Answers, reference: Tensor) -> Tensor:
        """Compute how much more than the reference the model prefers chosen answers, [pairs]."""
        ratios = answers.logprobs - reference
        if self.config.loss_type == "ipo":
            ratios = ratios / answers.lengths
        chosen, rejected = answers.pairs(ratios)
        return chosen - rejected

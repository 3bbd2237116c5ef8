"""Simple preference optimization (SimPO): Meng et al. 2024, arXiv:2405.14734.

    loss = -log sigmoid(beta * (mean log p(chosen) - mean log p(rejected)) - gamma)

The means are over the tokens of an answer. The method needs no reference model.
"""

import torch.nn.functional as F

from tunesmith.batches.batch import Batch
from tunesmith.methods.pairs import PAIR_METRICS, answer_logprobs, pair_metrics, split_pairs
from tunesmith.train_model import MeanOverExamples, MethodOutput, StepTotals, TrainModel


class SimplePreferenceOptimization(MeanOverExamples):
    """SimPO loss: the mean over the pairs of the global batch."""

    metrics = PAIR_METRICS

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        answers = answer_logprobs(model, batch)
        chosen, rejected = split_pairs(answers.per_token())
        beta = self.config.beta
        margin = beta * (chosen - rejected) - self.config.simpo_gamma
        loss = -F.logsigmoid(margin).sum()
        metrics = pair_metrics(beta * chosen, beta * rejected, chosen, rejected)
        return MethodOutput(loss, self.denominator(batch), metrics)

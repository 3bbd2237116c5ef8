"""Supervised fine-tuning (SFT): cross-entropy of the next token at all labeled positions."""

from tunesmith.batches.batch import Batch
from tunesmith.batches.loader import GlobalBatch
from tunesmith.train_model import (
    Method,
    MethodOutput,
    StepTotals,
    TrainModel,
    supervised_positions,
)


class SupervisedFineTuning(Method):
    """SFT loss: the mean over the supervised tokens of the global batch, in nats.

    Only supervised positions reach the output layer.
    """

    def denominator(self, batch: Batch | GlobalBatch) -> int:
        return batch.supervised

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        index, targets = supervised_positions(batch)
        loss = model.loss(model.hidden(batch).index_select(0, index), targets)
        return MethodOutput(loss, self.denominator(batch))

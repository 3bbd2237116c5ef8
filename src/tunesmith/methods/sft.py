"""Supervised fine-tuning: the cross-entropy of the next token, wherever the batch has a label."""

from __future__ import annotations

from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.methods.base import TrainModel, supervised


def sft(model: TrainModel, batch: Batch) -> tuple[Tensor, int]:
    """Loss sum in nats and the number of supervised positions. Only these reach the head."""
    index, targets = supervised(batch)
    return model.loss(model.hidden(batch).index_select(0, index), targets), batch.supervised

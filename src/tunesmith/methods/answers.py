"""Whole answers and their log-probabilities, which methods that learn from preferences compare."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.data.batches.batch import Batch
from tunesmith.methods.base import TrainModel, supervised_positions


class Answers(NamedTuple):
    """The answers of a micro batch, in the order of its sequences.

    Attributes:
        logprobs: fp64 [sequences], the log-probability of each, with gradient.
        lengths: int64 [sequences], supervised tokens of each.
    """

    logprobs: Tensor
    lengths: Tensor

    def per_token(self) -> Tensor:
        """fp64 [sequences], mean log-probability of a token."""
        return self.logprobs / self.lengths

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split values of all sequences into the chosen and the rejected ones, [pairs] each."""
        return values[0::2], values[1::2]


def answer_logprobs(model: TrainModel, batch: Batch) -> Answers:
    """The log-probability of each answer: a sum over its supervised tokens.

    Only these positions reach the head, and their logits exist a chunk at a time. Sums are computed
    in fp64 and in the order of the tokens: that of thousands of fp32 numbers would depend on how
    many there are.
    """
    index, targets = supervised_positions(batch)
    hidden = model.hidden(batch).index_select(0, index)
    logprobs = model.logprobs(hidden, targets).double()
    sequences = batch.sequences
    if sequences is None or not sequences.total:
        # Nothing but padding, on a rank that has too few examples: its backward is still needed.
        empty = logprobs.sum().expand(0)
        return Answers(empty, torch.zeros(0, dtype=torch.int64, device=empty.device))
    sums = torch.segment_reduce(logprobs, "sum", lengths=sequences.lengths)
    return Answers(sums, sequences.lengths)


@torch.no_grad()
def reference_logprobs(model: TrainModel, batch: Batch) -> Tensor:
    """fp64 [sequences]: log-probabilities under the model that training began from.

    They come with the batch where they were computed before training, and otherwise from a forward
    of the same rows with the weights of then, without dropout.
    """
    if batch.sequences is not None and batch.sequences.reference is not None:
        return batch.sequences.reference
    if model.reference is None:
        if batch.examples:
            raise RuntimeError(
                "the method needs a reference, but the batch and the model have none"
            )
        # Nothing but padding, on a rank that has too few examples.
        return torch.zeros(0, dtype=torch.float64, device=batch.input_ids.device)
    is_training = model.training
    model.eval()
    try:
        with model.reference():
            return answer_logprobs(model, batch).logprobs
    finally:
        model.train(is_training)


def pair_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen: Tensor, rejected: Tensor
) -> Mapping[str, Tensor]:
    """The sums over pairs that a step's record has as means; see PAIR_METRICS.

    Args:
        chosen_rewards, rejected_rewards: [pairs], how much the method values each answer.
        chosen, rejected: [pairs], log-probabilities.
    """
    margins = chosen_rewards - rejected_rewards
    values = (
        chosen_rewards,
        rejected_rewards,
        margins,
        accuracy(margins),
        chosen,
        rejected,
    )
    return {name: value.detach().sum() for name, value in zip(PAIR_METRICS, values, strict=True)}


def accuracy(margins: Tensor) -> Tensor:
    """1 where the better answer is valued more, 0.5 where both are valued alike, else 0."""
    return (margins.detach().sign() + 1) / 2


REWARD_ACCURACY = "reward_accuracy"
PAIR_METRICS = (
    "rewards_chosen",
    "rewards_rejected",
    "reward_margin",
    REWARD_ACCURACY,
    "logps_chosen",
    "logps_rejected",
)

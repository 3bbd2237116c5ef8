"""Log-probabilities of entire answers, which preference methods compare."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.batches.batch import Batch
from tunesmith.train_model import TrainModel, evaluating, supervised_positions


class Answers(NamedTuple):
    """Log-probabilities and lengths of the answers in a micro batch, in the order of its sequences.

    Attributes:
        logprobs: fp64 [sequences], the log-probability of each answer, with gradient.
        lengths: int64 [sequences], number of supervised tokens of each answer.
    """

    logprobs: Tensor
    lengths: Tensor

    def per_token(self) -> Tensor:
        """Return the mean log-probability per token, fp64 [sequences]."""
        return self.logprobs / self.lengths


def split_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split [sequences] values into those of chosen and those of rejected answers, [pairs] each."""
    return values[0::2], values[1::2]


def answer_logprobs(model: TrainModel, batch: Batch) -> Answers:
    """Compute the log-probability of each answer, the sum over its supervised tokens.

    Only supervised positions reach the output layer, and logits are computed in chunks. The
    log-probabilities of an answer are added in fp64 and in token order. In fp32, the rounding error
    of the sum would grow with the number of tokens.
    """
    index, targets = supervised_positions(batch)
    # Do not keep the hidden states of the other positions while the logits are computed.
    hidden = model.hidden(batch).index_select(0, index)
    logprobs = model.logprobs(hidden, targets).double()
    sequences = batch.sequences
    if sequences is None or not sequences.total:
        # This rank has no example left, so its batch contains only padding. The empty result has a
        # gradient, because the rank must still run a backward.
        empty = logprobs.sum().expand(0)
        return Answers(empty, empty.to(torch.int64))
    sums = torch.segment_reduce(logprobs, "sum", lengths=sequences.lengths)
    return Answers(sums, sequences.lengths)


@torch.no_grad()
def reference_logprobs(model: TrainModel, batch: Batch) -> Tensor:
    """Return log-probabilities under the model at the start of training, fp64 [sequences].

    If the values were computed before training, the batch contains them. Otherwise they are
    computed by a forward with the initial weights and without dropout.
    """
    if batch.sequences is not None and batch.sequences.reference is not None:
        return batch.sequences.reference
    if model.reference is None:
        if batch.examples:
            raise RuntimeError(
                "the method needs log-probabilities of a reference model, but the batch has none, "
                "and there is no reference model"
            )
        # This rank has no example left, so its batch contains only padding.
        return torch.zeros(0, dtype=torch.float64, device=batch.input_ids.device)
    with evaluating(model), model.reference():
        return answer_logprobs(model, batch).logprobs


def pair_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen: Tensor, rejected: Tensor
) -> Mapping[str, Tensor]:
    """Return the sum of each metric in PAIR_METRICS over the pairs. A step's record has the means.

    Args:
        chosen_rewards, rejected_rewards: [pairs], implicit reward of each answer.
        chosen, rejected: [pairs], log-probability of each answer.
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
    """Return 1 for each positive margin, 0.5 for a margin of zero, and 0 for a negative margin."""
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

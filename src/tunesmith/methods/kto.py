"""Kahneman-Tversky optimization (KTO): Ethayarajh et al. 2024, arXiv:2402.01306.

    reward = beta * log (p(y) / p_ref(y))
    loss = w_good * (1 - sigmoid(reward - beta KL))    for a good answer
           w_bad * (1 - sigmoid(beta KL - reward))     for a bad answer

KL is the mean of log (p(y') / p_ref(y')), where y' is the answer of another row in the global
batch. A negative mean is replaced by 0. KL has no gradient. It is computed before the losses and
over all ranks, so packing, micro batch and number of ranks do not change it.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.batches.batch import Batch
from tunesmith.methods.pairs import answer_logprobs, reference_logprobs
from tunesmith.train_model import MeanOverExamples, MethodOutput, StepTotals, TrainModel

KL = "kl"
GOOD_SHARE = "good_share"
KTO_METRICS = (
    "rewards_chosen",
    "rewards_rejected",
    "logps_chosen",
    "logps_rejected",
    GOOD_SHARE,
    KL,
)


class KahnemanTverskyOptimization(MeanOverExamples):
    """KTO loss: the mean over the answers of the global batch."""

    metrics = KTO_METRICS
    needs_mismatched = True

    def begin_step(
        self, model: TrainModel, totals: StepTotals, add_up: Callable[[Tensor], object]
    ) -> StepTotals:
        """Estimate KL from `totals.mismatched`. This is a collective call of the data ranks."""
        total = torch.zeros((), dtype=torch.float64, device=model.model.device)
        with torch.no_grad():
            for batch in totals.mismatched:
                total += model(batch, _log_ratio_sum)
        add_up(total)
        return totals._replace(kl=(total / totals.examples).clamp_min(0))

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        config = self.config
        reference = reference_logprobs(model, batch)
        logprobs = answer_logprobs(model, batch).logprobs
        ratios = logprobs - reference
        is_good = logprobs.new_zeros(len(logprobs), dtype=torch.bool)
        if batch.sequences is not None:
            is_good = batch.sequences.labels
        kl = totals.kl if totals is not None and totals.kl is not None else ratios.new_zeros(())
        distance = torch.where(is_good, ratios - kl, kl - ratios)
        weights = torch.full_like(ratios, config.undesirable_weight)
        weights = weights.masked_fill(is_good, config.desirable_weight)
        losses = weights * (1 - F.sigmoid(config.beta * distance))
        rewards = (config.beta * ratios).detach()
        logprobs = logprobs.detach()
        values = (
            rewards[is_good].sum(),
            rewards[~is_good].sum(),
            logprobs[is_good].sum(),
            logprobs[~is_good].sum(),
            is_good.sum(),
            kl * len(ratios),
        )
        return MethodOutput(
            losses.sum(), self.denominator(batch), dict(zip(KTO_METRICS, values, strict=True))
        )

    def finish(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics as means over the good and over the bad answers, and the difference
        between the mean rewards of both.

        If the batch has no good answers or no bad answers, their means and the difference are
        missing.
        """
        finished = dict(metrics)
        good = finished.pop(GOOD_SHARE)
        shares = {
            "rewards_chosen": good,
            "logps_chosen": good,
            "rewards_rejected": 1 - good,
            "logps_rejected": 1 - good,
        }
        for name, share in shares.items():
            mean = finished.pop(name)
            if share > 0:
                finished[name] = mean / share
        if 0 < good < 1:
            finished["reward_margin"] = finished["rewards_chosen"] - finished["rewards_rejected"]
        return finished


def _log_ratio_sum(model: TrainModel, batch: Batch) -> Tensor:
    """Compute log (p / p_ref), summed over the answers of a batch."""
    return (answer_logprobs(model, batch).logprobs - reference_logprobs(model, batch)).sum()

"""Group relative policy optimization (GRPO) and its variants, with one update per batch.

    loss = - 1 / tokens * sum over tokens of weight(answer) * p(token) / p_old(token)

The answers are sampled with the weights of the step, so p_old is p, the ratio is 1, and clipping
has no effect. The gradient is that of - sum of weight(answer) * log p(answer). The weight of an
answer is its advantage, which is its reward minus the mean reward of the answers to the same prompt
(`answer_weights`).

With `beta`, the loss also has beta / tokens * sum over tokens of p / p_old * k3(token). The ratio
p / p_old makes its gradient an unbiased estimate of the gradient of KL(model || base).

Sources: grpo: Shao et al. 2024, arXiv:2402.03300. dapo (mean over tokens): Yu et al. 2025,
arXiv:2503.14476. dr_grpo: Liu et al. 2025, arXiv:2503.20783. rloo: Ahmadian et al. 2024,
arXiv:2402.14740. The KL estimate k3: Schulman 2020, http://joschu.net/blog/kl-approx.html. The
ratio in the penalty: DeepSeek-AI 2025, arXiv:2512.02556.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tunesmith.batches.batch import Batch
from tunesmith.batches.loader import GlobalBatch
from tunesmith.config.schema import MethodConfig
from tunesmith.errors import RunError
from tunesmith.train_model import (
    Method,
    MethodOutput,
    StepTotals,
    TrainModel,
    evaluating,
    supervised_positions,
)

# Added to the standard deviation of the rewards, as in TRL.
STD_EPSILON = 1e-4
# Maximum KL divergence per token of the sampler from the trainer. Both use the same modules and
# differ only by rounding. In bf16, 3e-4 was measured, and 3e-3 with Transformers' `generate`.
MAX_SAMPLER_KL = 0.01


def answer_weights(rewards: np.ndarray, lengths: np.ndarray, config: MethodConfig) -> np.ndarray:
    """Return the weight of each answer in the loss, fp64 [prompts, group].

    The loss divides by the number of tokens of all answers. A variant that divides by another
    number is expressed by its weights.

    Args:
        rewards: fp64 [prompts, group].
        lengths: int64 [prompts, group], the number of tokens of each answer.
    """
    advantages = rewards - rewards.mean(1, keepdims=True)
    scales = config.scale_rewards
    if scales is None:
        scales = config.variant == "grpo"
    if scales:
        advantages = advantages / (rewards.std(1, ddof=1, keepdims=True) + STD_EPSILON)
    tokens = lengths.sum()
    group = rewards.shape[1]
    if config.variant == "grpo":
        # Mean over answers of the mean over their tokens.
        return advantages * tokens / (rewards.size * lengths)
    if config.variant == "dr_grpo":
        return advantages * tokens / (rewards.size * config.answer_tokens)
    if config.variant == "rloo":
        # Mean over answers of the sum over their tokens. r - mean of the others is G / (G - 1)
        # times r - mean of all.
        return advantages * group / (group - 1) * tokens / rewards.size
    return advantages


def k3(logprobs: Tensor, others: Tensor) -> Tensor:
    """Return Schulman's estimate k3 of KL(p || q) for tokens that were drawn from p.

    Args:
        logprobs, others: log-probabilities of the tokens under p and q.
    """
    # In fp32 the result would be lost in rounding, because it is about difference ** 2 / 2.
    difference = (others - logprobs).double()
    return torch.expm1(difference) - difference


class GroupLoss(Method):
    """GRPO loss. If `method.beta` is above 0, a KL penalty to the base model is added."""

    metrics = ("trained_share", "kl_sampler", "kl_base", "entropy_sample")

    def denominator(self, batch: Batch | GlobalBatch) -> int:
        return batch.supervised

    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        logprobs = self._logprobs(model, batch)
        reference = None
        if self.config.beta > 0:
            # Compute the reference for every batch, also for one of only padding: a sharded model
            # gathers its weights in this forward, and the other ranks wait for this rank.
            assert model.reference is not None
            with evaluating(model), model.reference():
                reference = self._logprobs(model, batch)
        sequences = batch.sequences
        if sequences is None or sequences.weights is None or sequences.sampled is None:
            # The batch contains rows as they are in the data, for measurements before training, or
            # only padding: the cross-entropy of their answers.
            loss = -logprobs.double().sum()
            values = dict.fromkeys(self.metrics, torch.zeros_like(loss))
            return MethodOutput(loss, self.denominator(batch), values)
        weights = sequences.weights.index_select(0, sequences.sequence_indices)
        # The ratio of the probabilities is 1, and its gradient is that of log p(answer).
        ratio = (logprobs - logprobs.detach()).exp()
        loss = -(weights * ratio).double().sum()
        kl_base = torch.zeros_like(loss)
        if reference is not None:
            kl_base = (ratio * k3(logprobs, reference)).sum()
            loss = loss + self.config.beta * kl_base
        sampler = k3(sequences.sampled, logprobs.detach()).sum()
        values = {
            "trained_share": torch.full_like(loss, batch.supervised),
            "kl_sampler": sampler,
            "kl_base": kl_base,
            "entropy_sample": -sequences.sampled.double().sum(),
        }
        values = {name: value.detach() for name, value in values.items()}
        return MethodOutput(loss, self.denominator(batch), values)

    def _logprobs(self, model: TrainModel, batch: Batch) -> Tensor:
        """Compute the log-probability of each sampled token at the sampler's temperature."""
        index, targets = supervised_positions(batch)
        hidden = model.hidden(batch).index_select(0, index)
        return model.logprobs(hidden, targets, temperature=self.config.temperature)

    def finish(self, metrics: Mapping[str, float]) -> dict[str, float]:
        # Groups of answers with equal rewards are not computed if they have no gradient. Convert
        # the means over all tokens to means over the computed tokens.
        finished = dict(metrics)
        share = finished.pop("trained_share")
        if self.config.beta == 0:
            del finished["kl_base"]
        return {name: value / share if share else 0.0 for name, value in finished.items()}

    def find_fault(self, metrics: Mapping[str, float]) -> RunError | None:
        # The gradient assumes that the answers were drawn with the probabilities of the trainer.
        divergence = metrics["kl_sampler"]
        if divergence <= MAX_SAMPLER_KL:
            return None
        return RunError(
            f"the sampler and the trainer differ: {divergence:.2g} KL per token",
            where="kl_sampler",
            why=f"at most {MAX_SAMPLER_KL} is allowed; rounding in bf16 gives about 3e-4",
            fix="set model.dtype: fp32, or model.quantize: none",
        )

"""GRPO as a method: its loss, its batches of sampled answers, its validation and its checks."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from tunesmith.answers.decoding import Decoding
from tunesmith.batches.batch import Batch
from tunesmith.batches.loader import GlobalBatch, Loader
from tunesmith.config.schema import Run
from tunesmith.errors import ModelError
from tunesmith.methods.grpo.groups import largest_answer_batch
from tunesmith.methods.grpo.loss import GroupLoss
from tunesmith.methods.grpo.rollouts import RewardedSampling, Rollouts
from tunesmith.metrics.intervals import mean_interval
from tunesmith.train_model import StopRequests, TrainingSession, TrainModel, ValidationResult


class GroupRelativePolicyOptimization(GroupLoss):
    """GRPO: groups of answers to each prompt are sampled, rewarded and trained on."""

    validates_first = True
    sampling: RewardedSampling | None = None

    def find_model_fault(self, model: TrainModel) -> ModelError | None:
        if model.takes_slots:
            return None
        return ModelError(
            "this model cannot be trained with grpo",
            where="method.name",
            why="its layers with chunked attention cannot continue answers",
            fix="use rejection sampling: tunesmith generate --samples --keep",
        )

    def largest_batch(self, run: Run, loader: Loader) -> Batch:
        return largest_answer_batch(run, loader)

    def batches(
        self,
        session: TrainingSession,
        start_step: int,
        stop: StopRequests,
        ends: Callable[[], bool],
    ) -> AbstractContextManager[Iterable[GlobalBatch]]:
        sampling = self._sampling(session)
        return Rollouts(session, sampling, session.loader(start_step), stop, ends)

    def validate(self, session: TrainingSession, stop: StopRequests) -> ValidationResult | None:
        """Return the mean reward of greedy answers to the held-out rows, with its interval.

        The loss is 1 minus the reward.
        """
        held_out = session.data.validation
        assert held_out is not None
        groups = self._sampling(session).sample(
            held_out,
            range(len(held_out)),
            Decoding(session.run.method.answer_tokens),
            answers=1,
            step=0,
            stop=stop,
        )
        if groups is None:
            return None
        interval = mean_interval([rollout.reward for [rollout] in groups])
        metrics = {
            "reward": interval.mean,
            "reward_low": interval.low,
            "reward_high": interval.high,
        }
        return ValidationResult(1 - interval.mean, len(groups), metrics)

    def _sampling(self, session: TrainingSession) -> RewardedSampling:
        """Return the sampler and the processes of the scorers, which all steps share."""
        if self.sampling is None:
            self.sampling = RewardedSampling(session)
        return self.sampling

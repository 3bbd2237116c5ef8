"""Generation of answers to held-out prompts during training, with a time limit."""

import math

from tunesmith.distributed.activity import STUCK_AFTER_S
from tunesmith.errors import DataError
from tunesmith.inference.decoding import AnswerClock, sample_answers
from tunesmith.parallel.shard import sharded_modules
from tunesmith.run_dir import NO_FINAL_ANSWERS, Phase, read_samples
from tunesmith.training.loop_part import LoopPart, LoopShared

# Maximum fraction of the training time for sampling. The limit is this fraction of the training
# time or `log.sample_seconds`, whichever is longer. The answers of the final weights may take the
# entire limit. For other answers, the time of all earlier answers is subtracted from the limit.
MAX_SAMPLING_SHARE = 0.01


class AnswerSampler(LoopPart):
    """Part of the training loop that samples the model's answers to the first held-out prompts."""

    def __init__(self, shared: LoopShared) -> None:
        super().__init__(shared)
        session = self.session
        # If the model is sharded, all ranks must generate together, because the weights are
        # gathered from all ranks for each token.
        self.is_sharded = bool(sharded_modules(session.model))
        self.references = self._read_references()
        self.seconds = 0.0  # seconds of sampling since the run was started or resumed
        self.has_warned = False

    def _read_references(self) -> list[str]:
        """Read the reference answers of the first held-out rows now, because the data file may
        change during the run.
        """
        validation = self.session.data.validation
        if validation is None or not self.ranks.is_main_process:
            return []
        data = self.run.data
        references = []
        for i in range(min(self.run.log.samples, len(validation))):
            try:
                sample = validation.sample(i, data.system)
                answer = self.session.data.template.first_answer(sample, data.train_on)
            except DataError:
                # Some templates cannot render only the turns up to the first answer. There is then
                # no reference answer to show.
                answer = ""
            references.append(answer)
        return references

    def sample(self) -> None:
        """Sample answers and send them to the sinks (terminal, files, trackers), if the time limit
        allows it.

        For a sharded model, this is a collective call.
        """
        self._sample(self.progress.step, self.allowed_seconds())

    def sample_final(self, step: int) -> None:
        """Sample answers of the final weights. Do nothing if answers of this step were already
        sampled.

        For a sharded model, this is a collective call. If there are no answers, the reason is
        logged. If the run also sampled answers before training, there is no time limit, so that the
        user can compare the answers of both times.

        Args:
            step: the step of the final weights.
        """
        sampled = set()
        if self.ranks.is_main_process:
            samples = read_samples(self.out).value
            sampled = {row["step"] for row in samples}
        if self.is_sharded:
            sampled = self.ranks.broadcast_object(sampled)
        if step not in sampled:
            allowed = math.inf if 0 in sampled else self.allowed_seconds(is_final=True)
            reason = self._sample(step, allowed)
            if reason:
                self.sinks.text("samples", f"{NO_FINAL_ANSWERS}{reason}")

    def _sample(self, step: int, allowed: float) -> str:
        """Sample answers and send them to the sinks. Return "", or the reason if there are no
        answers.
        """
        session = self.session
        heartbeat = self.ranks.heartbeat
        heartbeat.phase(Phase.SAMPLES, STUCK_AFTER_S)
        count = self.run.log.samples
        if count == 0:
            return ""
        if not session.data.validation:
            return "no rows are held out"
        if session.mesh.shape.tensor > 1:
            return "tensor parallelism does not support sample answers"
        # If the model is not sharded, only rank 0 generates answers. If it is sharded, every rank
        # takes part, because the weights are gathered from all ranks.
        if not (self.ranks.is_main_process or self.is_sharded):
            return ""
        clock = AnswerClock(
            allowed,
            generated=heartbeat.progress,
            agree=self.ranks.broadcast_object if self.is_sharded else None,
        )
        held_out = session.data.validation.first(count)
        answers = sample_answers(
            session.model,
            session.files.tokenizer,
            held_out,
            session.data.template.end_ids,
            places=[held_out.where(i) for i in range(len(held_out))],
            references=self.references,
            synced=self.is_sharded,
            clock=clock,
        )
        self.seconds += clock.elapsed
        if not clock.late:
            self.sinks.samples(step, answers)
            return "" if answers else "the held-out rows have no prompt"
        reason = (
            f"they would take {clock.predicted:.0f} s, and log.sample_seconds allows "
            f"{clock.allowed:.0f} s"
        )
        if not self.has_warned:
            self.has_warned = True
            self.sinks.text(
                "samples",
                f"no sample answers at step {step}: {reason}; to turn sample answers off, set "
                "log.samples=0",
            )
        return reason

    def allowed_seconds(self, *, is_final: bool = False) -> float:
        """Return the seconds that the next answers may take."""
        allowed = max(self.run.log.sample_seconds, MAX_SAMPLING_SHARE * self.progress.seconds)
        if is_final:
            return allowed
        return max(0.0, allowed - self.seconds)

"""Sample answers to held-out prompts while a run trains, if they cost little of its time."""

import math

from tunesmith.distributed.activity import STUCK_AFTER_S
from tunesmith.errors import DataError
from tunesmith.inference.decoding import AnswerClock, sample_answers
from tunesmith.parallel.shard import sharded_modules
from tunesmith.run_dir import NO_FINAL_ANSWERS, Phase, read_samples
from tunesmith.training.loop_part import LoopPart, LoopShared

# The answers before training and those of the final weights may take `log.sample_seconds` each, or
# this share of the time trained once it is more. Validations between them take what is left.
ANSWER_SHARE = 0.01


class AnswerSampler(LoopPart):
    """Lets the model answer the first held-out prompts, on the ranks that its weights need."""

    def __init__(self, shared: LoopShared) -> None:
        super().__init__(shared)
        session = self.session
        # Of a sharded model all ranks must answer together, to gather its weights.
        self.is_sharded = bool(sharded_modules(session.model))
        self.references = self._read_references()
        self.seconds = 0.0  # that answers took in this start
        self.has_warned = False

    def _read_references(self) -> list[str]:
        """The answers of the first held-out rows, before the file can change."""
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
                # A template that wants more turns than there are up to the first answer.
                answer = ""
            references.append(answer)
        return references

    def sample(self) -> None:
        """Hand answers to the sinks, if there is time left for them; a collective call where the
        model is sharded.
        """
        self._sample(self.progress.step, self.allowed_seconds())

    def sample_final(self, step: int) -> None:
        """Hand answers of the weights of final/ to the sinks, unless `step`, theirs, has some; as
        above. Without answers the log says why.

        Whoever was shown answers from before training is shown these, whatever they take.
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
        """Hand answers to the sinks; return the reason if there are none."""
        session = self.session
        heartbeat = self.ranks.heartbeat
        heartbeat.phase(Phase.SAMPLES, STUCK_AFTER_S)
        count = self.run.log.samples
        if count == 0:
            return ""
        if not session.data.validation:
            return "no rows are held out"
        if session.mesh.shape.tensor > 1:
            return "tensor parallelism does not support them"
        # A whole model answers on rank 0 alone; of a sharded one every rank gathers each layer.
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
        session.model.train()
        self.seconds += clock.elapsed
        if not clock.late:
            self.sinks.samples(step, answers)
            return "" if answers else "the held-out rows have no prompt"
        reason = f"they would take {clock.predicted:.0f} s, and log.sample_seconds allows "
        reason += f"{clock.allowed:.0f} s"
        if not self.has_warned:
            self.has_warned = True
            self.sinks.text(
                "samples",
                f"no sample answers at step {step}: {reason}; log.samples=0 asks for none",
            )
        return reason

    def allowed_seconds(self, *, is_final: bool = False) -> float:
        """Seconds for the answers that are due, which must not cost more than they tell."""
        allowed = max(self.run.log.sample_seconds, ANSWER_SHARE * self.progress.seconds)
        if is_final:
            return allowed
        return max(0.0, allowed - self.seconds)

"""Generation of answers to held-out prompts during training, with a time limit."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from tunesmith.data.text.example import Example
from tunesmith.distributed.activity import STUCK_AFTER_S
from tunesmith.errors import DataError
from tunesmith.inference.answers import answer_batch, decode
from tunesmith.inference.decoding import Decoding
from tunesmith.inference.sampler import Prompt
from tunesmith.methods.base import TrainModel
from tunesmith.metrics.sink import SampleAnswer
from tunesmith.parallel.shard import sharded_modules
from tunesmith.run_dir import NO_FINAL_ANSWERS, Phase, read_samples
from tunesmith.training.loop_part import LoopPart, LoopShared
from tunesmith.units import count_of

# Maximum fraction of the training time for sampling. The limit is this fraction of the training
# time or `log.sample_seconds`, whichever is longer. The answers of the final weights may take the
# entire limit. For other answers, the time of all earlier answers is subtracted from the limit.
MAX_SAMPLING_SHARE = 0.01
SAMPLE_TOKENS = 64  # maximum tokens of a sample answer during training
MIN_SAMPLE_TOKENS = 16  # answers that the time limit cuts off at fewer tokens are not shown


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
        # If ranks generate together, the answers continue until all ranks have reached their
        # deadline. Only rank 0 sends its answers to the sinks.
        clock = Deadline(allowed, heartbeat.progress)
        held_out = session.data.validation.first(count)
        answers = sample_answers(
            session.model,
            session.files.tokenizer,
            held_out,
            session.data.template.end_ids,
            places=[held_out.where(i) for i in range(len(held_out))],
            references=self.references,
            synced=self.is_sharded,
            cancelled=clock.after_token,
        )
        self.seconds += clock.elapsed
        if clock.tokens >= MIN_SAMPLE_TOKENS or clock.elapsed <= allowed:
            self.sinks.samples(step, answers)
            return "" if answers else "the held-out rows have no prompt"
        reason = (
            f"{count_of(clock.tokens, 'token')} took {clock.elapsed:.0f} s, and log.sample_seconds "
            f"allows {clock.allowed:.0f} s"
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


class Deadline:
    """Time limit for sample answers, which ends them at a token.

    Attributes:
        allowed: maximum number of seconds.
        tokens: number of tokens that were generated so far.
    """

    def __init__(self, allowed: float, generated: Callable[[], object]) -> None:
        """Start the clock. The function `generated` is called after each token."""
        self.allowed = allowed
        self.generated = generated
        self.tokens = 0
        self.began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was started."""
        return time.monotonic() - self.began

    def after_token(self) -> bool:
        """Record a token, and return whether the answers must end now."""
        self.generated()
        self.tokens += 1
        return self.elapsed > self.allowed


def sample_answers(
    train_model: TrainModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    stops: Collection[int],
    *,
    places: Sequence[str] = (),
    references: Sequence[str] = (),
    synced: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[SampleAnswer]:
    """Generate greedy answers to a few examples during training.

    All examples are in one batch, so that sharded weights are gathered, and nf4 weights
    dequantized, only once per token.

    Args:
        stops: token ids that end an answer.
        places: file and line of each example's row.
        references: the answer in each example's row.
        synced, cancelled: as for `answer_batch`.
    """
    prompts = []
    expected = []
    rows = []
    for index, example in enumerate(examples):
        # The prompt is the part before the first supervised token. Skip an example whose prompt is
        # empty or only one token.
        start = int(example.trained.argmax())
        if start > 1:
            prompts.append(Prompt(example.ids[:start].tolist(), pictures=example.pictures))
            rows.append(places[index] if places else "")
            # Truncate the reference answer to the maximum length of a sample answer.
            reference = references[index] if references else ""
            reference_ids = tokenizer(reference, add_special_tokens=False)["input_ids"]
            expected.append(decode(tokenizer, reference_ids[:SAMPLE_TOKENS]))
    if not prompts:
        return []
    answers = answer_batch(
        train_model,
        tokenizer,
        prompts,
        Decoding(max_new_tokens=SAMPLE_TOKENS),
        stops=stops,
        cancelled=cancelled,
        synced=synced,
    )
    texts = [decode(tokenizer, prompt.ids) for prompt in prompts]
    written = [answer.text for answer in answers]
    return list(map(SampleAnswer, texts, written, expected, rows))

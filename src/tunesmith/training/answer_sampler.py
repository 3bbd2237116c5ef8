"""Generation of answers to held-out prompts during training, with a time limit."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from tunesmith.answers.answers import answer_batch, decode
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.sampler import Prompt
from tunesmith.distributed.activity import STUCK_AFTER_S
from tunesmith.errors import DataError
from tunesmith.metrics.sink import SampleAnswer
from tunesmith.parallel.shard import sharded_modules
from tunesmith.run_dir import NO_FINAL_ANSWERS, Phase, read_samples
from tunesmith.tokens.text.example import Example
from tunesmith.train_model import TrainModel
from tunesmith.training.loop_part import LoopPart, LoopShared
from tunesmith.units import format_seconds

# Maximum fraction of the training time for sample answers, unless `log.sample_seconds` is longer.
# The answer to one prompt before the first step, and by the final weights, is always complete.
MAX_SAMPLING_SHARE = 0.05
SAMPLE_TOKENS = 64  # maximum tokens of a sample answer during training


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
        self.answer_seconds = 0.0  # seconds of the newest answer to a single prompt
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

    def sample(self, *, is_first: bool = False) -> None:
        """Sample answers and send them to the sinks (terminal, files, trackers), if the time limit
        allows it.

        For a sharded model, this is a collective call.

        Args:
            is_first: whether this is the time before the first step. One prompt is then always
                answered.
        """
        self._sample(self.progress.step, int(is_first))

    def sample_final(self, step: int) -> None:
        """Sample answers of the final weights. Do nothing if answers of this step were already
        sampled.

        For a sharded model, this is a collective call. If there are no answers, the reason is
        logged. Without a time limit, one prompt is answered, and all prompts that were answered
        before training, so that the user can compare the answers.

        Args:
            step: the step of the final weights.
        """
        steps: list[int] = []
        if self.ranks.is_main_process:
            steps = [row["step"] for row in read_samples(self.out).value]
        if self.is_sharded:
            steps = self.ranks.broadcast_object(steps)
        if step not in steps:
            reason = self._sample(step, max(1, steps.count(0)))
            if reason:
                self.sinks.text("samples", f"{NO_FINAL_ANSWERS}{reason}")

    def _sample(self, step: int, required: int) -> str:
        """Sample answers and send them to the sinks. Return "", or the reason if there are no
        answers.

        Args:
            required: number of prompts that are answered without a time limit.
        """
        session = self.session
        self.ranks.heartbeat.phase(Phase.SAMPLES, STUCK_AFTER_S)
        count = self.run.log.samples
        if count == 0:
            return ""
        if not session.data.validation:
            return "no rows are held out"
        if session.mesh.shape.tensor > 1:
            return "tensor parallelism does not support sample answers"
        # If the model is not sharded, only rank 0 generates answers. If it is sharded, every rank
        # takes part, because the weights are gathered from all ranks. Only rank 0 sends its answers
        # to the sinks.
        if not (self.ranks.is_main_process or self.is_sharded):
            return ""
        limit = max(self.run.log.sample_seconds, MAX_SAMPLING_SHARE * self.progress.seconds)
        left = limit - self.seconds
        if not (required or self._agrees(self.answer_seconds <= left)):
            self._warn_once(limit)
            return ""
        # The first answer shows how long the others may take.
        answers = self._answer(0, 1)
        if count > 1:
            if required > 1 or self._agrees(count * self.answer_seconds <= left):
                answers += self._answer(1, count)
            else:
                self._warn_once(limit)
        if self.stop.cancels_validation():
            return "a stop was requested"
        self.sinks.samples(step, answers)
        return "" if answers else "the held-out rows have no prompt"

    def _agrees(self, decision: bool) -> bool:
        """Return the decision of rank 0 if all ranks generate together, because their clocks
        differ.
        """
        return self.ranks.broadcast_object(decision) if self.is_sharded else decision

    def _answer(self, start: int, stop: int) -> list[SampleAnswer]:
        """Answer a range of the held-out prompts in one batch, and measure the time."""
        session = self.session
        assert session.data.validation is not None
        held_out = session.data.validation.first(stop)

        def cancelled() -> bool:
            self.ranks.heartbeat.progress()
            return self.stop.cancels_validation()

        began = time.monotonic()
        answers = sample_answers(
            session.model,
            session.files.tokenizer,
            [held_out[i] for i in range(start, len(held_out))],
            session.data.template.end_ids,
            places=[held_out.where(i) for i in range(start, len(held_out))],
            references=self.references[start:],
            synced=self.is_sharded,
            cancelled=cancelled,
        )
        seconds = time.monotonic() - began
        self.seconds += seconds
        if start == 0:
            self.answer_seconds = seconds
        return answers

    def _warn_once(self, limit: float) -> None:
        """Say once that answers are omitted, and why."""
        seconds = self.answer_seconds
        if not self.has_warned:
            self.has_warned = True
            self.sinks.text(
                "samples",
                f"some sample answers are omitted, because one takes {format_seconds(seconds)} and "
                f"all together may take {format_seconds(limit)} so far: log.sample_seconds, or "
                f"{MAX_SAMPLING_SHARE:.0%} of the training time if this is longer; one prompt is "
                "answered before the first step and by the final weights in any case",
            )


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

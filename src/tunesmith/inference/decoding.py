"""Batched generation of answers from token ids, with Transformers' `generate`.

Prompts are sorted by length inside a window of a few batches. Windows start at fixed rows, and each
batch has its own seed. A resumed job therefore gives the same answers as an uninterrupted job.
Several ranks process the windows in turn and give the same answers as one process. Generation
settings in the model's files, such as a repetition penalty or a default temperature, are ignored.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from tunesmith.data.batches.batch import join_pixels
from tunesmith.data.text.example import Example, Pixels
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import UsageError
from tunesmith.methods.base import TrainModel
from tunesmith.metrics.sink import SampleAnswer
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.vision import mark_pictures

SAMPLE_TOKENS = 64  # maximum tokens of a sample answer during training
MIN_SAMPLE_TOKENS = 16  # minimum tokens of a sample answer that is cut off to save time
# Saved results of `_is_affected_by_padding` for each model.
_affected_by_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
# Number of batches per window. Prompts are sorted by length inside a window. A larger window needs
# less padding, but a resumed job must compute its first window again.
WINDOW_BATCHES = 4


@dataclass(frozen=True)
class Decoding:
    """Settings that determine how the tokens of an answer are chosen.

    Attributes:
        max_new_tokens: maximum number of tokens of an answer.
        temperature: 0 means greedy decoding. Otherwise the logits are divided by the temperature,
            and a token is sampled.
        top_p: sample from the smallest set of tokens whose probabilities sum to this value. 1 means
            all tokens.
        top_k: sample from the k most likely tokens. 0 means all tokens.
        seed: seed of the sampling.

    Raise UsageError if a value is out of range, or if top_p or top_k is set without a temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        )
        for name, is_allowed, allowed in ranges:
            if not is_allowed:
                raise UsageError(
                    f"{name} {getattr(self, name)} is out of range",
                    where=name,
                    fix=f"give {allowed}",
                )
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            raise UsageError(
                "top-p and top-k have no effect",
                where="temperature",
                why="temperature 0 always picks the most likely token",
                fix="set a temperature, such as 1.0, or remove top-p and top-k",
            )

    def describe(self) -> str:
        """Return a description for a log line, such as `greedy, up to 256 new tokens`."""
        method = "greedy"
        if self.temperature > 0:
            method = (
                f"sampled at temperature {self.temperature:g}, top-p {self.top_p:g}, "
                f"top-k {self.top_k or 'off'}, seed {self.seed}"
            )
        return f"{method}, up to {self.max_new_tokens} new tokens"

    def config(self, **tokens: Any) -> GenerationConfig:
        """Return a `GenerationConfig` of Transformers with only these settings.

        All other settings keep Transformers' defaults, whatever the model's files say.
        """
        if self.temperature > 0:
            tokens |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return GenerationConfig(max_new_tokens=self.max_new_tokens, **tokens)


class Answer(NamedTuple):
    """Answer of a model.

    Attributes:
        text: the text without special tokens.
        ids: the token ids without the stop token.
        finished: True if the answer ended with a stop token. False if the answer was cut off at
            `max_new_tokens` or cancelled.
    """

    text: str
    ids: list[int]
    finished: bool


class _Streamer(TextStreamer):
    """Streamer that passes the text of an answer to `write`, one complete word after the other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Set the model to eval mode, and disable gradients. The mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stops: Collection[int],
    write: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    generate: Callable[..., torch.Tensor] | None = None,
    synced: bool = False,
    pictures: Sequence[Pixels | None] = (),
) -> list[Answer]:
    """Generate answers to a few prompts in one batch.

    Args:
        model: a model whose attention supports a padding mask (sdpa or eager, but not the attention
            for packed rows).
        prompts: the token ids of each prompt, at least one.
        stops: token ids that end an answer.
        write: function that is called with the generated text; only for a single prompt.
        cancelled: function that is called after each token. If it returns True, generation stops
            and the partial answers are returned.
        generate: function that replaces `model.generate`, for a sharded root module.
        synced: whether all ranks must generate the same number of tokens, because they gather
            weights from each other. Transformers detects this for ZeRO-3 and FSDP1, but not for
            FSDP2.
        pictures: the pictures of each prompt; empty if no prompt has pictures.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    _check_embedded(model, tokenizer, max(map(max, prompts)))
    generate = partial(generate or model.generate, synced_gpus=synced)

    def ended(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        # Wait until the GPU has computed the token, because `cancelled` may check a time limit.
        # This costs nothing: `generate` waits for the token as well.
        input_ids[:, -1].cpu()
        return torch.full(
            (input_ids.shape[0],), cancelled(), device=input_ids.device, dtype=torch.bool
        )

    def continuations(numbers: Sequence[int]) -> list[list[int]]:
        """Generate the answers to the prompts with these indices."""
        rows = [torch.tensor(prompts[i], dtype=torch.long, device=model.device) for i in numbers]
        ones = [torch.ones_like(row) for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        picture_inputs: dict[str, torch.Tensor] = {}
        pixels = list(filter(None, [pictures[i] for i in numbers] if pictures else []))
        if pixels:
            picture_inputs = mark_pictures(model, ids)
            for name, tensor in join_pixels(pixels).items():
                picture_inputs[name] = tensor.to(ids.device)
        torch.manual_seed(decoding.seed)
        out = generate(
            input_ids=ids,
            attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
            generation_config=decoding.config(
                eos_token_id=sorted(stops) or None, pad_token_id=pad_id
            ),
            stopping_criteria=StoppingCriteriaList([ended]),
            streamer=_Streamer(tokenizer, write) if write else None,
            **picture_inputs,
        )
        return out[:, ids.shape[1] :].tolist()

    written: dict[int, list[int]] = {}
    # Replace the generation settings of the checkpoint by defaults. They are restored below.
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices):
            needs_padding = len({len(prompt) for prompt in prompts}) > 1
            is_split = needs_padding and _is_affected_by_padding(model, generate)
            # Generate all answers together, or those to prompts of each length.
            batches: dict[int, list[int]] = {}
            for i, prompt in enumerate(prompts):
                batches.setdefault(len(prompt) if is_split else 0, []).append(i)
            for batch in batches.values():
                written.update(zip(batch, continuations(batch), strict=True))
    finally:
        model.generation_config = settings
    return [cut_answer(tokenizer, written[i], stops) for i in range(len(prompts))]


def _is_affected_by_padding(model: PreTrainedModel, generate: Callable[..., Any]) -> bool:
    """Return whether masked padding tokens change the outputs of a model. RWKV is such a model.

    The result is measured once per model with two rows that differ only in masked tokens. If the
    model respects the mask, the logits are equal except for rounding. In RWKV the difference is as
    large as the logits.
    """
    if model.config.get_text_config().model_type in ARCHITECTURES:
        return False
    if model not in _affected_by_padding:
        rows = torch.arange(16, device=model.device).repeat(2, 1)
        mask = torch.ones_like(rows)
        mask[:, :8] = 0
        rows[1, :8] = 0
        config = GenerationConfig(
            max_new_tokens=1, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        out = generate(input_ids=rows, attention_mask=mask, generation_config=config)
        one, other = out.logits[0]
        difference = (one - other).abs().max()
        _affected_by_padding[model] = bool(difference > 0.02 * one.abs().max())
    return _affected_by_padding[model]


def _check_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """Raise UsageError if the model has no embedding for the token id `token`."""
    embedding_rows = model.get_input_embeddings().weight.shape[0]
    if token < embedding_rows:
        return
    name = tokenizer.convert_ids_to_tokens(token)
    raise UsageError(
        f"a prompt contains {name}, a token without an embedding in the model",
        why=f"the id of the token is {token:,}, and the embedding has {embedding_rows:,} rows",
        fix="remove this token from the text, or use the model's own tokenizer",
    )


def cut_answer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Collection[int]
) -> Answer:
    """Cut generated token ids at the first stop token, and decode them to an `Answer`."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Answer(decode(tokenizer, ids[:end]), ids[:end], end is not None)


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, with_special: bool = False
) -> str:
    """Decode token ids to text without cleaning up spaces.

    Special tokens are removed unless `with_special` is True.
    """
    return str(
        tokenizer.decode(
            list(ids), skip_special_tokens=not with_special, clean_up_tokenization_spaces=False
        )
    )


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stops: Collection[int],
    batch_size: int = 16,
    start: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    ranks: Ranks = ONE_PROCESS,
    answered: Callable[[Sequence[Answer]], object] = lambda _: None,
    pictures: Callable[[int], Pixels | None] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Generate answers to many prompts. Yield (index, answer) in the order of the prompts.

    Answers are yielded when their window is complete.

    Args:
        stops: token ids that end an answer.
        batch_size: number of prompts in a batch.
        start: index of the first prompt to answer. The batches do not depend on `start`: a window
            that contains this prompt is divided into the same batches as without `start`.
        cancelled: function that is called after each token. If it returns True, the current window
            is dropped and the iterator ends.
        ranks: the processes that share the work. Each rank has the entire model and answers some of
            the windows. All ranks yield all answers.
        answered: function that is called with the answers of each batch of this rank, as soon as
            the batch is complete.
        pictures: function that returns the pictures of a prompt, by the prompt's index.
    """
    window = batch_size * WINDOW_BATCHES

    def answer_window(first: int) -> dict[int, Answer] | None:
        end = min(first + window, len(prompts))
        # Sort by length, because batches of similar lengths need little padding.
        by_length = sorted(range(first, end), key=lambda i: (len(prompts[i]), i))
        answers: dict[int, Answer] = {}
        for offset in range(0, len(by_length), batch_size):
            rows = by_length[offset : offset + batch_size]
            # Skip a batch whose prompts are all before `start`.
            if max(rows) < start:
                continue
            # The seed depends only on the batch, so the answers are the same in a resumed job.
            seed = (decoding.seed * 1_000_003 + min(rows)) % 2**63
            batch = answer_batch(
                model,
                tokenizer,
                [prompts[i] for i in rows],
                replace(decoding, seed=seed),
                stops=stops,
                cancelled=cancelled,
                pictures=[pictures(i) for i in rows] if pictures else (),
            )
            # If the batch was cancelled, drop the window, because some of its answers are
            # incomplete.
            if cancelled():
                return None
            answers.update(zip(rows, batch, strict=True))
            answered([answers[i] for i in rows if i >= start])
        return answers

    # Begin with the first prompt of the window that contains `start`, so that a resumed job forms
    # the same batches as an uninterrupted job.
    for turn in range(start // window * window, len(prompts), window * ranks.world):
        answers_of_rank: dict[int, Answer] | None = {}
        with ranks.raise_on_all_ranks():
            # `answer_window` returns {} if this rank has no window in the last turn.
            answers_of_rank = answer_window(turn + ranks.rank * window)
        for answers in ranks.all_gather_object(answers_of_rank):
            if answers is None:
                return
            yield from ((i, answers[i]) for i in sorted(answers) if i >= start)


class AnswerClock:
    """Time limit for sample answers. Answers that would take too long are cut off or skipped.

    The time per token is measured between the first and the second token, because the time to the
    first token includes processing the prompts. If ranks generate together, the time to the first
    token is used instead, because only the first token is generated on all ranks for certain. This
    is accurate enough: the prompts take about as long as one token, because both times are mostly
    spent on gathering the weights.

    Attributes:
        allowed: maximum number of seconds.
        predicted: predicted seconds for all tokens; None before the measurement.
        limit: number of tokens after which the answers are cut off.
        late: True if there is not enough time for MIN_SAMPLE_TOKENS tokens. The answers are then
            skipped.
    """

    def __init__(
        self,
        allowed: float = math.inf,
        *,
        generated: Callable[[], object] = lambda: None,
        agree: Callable[[int], int] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            generated: function that is called after each token.
            agree: function that returns the same limit on all ranks. It is needed if ranks generate
                together.
            now: function that returns the time in seconds.
        """
        self.allowed = allowed
        self.generated = generated
        self.agree = agree
        self.now = now
        self.predicted: float | None = None
        self.limit = SAMPLE_TOKENS
        self.late = False
        self.began = now()
        self.seconds = [0.0]  # seconds from the start to each token

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was started."""
        return self.now() - self.began

    def after_token(self) -> bool:
        """Record a token, and return whether the answers must end now."""
        self.generated()
        self.seconds.append(self.elapsed)
        tokens = len(self.seconds) - 1
        if tokens == (1 if self.agree else 2):
            *_, previous, last = self.seconds
            pace = last - previous
            self.predicted = last + (SAMPLE_TOKENS - tokens) * pace
            if self.predicted > self.allowed:
                self.limit = max(tokens, tokens + int((self.allowed - last) / pace))
            # Use the same limit on all ranks, because they must stop at the same token.
            if self.agree:
                self.limit = self.agree(self.limit)
            self.late = self.limit < min(MIN_SAMPLE_TOKENS, SAMPLE_TOKENS)
        return self.late or tokens >= self.limit


def sample_answers(
    train_model: TrainModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    stops: Collection[int],
    *,
    places: Sequence[str] = (),
    references: Sequence[str] = (),
    synced: bool = False,
    clock: AnswerClock | None = None,
) -> list[SampleAnswer]:
    """Generate greedy answers to a few examples during training.

    All examples are in one batch, so that sharded weights are gathered, and nf4 weights
    dequantized, only once per token. The training attention is restored afterwards.

    Args:
        stops: token ids that end an answer.
        places: file and line of each example's row.
        references: the answer in each example's row.
        synced: as for `answer_batch`.
        clock: the time limit. Return an empty list if there is not enough time.
    """
    clock = clock or AnswerClock()
    prompts = []
    expected = []
    pictures = []
    rows = []
    for index, example in enumerate(examples):
        # The prompt is the part before the first supervised token. Skip an example whose prompt is
        # empty or only one token.
        start = int(example.trained.argmax())
        if start > 1:
            prompts.append(example.ids[:start].tolist())
            rows.append(places[index] if places else "")
            pictures.append(example.pictures.pixels() if example.pictures else None)
            # Truncate the reference answer to the maximum length of a sample answer.
            reference = references[index] if references else ""
            reference_ids = tokenizer(reference, add_special_tokens=False)["input_ids"]
            expected.append(decode(tokenizer, reference_ids[:SAMPLE_TOKENS]))
    if not prompts:
        return []
    train_model.use_inference_attention()
    try:
        answers = answer_batch(
            train_model.model,
            tokenizer,
            prompts,
            Decoding(max_new_tokens=SAMPLE_TOKENS),
            stops=stops,
            cancelled=clock.after_token,
            generate=train_model.generate,
            synced=synced,
            pictures=pictures,
        )
    finally:
        train_model.use_training_attention()
    if clock.late:
        return []
    texts = [decode(tokenizer, prompt) for prompt in prompts]
    written = [answer.text for answer in answers]
    return list(map(SampleAnswer, texts, written, expected, rows))

"""Token ids in, answers out: batched decoding with Transformers' `generate`.

Prompts are sorted by length inside a window of a few batches. Windows start at fixed rows and each
batch has its own seed, so a job that is stopped and resumed gives the same answers as an
uninterrupted one, and several ranks, which take the windows in turn, those of one process.
Generation settings that ship with a model (a repetition penalty, a default temperature) are
ignored.
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

SAMPLE_TOKENS = 64  # of a sample answer while training
MIN_SAMPLE_TOKENS = 16  # of a sample answer that is cut to save time
# Models that were looked at by `_reads_padding`.
_reading_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
WINDOW_BATCHES = 4  # a larger window sorts better; a resumed job computes one window again


@dataclass(frozen=True)
class Decoding:
    """The way tokens are chosen; UsageError for a value out of range, or a sampling option without
    a temperature.

    Attributes:
        temperature: 0 is greedy; above, the logits are divided by it and a token is drawn.
        top_p: draw from the smallest set of tokens whose probabilities sum to this (1: from all).
        top_k: draw from the k most likely tokens (0: from all).
        seed: of the draws.
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
                what = f"{name} {getattr(self, name)} is out of range"
                raise UsageError(what, where=name, fix=f"give {allowed}")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            raise UsageError(
                "top-p and top-k have no effect",
                where="temperature",
                why="temperature 0 always picks the most likely token",
                fix="give a temperature, such as 1.0, or neither of them",
            )

    def describe(self) -> str:
        """One line for a log: `greedy, up to 256 new tokens`."""
        method = "greedy"
        if self.temperature > 0:
            method = (
                f"sampled at temperature {self.temperature:g}, top-p {self.top_p:g}, "
                f"top-k {self.top_k or 'off'}, seed {self.seed}"
            )
        return f"{method}, up to {self.max_new_tokens} new tokens"

    def config(self, **tokens: Any) -> GenerationConfig:
        """Transformers' form, with every setting that a model might bring along at its neutral
        value."""
        if self.temperature > 0:
            tokens |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return GenerationConfig(max_new_tokens=self.max_new_tokens, **tokens)


class Answer(NamedTuple):
    """The text that a model wrote.

    Attributes:
        text: without special tokens.
        ids: without the stop token.
        finished: it ended by a stop token; False when cut at `max_new_tokens` or cancelled.
    """

    text: str
    ids: list[int]
    finished: bool


class _Streamer(TextStreamer):
    """Passes on each piece of an answer as soon as it is whole words."""

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
    """Eval mode and no gradients; the mode that was set comes back afterwards."""
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
    """Answer a few prompts, of at least one token each, in one batch.

    Args:
        model: its attention must take a padding mask (sdpa or eager; not the one for packed rows).
        stops: ids that end an answer.
        write: gets the text as it comes; for a single prompt only.
        cancelled: called after each token; once true, the answers end there and are returned as
            they are.
        generate: takes the place of the model's own, for a sharded root.
        synced: whether all ranks answer together, as each gathers weights from the others: none
            ends before the last. Transformers' own guess does not see FSDP2.
        pictures: those of each prompt; none at all where no prompt has any.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    _check_embedded(model, tokenizer, max(map(max, prompts)))
    generate = partial(generate or model.generate, synced_gpus=synced)

    def ended(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        # Waits until the token is there, so that `cancelled` may go by a clock; `generate` waits
        # for it anyway.
        input_ids[:, -1].cpu()
        return torch.full(
            (input_ids.shape[0],), cancelled(), device=input_ids.device, dtype=torch.bool
        )

    def continuations(numbers: Sequence[int]) -> list[list[int]]:
        """Return what the model writes behind some of the prompts."""
        rows = [torch.tensor(prompts[i], dtype=torch.long, device=model.device) for i in numbers]
        ones = [torch.ones_like(row) for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        seen = [pictures[i] for i in numbers] if pictures else []
        torch.manual_seed(decoding.seed)
        out = generate(
            input_ids=ids,
            attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
            generation_config=decoding.config(
                eos_token_id=sorted(stops) or None, pad_token_id=pad_id
            ),
            stopping_criteria=StoppingCriteriaList([ended]),
            streamer=_Streamer(tokenizer, write) if write else None,
            **_picture_inputs(model, ids, [pixels for pixels in seen if pixels is not None]),
        )
        return out[:, ids.shape[1] :].tolist()

    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    written: dict[int, list[int]] = {}
    # None from the checkpoint.
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices):
            batches = [*by_length.values()]
            if len(batches) > 1 and not _reads_padding(model, generate):
                batches = [list(range(len(prompts)))]
            for batch in batches:
                written.update(zip(batch, continuations(batch), strict=True))
    finally:
        model.generation_config = settings
    return [cut_answer(tokenizer, written[i], stops) for i in range(len(prompts))]


def _picture_inputs(
    model: PreTrainedModel, ids: torch.Tensor, pixels: Sequence[Pixels]
) -> dict[str, torch.Tensor]:
    """The arguments of a forward for the pictures of some prompts, with ids [prompts, length]."""
    if not pixels:
        return {}
    inputs = {name: tensor.to(ids.device) for name, tensor in join_pixels(pixels).items()}
    return inputs | mark_pictures(model, ids)


def _reads_padding(model: PreTrainedModel, generate: Callable[..., Any]) -> bool:
    """Tell whether tokens that the padding mask hides change what a model writes, as in RWKV.

    Measured once a model, by two rows that differ in hidden tokens alone: logits that heed the mask
    are equal, but for kernels that round by a row's place; those of RWKV differ by their own size.
    """
    if model.config.get_text_config().model_type in ARCHITECTURES:
        return False
    if model not in _reading_padding:
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
        _reading_padding[model] = bool(difference > 0.02 * one.abs().max())
    return _reading_padding[model]


def _check_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """UsageError where the model has no embedding of a token id."""
    embedding_rows = model.get_input_embeddings().weight.shape[0]
    if token < embedding_rows:
        return
    name = tokenizer.convert_ids_to_tokens(token)
    raise UsageError(
        f"a prompt contains {name}, a token without an embedding in the model",
        why=f"its id is {token:,}, and the embedding has {embedding_rows:,} rows",
        fix="change that text, or use the model's own tokenizer",
    )


def cut_answer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Collection[int]
) -> Answer:
    """The answer up to its first stop token, as tokens and text."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Answer(decode(tokenizer, ids[:end]), ids[:end], end is not None)


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, with_special: bool = False
) -> str:
    """The text of tokens, spaces as the tokens have them; without special ones unless asked."""
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
    """Answer many prompts; yield (index, answer) in their order, from index `start` on.

    The batches do not depend on `start`: the window that holds it is computed whole. Once
    `cancelled` says so, the current window is dropped and the iterator ends. Each of several ranks
    holds the whole model and answers a window; all of them yield the answers of all. A window is
    yielded at its end; `answered` gets each batch of this rank as soon as it is there. `pictures`
    gives those of a prompt, by its index.
    """
    window = batch_size * WINDOW_BATCHES

    def answer_window(first: int) -> dict[int, Answer] | None:
        end = min(first + window, len(prompts))
        # Prompts of like length in a batch pad little.
        by_length = sorted(range(first, end), key=lambda i: (len(prompts[i]), i))
        answers: dict[int, Answer] = {}
        for offset in range(0, len(by_length), batch_size):
            rows = by_length[offset : offset + batch_size]
            # All of the batch is answered already.
            if max(rows) < start:
                continue
            # A seed of the batch's own: its answers do not depend on where a start began.
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
            # A batch that was cut short has unfinished answers: all of it is dropped.
            if cancelled():
                return None
            answers.update(zip(rows, batch, strict=True))
            answered([answers[i] for i in rows if i >= start])
        return answers

    # Whole windows, so that a start in the middle forms the same batches.
    for turn in range(start // window * window, len(prompts), window * ranks.world):
        answers_of_rank: dict[int, Answer] | None = {}
        with ranks.raise_on_all_ranks():
            first = turn + ranks.rank * window
            if first < len(prompts):
                answers_of_rank = answer_window(first)
        for answers in ranks.all_gather_object(answers_of_rank):
            if answers is None:
                return
            for i in sorted(answers):
                if i >= start:
                    yield i, answers[i]


class AnswerClock:
    """A time limit: sample answers that would take more than `allowed` seconds are cut or skipped.

    The time of a token is that between the first and the second, because the first includes the
    prompts. Ranks that answer together measure the first token only: a rank whose answers have
    ended is not called again, and both prompts and tokens spend most of their time gathering
    weights.

    Attributes:
        predicted: seconds that all tokens would take; None before it is known.
        limit: tokens after which the answers end.
        late: whether fewer than MIN_SAMPLE_TOKENS would fit, so that there are no answers.
    """

    def __init__(
        self,
        allowed: float = math.inf,
        *,
        generated: Callable[[], object] = lambda: None,
        agree: Callable[[int], int] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`generated` is called after each token. If ranks answer together, `agree` returns the
        same limit on all of them."""
        self.allowed = allowed
        self.generated = generated
        self.agree = agree
        self.now = now
        self.predicted: float | None = None
        self.limit = SAMPLE_TOKENS
        self.late = False
        self.began = now()
        self.seconds = [0.0]  # until each token, from the beginning

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.now() - self.began

    def after_token(self) -> bool:
        """Return whether the answers end here."""
        self.generated()
        self.seconds.append(self.elapsed)
        tokens = len(self.seconds) - 1
        if tokens == (1 if self.agree else 2):
            *_, previous, last = self.seconds
            pace = last - previous
            self.predicted = last + (SAMPLE_TOKENS - tokens) * pace
            if self.predicted > self.allowed:
                self.limit = max(tokens, tokens + int((self.allowed - last) / pace))
            # All ranks must stop at the same token.
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
    """Greedy answers to examples of a run in progress, none if the `clock` ends them; the training
    attention is set again.

    All are answered in one batch: the weights, which shards gather and nf4 makes dense, are needed
    once a token. `places` are those of the examples' rows, `references` their answers; `synced` as
    for `answer_batch`.
    """
    clock = clock or AnswerClock()
    prompts = []
    expected = []
    rows = []
    pictures = []
    for index, example in enumerate(examples):
        # What stands before the first supervised token is the prompt; an example that is supervised
        # whole has none.
        start = int(example.trained.argmax())
        if start > 1:
            prompts.append(example.ids[:start].tolist())
            rows.append(places[index] if places else "")
            pictures.append(example.pictures.pixels() if example.pictures else None)
            # As much of the row's own answer.
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

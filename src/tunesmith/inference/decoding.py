"""Token ids in, answers out: batched decoding with Transformers' `generate`.

Prompts are sorted by length inside a window of a few batches. Windows start at fixed rows and each batch has its own
seed, so a job that is stopped and resumed gives the same answers as an uninterrupted one. Generation settings that ship
with a model (a repetition penalty, a default temperature) are ignored.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from tunesmith.adapter.lora import LoraLinear, loras, merged_weight
from tunesmith.data.batch import Example
from tunesmith.errors import UsageError
from tunesmith.methods.base import TrainModel
from tunesmith.metrics.sink import SampleAnswer

SAMPLE_TOKENS = 64  # of a sample answer while training
WINDOW_BATCHES = 4  # a larger window sorts better; a resumed job computes one window again


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; UsageError for a value out of range, or a sampling option without a temperature."""

    max_new_tokens: int = 256
    temperature: float = (
        0.0  # 0 is greedy; above, the logits are divided by it and a token is drawn
    )
    top_p: float = (
        1.0  # draw from the smallest set of tokens whose probabilities sum to this (1: from all)
    )
    top_k: int = 0  # draw from the k most likely tokens (0: from all)
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        rules = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "--temperature",
                self.temperature,
                0 <= self.temperature < float("inf"),
                "0 (greedy) or above",
            ),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 (off) or above"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        )
        for name, value, holds, allowed in rules:
            if not holds:
                raise UsageError(
                    f"{name} {value} is out of range", where=name, fix=f"give {allowed}"
                )
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            what, why = (
                "--top-p and --top-k have no effect",
                "at temperature 0 the most likely token is always taken",
            )
            raise UsageError(
                what, where="--temperature", why=why, fix="add --temperature 1.0, or leave both out"
            )

    def describe(self) -> str:
        """One line for a log: `greedy, up to 256 new tokens`."""
        options = (
            f"temperature {self.temperature:g}, top-p {self.top_p:g}, top-k {self.top_k or 'off'}"
        )
        how = f"sampled at {options}, seed {self.seed}" if self.temperature > 0 else "greedy"
        return f"{how}, up to {self.max_new_tokens} new tokens"

    def config(self, **tokens: Any) -> GenerationConfig:
        """Transformers' form, with every setting that a model might bring along at its neutral value."""
        if self.temperature > 0:
            tokens |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return GenerationConfig(max_new_tokens=self.max_new_tokens, **tokens)


class Answer(NamedTuple):
    """What a model wrote."""

    text: str  # without special tokens
    ids: list[int]  # without the stop token
    finished: bool  # it ended by a stop token; False when cut at `max_new_tokens` or cancelled


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
) -> list[Answer]:
    """Answer a few prompts, of at least one token each, in one batch.

    Args:
        model: its attention must take a padding mask (sdpa or eager; not the one for packed rows).
        stops: ids that end an answer.
        write: gets the text as it comes; for a single prompt only.
        cancelled: asked after each token; once true, the answers end there and are returned as they are.
        generate: takes the place of the model's own, for a sharded root.
        synced: whether all ranks answer together, as each gathers weights from the others: none ends before the last.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    known, last = model.get_input_embeddings().weight.shape[0], max(map(max, prompts))
    if last >= known:
        what = f"a prompt holds {tokenizer.convert_ids_to_tokens(last)}, a token that the model has no embedding of"
        why = f"its id is {last:,}, and the embedding has {known:,} rows"
        raise UsageError(
            what, why=why, fix="write that text otherwise, or use the model's own tokenizer"
        )
    rows = [torch.tensor(prompt, dtype=torch.long, device=model.device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
    )

    def ended(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        input_ids[
            :, -1
        ].cpu()  # the token is there, so that `cancelled` may go by a clock; `generate` waits for it anyway
        return torch.full(
            (input_ids.shape[0],), cancelled(), device=input_ids.device, dtype=torch.bool
        )

    # None from the checkpoint
    settings, model.generation_config = (
        model.generation_config,
        GenerationConfig(),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(decoding.seed)
            out = (generate or model.generate)(
                input_ids=ids,
                attention_mask=mask,
                generation_config=decoding.config(
                    eos_token_id=sorted(stops) or None, pad_token_id=pad_id
                ),
                stopping_criteria=StoppingCriteriaList([ended]),
                streamer=_Streamer(tokenizer, write) if write else None,
                synced_gpus=synced,  # Transformers' own guess does not see FSDP2
            )
    finally:
        model.generation_config = settings
    return [cut_answer(tokenizer, row, stops) for row in out[:, ids.shape[1] :].tolist()]


def cut_answer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Collection[int]
) -> Answer:
    """The answer up to its first stop token, as tokens and text."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Answer(decode(tokenizer, ids[:end]), ids[:end], end is not None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens without special ones, spaces as the tokens have them."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
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
) -> Iterator[tuple[int, Answer]]:
    """Answer many prompts, with an fp32 adapter merged; yield (index, answer) in their order, from index `start` on.

    The batches do not depend on `start`: the window that holds it is computed whole. Once `cancelled` says so, the
    current window is given up and the iterator ends.
    """
    window = batch_size * WINDOW_BATCHES
    with merged_meanwhile(model):
        for first in range(start // window * window, len(prompts), window):
            order = sorted(
                range(first, min(first + window, len(prompts))), key=lambda i: (len(prompts[i]), i)
            )
            done: dict[int, Answer] = {}
            for rows in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
                if max(rows) < start:
                    continue
                seeded = replace(decoding, seed=(decoding.seed * 1_000_003 + min(rows)) % 2**63)
                batch = [prompts[i] for i in rows]
                answers = answer_batch(
                    model, tokenizer, batch, seeded, stops=stops, cancelled=cancelled
                )
                if cancelled():
                    return
                done.update(zip(rows, answers, strict=True))
            yield from ((i, done[i]) for i in sorted(done) if i >= start)


@contextmanager
def merged_meanwhile(model: PreTrainedModel) -> Iterator[None]:
    """Merge an fp32 model's adapter into its weights inside the block: fewer matmuls a token, equal up to rounding.

    In bf16 merged weights would be rounded once more and could answer differently; a 4-bit base cannot take them.
    """
    layers = [
        m
        for _, m in loras(model)
        if isinstance(m, LoraLinear) and m.enabled and m.weight.dtype == torch.float32
    ]
    weights = [module.weight for module in layers]
    try:
        for module in layers:
            module.weight = torch.nn.Parameter(merged_weight(module), requires_grad=False)
            module.enabled = False
        yield
    finally:
        for module, weight in zip(layers, weights, strict=True):
            module.weight, module.enabled = weight, True


class AnswerClock:
    """Ends sample answers that would take more than `allowed` seconds, by what their first tokens took.

    Of one rank by two: the first comes after the prompts were read. Of ranks that answer together by one: a rank whose
    answers have ended is asked no more, so that only the first token finds all of them, and what takes the time there is
    to gather the weights, for prompts and for a token alike.

    Attributes:
        predicted: seconds that all tokens would take; None before it is judged.
        late: whether the answers were ended.
    """

    def __init__(
        self,
        allowed: float = math.inf,
        *,
        generated: Callable[[], object] = lambda: None,
        agree: Callable[[bool], bool] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`generated` is called after each token; `agree` makes one verdict of those of ranks that answer together."""
        self.allowed, self.generated, self.agree, self.now = allowed, generated, agree, now
        self.predicted: float | None = None
        self.late = False
        self.began = now()
        self.seconds = [0.0]  # until each token, from the beginning

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.now() - self.began

    def after_token(self) -> bool:
        """Whether the answers are to end here."""
        self.generated()
        self.seconds.append(self.elapsed)
        tokens = len(self.seconds) - 1
        if tokens == (1 if self.agree else 2):
            *_, before, last = self.seconds
            self.predicted = last + (SAMPLE_TOKENS - tokens) * (last - before)
            self.late = self.predicted > self.allowed
            if self.agree:
                self.late = self.agree(self.late)
        return self.late


def sample_answers(
    train_model: TrainModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    stops: Collection[int],
    *,
    synced: bool = False,
    clock: AnswerClock | None = None,
) -> list[SampleAnswer]:
    """Greedy answers to examples of a run in progress, none if the `clock` ends them; the training attention is set again.

    All are answered in one batch: the weights, which shards gather and nf4 makes dense, are needed once a token.
    `synced` as for `answer_batch`.
    """
    clock = clock or AnswerClock()
    # What stands before the first supervised token is the prompt; an example that is supervised whole has none.
    turns = [
        (e.ids[:start].tolist(), e, start)
        for e in examples
        if (start := int(e.trained.argmax())) > 1
    ]
    if not turns:
        return []
    model, decoding = train_model.model, Decoding(max_new_tokens=SAMPLE_TOKENS)

    train_model.use_inference_attention()
    try:
        answers = answer_batch(
            model, tokenizer, [ids for ids, _, _ in turns], decoding,
            stops=stops, cancelled=clock.after_token, generate=train_model.generate, synced=synced,
        )  # fmt: skip
    finally:
        train_model.use_training_attention()
    if clock.late:
        return []
    # The same number of tokens of the row's own answer, up to the end of its first turn.
    rows = [example.ids[start : start + SAMPLE_TOKENS].tolist() for _, example, start in turns]
    expected = [cut_answer(tokenizer, row, stops).text for row in rows]
    found = zip(turns, answers, expected, strict=True)
    return [
        SampleAnswer(decode(tokenizer, ids), answer.text, wanted)
        for (ids, _, _), answer, wanted in found
    ]

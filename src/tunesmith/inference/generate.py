"""Answers from a model, in batches, through Transformers' public `generate`.

Prompts come as token ids, made by the template that the model was trained with, so that what is asked here is what
was taught. They are padded on the left, sorted by length inside a window of a few batches, and handed back window by
window in the order in which they came. Windows start at fixed rows and each batch has its own seed: a job that is
stopped and started again in the middle gives the very answers that an unbroken one gives.

Generation settings that ship with a model (a repetition penalty, a default temperature) are set aside: greedy is
plain greedy, and sampling is what was asked for and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tunesmith.adapter.lora import LoraLinear, loras, merged_weight
from tunesmith.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from tunesmith.training.build import Session

SAMPLE_TOKENS = 64  # of a sample answer while training
WINDOW_BATCHES = 4  # sorting needs company, and a restarted job does one window again


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy; above, the logits are divided by it and a token is drawn.
        top_p: draw from the smallest set of tokens whose probabilities reach this (1: from all).
        top_k: draw from the k most likely tokens (0: from all).
        seed: of the draws; greedy has none.

    Raises:
        UsageError: a value out of range, or a sampling option without a temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 (off) or above"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        )
        for name, value, holds, allowed in rules:
            if not holds:
                raise UsageError(f"{name} {value} is out of range", where=name, fix=f"give {allowed}")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            raise UsageError(
                "--top-p and --top-k have no effect without a temperature",
                why="at temperature 0 the most likely token is always taken",
                fix="add --temperature 1.0, or leave both out",
            )

    def describe(self) -> str:
        """One line for a log: `greedy, up to 256 new tokens`."""
        if self.temperature == 0:
            return f"greedy, up to {self.max_new_tokens} new tokens"
        cuts = [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        cuts += [f"top-k {self.top_k}"] if self.top_k else []
        how = ", ".join([f"sampled at temperature {self.temperature:g}", *cuts, f"seed {self.seed}"])
        return f"{how}, up to {self.max_new_tokens} new tokens"

    def config(self, stops: Collection[int], pad_id: int) -> GenerationConfig:
        """The same in Transformers' form, with every setting that a model might bring along put to neutral."""
        sampled = self.temperature > 0
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if sampled else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=sampled,
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad_id,
            **drawn,
        )


class Answer(NamedTuple):
    """What a model wrote.

    Attributes:
        text: without special tokens.
        ids: its tokens, without the stop token.
        finished: it ended by a stop token; False when cut at `max_new_tokens` or by the user.
    """

    text: str
    ids: list[int]
    finished: bool


class StopFlag(StoppingCriteria):
    """Ends an answer after its present token once `event` is set, from a signal handler for one."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Bool [rows], all the same: shape and dtype as Transformers asks."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


@contextmanager
def _plain(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode, no settings from the checkpoint, and the caller's random state untouched."""
    training, settings = model.training, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = settings
        model.train(training)


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stops: Collection[int],
    streamer: BaseStreamer | None = None,
    stop: threading.Event | None = None,
) -> list[Answer]:
    """Answer a few prompts in one batch, padded on the left.

    Args:
        model: its attention must take a padding mask (sdpa or eager; not the one for packed rows).
        prompts: token ids, each at least one.
        stops: ids that end an answer.
        streamer: gets the tokens as they come; for a single prompt only.
        stop: when set, the answers end after the present token and come back as they are.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    criteria = StoppingCriteriaList([StopFlag(stop)] if stop is not None else [])
    with _plain(model, decoding.seed):
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=decoding.config(stops, pad_id),
            stopping_criteria=criteria,
            streamer=streamer,
        )
    return [_cut(tokenizer, row, stops) for row in out[:, width:].tolist()]


def _cut(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Collection[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    return Answer(decode(tokenizer, kept), kept, end is not None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer: special tokens left out, spaces as the tokens have them."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stops: Collection[int],
    batch_size: int = 16,
    start: int = 0,
    stop: threading.Event | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer many prompts and yield (index, answer) in the order of the prompts, from index `start` on.

    The batches are the same wherever `start` lies: the window that holds it is computed whole. With `stop` set, the
    window under way is given up and the iterator ends.
    """
    window = batch_size * WINDOW_BATCHES
    for first in range(start // window * window, len(prompts), window):
        order = sorted(range(first, min(first + window, len(prompts))), key=lambda i: (len(prompts[i]), i))
        done: dict[int, Answer] = {}
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            if all(row < start for row in rows):
                continue
            seeded = Decoding(**{**decoding.__dict__, "seed": (decoding.seed * 1_000_003 + min(rows)) % 2**63})
            answers = answer_batch(model, tokenizer, [prompts[i] for i in rows], seeded, stops=stops, stop=stop)
            if stop is not None and stop.is_set():
                return
            done.update(zip(rows, answers, strict=True))
        yield from ((i, done[i]) for i in sorted(done) if i >= start)


@contextmanager
def merged_meanwhile(model: PreTrainedModel) -> Iterator[None]:
    """Fold an fp32 model's adapter into its weights for the time being, and take the very old weights back after.

    Decoding is bound by the number of products, and an adapter adds two to each layer. In fp32 the folded weights
    answer the same to rounding. In bf16 they would be rounded once more and could answer differently, so the adapter
    stays beside them; a 4-bit base has nothing to fold into.
    """
    layers = [m for _, m in loras(model) if isinstance(m, LoraLinear) and m.enabled and m.weight.dtype == torch.float32]
    held = [module.weight for module in layers]
    enabled = [module.enabled for module in layers]
    try:
        for module in layers:
            module.weight = torch.nn.Parameter(merged_weight(module), requires_grad=False)
            module.enabled = False
        yield
    finally:
        for module, weight, was in zip(layers, held, enabled, strict=True):
            module.weight, module.enabled = weight, was


def check_room(lengths: Sequence[int], where: Sequence[str], decoding: Decoding, context: int) -> None:
    """Refuse prompts that leave no room for the answer in the model's `context` (tokens), naming the worst.

    Raises:
        DataError: a prompt and its answer would pass the context.
    """
    over = [i for i, n in enumerate(lengths) if n + decoding.max_new_tokens > context]
    if over:
        worst = max(over, key=lambda i: lengths[i])
        raise DataError(
            f"{len(over)} of {len(lengths)} prompts are too long: the longest has {lengths[worst]} tokens",
            where=where[worst],
            why=f"the model's context is {context} tokens, and {decoding.max_new_tokens} are kept for the answer",
            fix="shorten these rows, or give a smaller --max-new-tokens",
        )


def sample_answers(session: Session, count: int) -> list[tuple[str, str]]:
    """(prompt, answer) of a run's first held-out rows, greedily, by the model as it is now."""
    tokens, root, tokenizer = session.data.validation, session.model, session.tokenizer
    assert tokens is not None
    rows = [tokens[i] for i in range(min(count, len(tokens)))]
    # What stands before the first trained token is the prompt; a row that is trained whole has none to ask.
    prompts = [ids for ids in (row.ids[: int(row.trained.argmax())].tolist() for row in rows) if len(ids) > 1]
    decoding, stops = Decoding(max_new_tokens=SAMPLE_TOKENS), session.data.template.stops
    root.model.set_attn_implementation("sdpa")
    try:
        answers = [answer_batch(root.model, tokenizer, [ids], decoding, stops=stops)[0] for ids in prompts]
    finally:
        root.use_training_attention()
    return [(decode(tokenizer, ids), a.text) for ids, a in zip(prompts, answers, strict=True)]

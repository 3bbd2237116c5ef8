"""Sampling of answers on the modules of training, from token ids to token ids.

The modules compute a flat row with one token per slot, as they compute a packed row in training.
The adapter stays beside the base, so quantized bases need no merge, and the log-probabilities are
those of training except for rounding. Each prompt is computed once for all its answers.

A token is drawn with a uniform number that depends only on the seed, the step, the row of the
prompt and its occurrence in the step, the number of the answer, and the number of the token. The
other answers of the batch, and the number of processes, do not change the draws.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.answers.decoding import Decoding
from tunesmith.batches.batch import Batch
from tunesmith.batches.layout import Layout
from tunesmith.model.layers.documents import Documents, use_documents
from tunesmith.model.layers.slots import Slots
from tunesmith.tokens.text.example import Example, RowPictures
from tunesmith.train_model import TrainModel, evaluating

# Slots of finished answers are dropped if at least this fraction of the slots is finished. Dropping
# copies the keys and values of the other slots.
DROPPED_SHARE = 0.1


class Prompt(NamedTuple):
    """A prompt whose answers are sampled.

    Attributes:
        ids: the token ids.
        row: index of the prompt's row in the data. The draws depend on it.
        pictures: the pictures of the prompt, or None.
        occurrence: how many earlier prompts of the step are from the same row. The draws depend on
            it.
    """

    ids: Sequence[int]
    row: int = 0
    pictures: RowPictures | None = None
    occurrence: int = 0


@dataclass
class SampledIds:
    """Tokens of an answer.

    Attributes:
        ids: the token ids, with the stop token.
        logprobs: natural logarithm of each token's probability at the sampler's temperature, before
            top-k and top-p.
        finished: whether the last token is a stop token.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


def uniforms(
    seed: int, step: int, row: int, answer: int, count: int, occurrence: int = 0
) -> np.ndarray:
    """Return the uniform numbers from 0 to 1 with which the tokens of an answer are drawn."""
    entropy = [seed, step, row, answer]
    # Numbers of runs from before this key existed have no occurrence.
    if occurrence:
        entropy.append(occurrence)
    key = np.random.SeedSequence(entropy)
    return np.random.Generator(np.random.Philox(key)).random(count)


def sample(
    model: TrainModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    stops: Collection[int],
    answers: int = 1,
    step: int = 0,
    pad_id: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    chosen: Callable[[int], object] = lambda _: None,
    synced: bool = False,
) -> list[SampledIds]:
    """Sample answers to prompts in one batch. The result has the answers of the first prompt first.

    Args:
        model: a model with `takes_slots`.
        stops: token ids that end an answer.
        answers: number of answers to each prompt.
        step: optimizer step that the draws depend on.
        cancelled: function that is called after each token. If it returns True, the answers end; if
            `synced`, they end when it returns True on all ranks with unfinished answers.
        chosen: function that is called with each token of the first answer.
        synced: whether all ranks must compute the same number of tokens, because they gather
            weights from each other.
    """
    device = model.model.device
    sampled = [SampledIds() for _ in range(len(prompts) * answers)]
    draws = []
    if decoding.temperature > 0:
        for prompt in prompts:
            for answer in range(answers):
                key = (decoding.seed, step, prompt.row, answer, decoding.max_new_tokens)
                draws.append(uniforms(*key, prompt.occurrence))
    with evaluating(model), model.attention_for("training"):
        lengths = [len(prompt.ids) for prompt in prompts]
        slots = Slots(lengths, answers, decoding.max_new_tokens, device)
        logits, positions = _compute_prompts(model, prompts, slots, pad_id)
        logits = logits.repeat_interleave(answers, 0)
        positions = positions.repeat_interleave(answers)
        in_slots = list(range(len(sampled)))  # the answer in each slot
        for at in range(decoding.max_new_tokens):
            uniform = None
            if draws:
                uniform = torch.tensor([draws[i][at] for i in in_slots], device=device)
            tokens, logprobs = choose_tokens(logits, decoding, uniform)
            for i, token, logprob in zip(in_slots, tokens.tolist(), logprobs.tolist(), strict=True):
                if not sampled[i].finished:
                    sampled[i].ids.append(token)
                    sampled[i].logprobs.append(logprob)
                    sampled[i].finished = token in stops
                    if i == 0:
                        chosen(token)
            is_open = [not sampled[i].finished for i in in_slots]
            goes_on = not cancelled() and any(is_open)
            if synced:
                goes_on = _any_rank(goes_on, device)
            if not goes_on or at + 1 == decoding.max_new_tokens:
                break
            if any(is_open) and is_open.count(False) >= DROPPED_SHARE * len(is_open):
                kept = [slot for slot, is_kept in enumerate(is_open) if is_kept]
                slots.keep(kept)
                in_slots = [in_slots[slot] for slot in kept]
                tokens = tokens[kept]
                positions = positions[kept]
            logits = _compute_tokens(model, tokens, positions, slots)
            positions = positions + 1
    return sampled


def _any_rank(value: bool, device: torch.device) -> bool:
    """Return whether the value is True on any rank. This is a collective call."""
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _compute_prompts(
    model: TrainModel, prompts: Sequence[Prompt], slots: Slots, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Compute the prompts in one packed row, and store their keys and values in the slots.

    Returns:
        The logits of the token after each prompt, fp32 [prompts, vocabulary], and the position of
        this token, int64 [prompts].
    """
    examples = []
    for prompt in prompts:
        ids = np.array(prompt.ids, np.int32)
        examples.append(Example(ids, np.zeros(len(ids), bool), pictures=prompt.pictures))
        if prompt.pictures is not None:
            prompt.pictures.begin()
    batch = Layout(pad_id, packed=True).batch(examples).to(model.model.device)
    last = torch.tensor([len(example.ids) for example in examples]).cumsum(0) - 1
    last = last.to(batch.input_ids.device)
    documents = model.documents(batch, slots)
    logits = model(batch, lambda model, batch: _logits_at(model, batch, documents, last))
    slots.holds_prompts = True
    # With pictures, positions have three axes, and the next token follows the largest position.
    positions = batch.position_ids.reshape(-1, batch.input_ids.numel())[:, last]
    return logits, positions.amax(0) + 1


def _compute_tokens(model: TrainModel, tokens: Tensor, positions: Tensor, slots: Slots) -> Tensor:
    """Compute the next token of each slot.

    Args:
        tokens, positions: int64 [slots].

    Returns:
        The logits of the token after it, fp32 [slots, vocabulary].
    """
    edges = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
    batch = Batch(
        input_ids=tokens.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        targets=tokens.unsqueeze(0),
        cu_seqlens=edges,
        max_seqlen=1,
        tokens=len(tokens),
        supervised=0,
        examples=len(tokens),
    )
    documents = Documents(edges, 1, model.attention_backend, slots=slots)
    documents.set_edges(range(len(tokens) + 1))
    logits: Tensor = model(batch, lambda model, batch: _logits_at(model, batch, documents))
    slots.advance()
    return logits


def _logits_at(
    model: TrainModel, batch: Batch, documents: Documents | None, places: Tensor | None = None
) -> Tensor:
    """Return the logits at some places of the flattened batch, or at all places."""
    with use_documents(documents):
        hidden = model.hidden(batch)
    return model.logits(hidden if places is None else hidden[places])


def choose_tokens(
    logits: Tensor, decoding: Decoding, uniform: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Choose the next token of each slot.

    Args:
        logits: fp32 [slots, vocabulary].
        uniform: fp64 [slots], the uniform number of each slot; None: the most likely token.

    Returns:
        The token ids, int64 [slots], and their log-probabilities, fp32 [slots].
    """
    if decoding.temperature > 0:
        logits = logits / decoding.temperature
    # Compute the log-softmax as `loss_and_grad` does. On a CPU, `torch.log_softmax` adds up a large
    # vocabulary less exactly: it differs by 8e-6 for 49,152 tokens.
    shifted = logits - logits.amax(-1, keepdim=True)
    logprobs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    if uniform is None:
        tokens = logprobs.argmax(-1)
    else:
        weights = _drop_unlikely(logprobs.exp(), decoding)
        cumulated = weights.cumsum(-1, dtype=torch.float64)
        threshold = uniform.unsqueeze(1) * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, threshold, right=True).squeeze(1)
        # The product can be rounded up to the sum of all weights.
        tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _drop_unlikely(probabilities: Tensor, decoding: Decoding) -> Tensor:
    """Set the probabilities of the tokens that top-k and then top-p exclude to 0."""
    if 0 < decoding.top_k < probabilities.shape[-1]:
        smallest = probabilities.topk(decoding.top_k).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < smallest, 0)
    if decoding.top_p < 1:
        descending, order = probabilities.sort(-1, descending=True)
        before = descending.cumsum(-1) - descending
        is_dropped = before >= decoding.top_p * descending.sum(-1, keepdim=True)
        descending = descending.masked_fill(is_dropped, 0)
        probabilities = torch.zeros_like(descending).scatter_(-1, order, descending)
    return probabilities

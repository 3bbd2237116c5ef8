"""How good a model is on held-out rows: loss, perplexity, token accuracy, exact match.

Loss and accuracy are teacher-forced over the supervised tokens, by the same `TrainModel` and the same packed batches
that training uses: there is no second formula. They are sums over all tokens divided once, so that the batching has
no say in them. Exact match generates greedily and compares texts after `normalise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunesmith.data.batch import Batch, collate
from tunesmith.data.pack import best_fit_decreasing

if TYPE_CHECKING:
    from tunesmith.data.tokens import TokenSet
    from tunesmith.methods.base import TrainModel


@dataclass(frozen=True)
class Score:
    """One model on one file.

    Attributes:
        rows: examples looked at.
        tokens: supervised tokens.
        loss: mean cross-entropy over them, in nats.
        perplexity: exp(loss).
        token_accuracy: share of them that are the most likely token given all true tokens before.
        exact_match: share of `asked` rows whose greedy answer is the reference; None if not asked for.
        asked: rows that were answered for exact match.
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float
    token_accuracy: float
    exact_match: float | None = None
    asked: int = 0


def packed(tokens: TokenSet, *, capacity: int, pad_id: int) -> Iterator[Batch]:
    """Batches of one packed row, at most `capacity` tokens each, without padding.

    Where an example is longer than `capacity`, rows of its length are packed.
    """
    lengths = tokens.lengths
    for row in best_fit_decreasing(lengths, max(capacity, int(lengths.max(initial=0)))):
        used = int(lengths[row].sum())
        yield collate([[tokens[i] for i in row]], length=used, pad_id=pad_id)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def validation_loss(
    train_model: TrainModel,
    tokens: TokenSet,
    *,
    micro_tokens: int,
    pad_id: int,
    device: torch.device,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """The method's mean loss over `tokens`, each example once.

    Args:
        micro_tokens: tokens of one packed row; what fits when training fits here.
        cancelled: asked before each row; once true, the work is given up.

    Returns:
        (loss, what its sum was divided by: for SFT nats and supervised tokens), or None when it was cancelled.
    """
    total, count = 0.0, 0
    with _evaluating(train_model):
        for batch in packed(tokens, capacity=micro_tokens, pad_id=pad_id):
            if cancelled():
                return None
            made = train_model(batch.to(device))
            total, count = total + made.loss.double().item(), count + made.denominator
    return (total / count if count else math.nan), count


def score(
    train_model: TrainModel,
    tokens: TokenSet,
    *,
    pad_id: int,
    device: torch.device,
    micro_tokens: int = 4096,
    done: Callable[[int], None] = lambda count: None,
) -> Score:
    """Loss, perplexity and token accuracy of every supervised token, each example once.

    Args:
        micro_tokens: tokens of one packed row; an example that is longer has a row of its own.
        done: told the number of examples finished, after each row.
    """
    total, hits, count, rows = 0.0, 0, 0, 0
    with _evaluating(train_model):
        for batch in packed(tokens, capacity=micro_tokens, pad_id=pad_id):
            losses, right = train_model.token_scores(batch.to(device))
            total += losses.double().sum().item()
            hits += int(right.sum())
            count += batch.supervised
            rows += batch.examples
            done(rows)
    if count == 0:
        return Score(rows, 0, math.nan, math.nan, math.nan)
    loss = total / count
    return Score(rows, count, loss, math.exp(loss) if loss < 709 else math.inf, hits / count)


def normalise(text: str) -> str:
    """What exact match compares: outer whitespace off, any run of whitespace one space; case and marks stay."""
    return " ".join(text.split())


def exact_matches(answers: Iterable[str], references: Iterable[str]) -> list[bool]:
    """Whether each answer is its reference, after `normalise`."""
    return [normalise(a) == normalise(r) for a, r in zip(answers, references, strict=True)]

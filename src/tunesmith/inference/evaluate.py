"""How good a model is on held-out rows: loss, perplexity, token accuracy, exact match.

Loss and accuracy are teacher-forced over the supervised tokens, by the same `TrainModel` and packed batches that
training uses: there is no second formula. They are sums over all tokens divided once, so they do not depend on the
batching. Exact match generates greedily and compares texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.adapter.lora import disabled
from tunesmith.config.schema import Data, Source
from tunesmith.data.batch import Batch, collate
from tunesmith.data.pack import best_fit_decreasing
from tunesmith.data.source import Rows, read_rows
from tunesmith.data.tokens import tokenise
from tunesmith.errors import UsageError
from tunesmith.inference.decoding import Decoding, evaluating
from tunesmith.inference.generate import generate, row_source
from tunesmith.inference.load_run import LoadedModel, load_run, locate_run

if TYPE_CHECKING:
    from tunesmith.data.tokens import TokenSet
    from tunesmith.methods.base import TrainModel

ROW_TOKENS = 4096  # of a packed row that is scored
Progress = Callable[[str, int, int], None]  # called with what is counted, how many are done, and the total


@dataclass(frozen=True)
class Score:
    """One model on one file."""

    rows: int
    tokens: int  # supervised tokens
    loss: float  # mean cross-entropy over them, in nats
    perplexity: float  # exp(loss)
    token_accuracy: float  # share of them that are the most likely token given all true tokens before
    exact_match: float | None = None  # share of `asked` rows whose greedy answer is the reference
    asked: int = 0  # rows answered for exact match


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    scores: dict[str, Score]  # `base` and `tuned`, or `model` for a plain model
    rows: int  # of the file
    dropped: int  # rows left out, because they are longer than the recipe's seq_len
    cut: int  # rows shortened for the same reason


def packed(tokens: TokenSet, *, capacity: int, pad_id: int) -> Iterator[Batch]:
    """Batches of one packed row without padding: `capacity` tokens at most, or the longest example's if it has more."""
    lengths = tokens.lengths
    for row in best_fit_decreasing(lengths, max(capacity, int(lengths.max(initial=0)))):
        yield collate([[tokens[i] for i in row]], length=int(lengths[row].sum()), pad_id=pad_id)


def validation_loss(
    train_model: TrainModel,
    tokens: TokenSet,
    *,
    micro_tokens: int,
    pad_id: int,
    device: torch.device,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """The method's mean loss over `tokens`, each example once, in packed rows of `micro_tokens`.

    Returns:
        (loss, what its sum was divided by: for SFT nats and supervised tokens); None once `cancelled` says so, which is
        asked before each row.
    """
    total, count = 0.0, 0
    with evaluating(train_model):
        for batch in packed(tokens, capacity=micro_tokens, pad_id=pad_id):
            if cancelled():
                return None
            made = train_model(batch.to(device))
            total, count = total + made.loss.double().item(), count + made.denominator
    return (total / count if count else math.nan), count


def score(train_model: TrainModel, tokens: TokenSet, *, pad_id: int, progress: Progress = lambda *_: None) -> Score:
    """Loss, perplexity and token accuracy of every supervised token, each example once."""
    total, hits, count, rows = 0.0, 0, 0, 0
    progress("rows scored", 0, len(tokens))
    with evaluating(train_model):
        for batch in packed(tokens, capacity=ROW_TOKENS, pad_id=pad_id):
            losses, right = train_model.token_scores(batch.to(train_model.model.device))
            total += losses.double().sum().item()
            hits += int(right.sum())
            count += batch.supervised
            rows += batch.examples
            progress("rows scored", rows, len(tokens))
    if count == 0:
        return Score(rows, 0, math.nan, math.nan, math.nan)
    loss = total / count
    return Score(rows, count, loss, math.exp(loss) if loss < 709 else math.inf, hits / count)


def is_exact_match(answer: str, reference: str) -> bool:
    """Equal texts, after removing outer whitespace and making every run of whitespace one space; case counts."""
    return answer.split() == reference.split()


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    format_name: str = "auto",
    max_examples: int | None = None,
    base: bool = True,
    exact_match: bool = False,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    device: str | None = None,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Score a run on held-out rows, and its base beside it; one model is loaded at a time.

    >>> tunesmith.evaluate("runs/my-run", "held-out.jsonl").scores["tuned"].loss

    Args:
        path: as for `load_run`; `base` scores the base of it too.
        data: a file or a Hub id; rows with answers, of which `split` and `max_examples` take a part.
        format_name: of the rows; `auto` looks at the columns of the first.
        exact_match: also answer every row greedily and compare texts.
        max_new_tokens, batch_size: for exact match: longest answer in tokens, and rows answered at once.

    Raises:
        UsageError: the run or the data cannot be used; see `load_run` and `read_rows`.
    """
    location = locate_run(path)
    source = Source(source=str(data), split=split, max_examples=max_examples)
    rows = read_rows(source)
    loaded = load_run(location, device=device)
    tokens = _eval_tokens(rows, source, loaded, format_name, exact_match=exact_match)

    def scored(loaded: LoadedModel) -> Score:
        options: dict[str, Any] = {"format_name": format_name, "batch_size": batch_size}
        answers = generate(loaded, rows, Decoding(max_new_tokens), **options) if exact_match else None
        with loaded.training_attention() as train_model:
            result = score(train_model, tokens, pad_id=loaded.pad_id, progress=progress)
        if answers is None:
            return result
        matches = []
        progress("answers", 0, len(rows))
        for done, row in enumerate(answers, 1):
            if "reference" in row:  # a row with an empty answer has none
                matches.append(is_exact_match(row["output"], row["reference"]))
            progress("answers", done, len(rows))
        if not matches:
            raise _no_answers(source.source, "every answer is empty")
        return replace(result, exact_match=sum(matches) / len(matches), asked=len(matches))

    scores = {"model" if location.kind == "base" else "tuned": scored(loaded)}
    if base and location.kind == "adapter":
        with disabled(loaded.model):
            scores = {"base": scored(loaded), **scores}
    elif base and location.kind == "full":
        del loaded  # one model at a time
        scores = {"base": scored(load_run(path, device=device, base_only=True)), **scores}
    counts = tokens.sources[0]
    return Evaluation(scores, len(rows), counts.dropped + counts.emptied, counts.cut)


def _eval_tokens(rows: Rows, source: Source, loaded: LoadedModel, format_name: str, *, exact_match: bool) -> TokenSet:
    found = row_source(rows[0], rows.where(0), format_name, loaded.sources)
    if exact_match and found.format == "text":
        raise _no_answers(source.source, "rows of the format text were read")
    source = replace(source, format=found.format, columns=found.columns)
    data = loaded.run.data if loaded.run else Data(train=(source,), seq_len=min(loaded.context, 1 << 20))
    tokens = tokenise([(source, rows)], data, loaded.template, loaded.tokenizer, cache=None, what=source.source)
    if not len(tokens):
        what, why = f"none of the {len(rows)} rows can be scored", f"all are longer than data.seq_len: {data.seq_len}"
        raise UsageError(what, where=source.source, why=why, fix="give shorter rows")
    return tokens


def _no_answers(where: str, why: str) -> UsageError:
    fix = "leave --exact-match out, or give rows with answers"
    return UsageError("no row holds an answer to compare with", where=where, why=why, fix=fix)

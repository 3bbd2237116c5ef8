"""Measures of a model on held-out rows: loss, perplexity, token accuracy, scores of its answers.

Loss and accuracy are teacher-forced over the supervised tokens, by the same `TrainModel` and packed
batches that training uses: there is no second formula. They are sums over all tokens divided once,
so they do not depend on the batching. Scores of answers (`score_rows.py`) come with intervals, and
the answers are saved.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tunesmith.adapter.lora import disabled
from tunesmith.config.schema import Data, Source
from tunesmith.data.batches.batch import Batch
from tunesmith.data.batches.layout import Layout
from tunesmith.data.batches.pixels import PixelReader
from tunesmith.data.compare.splits import SourceRows, read_splits
from tunesmith.data.prepare import find_trained_rows
from tunesmith.data.rows.detect import sample_rows
from tunesmith.data.source.open_source import (
    Rows,
    describe_layouts,
    from_list,
    is_local,
    read_rows,
)
from tunesmith.data.tokens.token_set import Repeats, TokenSet
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import DataError, MachineError, UsageError
from tunesmith.host.logger import lines_by_default
from tunesmith.inference.decoding import Decoding, evaluating
from tunesmith.inference.load_run import (
    LoadedModel,
    RunLocation,
    load_run,
    locate_run,
    require_held_out,
    that_sees,
)
from tunesmith.methods.answers import accuracy
from tunesmith.methods.base import TrainModel, supervised_positions
from tunesmith.metrics.intervals import Interval, LossDifference, loss_sentence, paired_losses
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.run_dir import PAIRS, weights_step
from tunesmith.tools.evaluate.generate import find_source
from tunesmith.tools.evaluate.score_rows import (
    RowScores,
    Scoring,
    answers_path,
    no_scored_rows,
    save_scores,
    saved_scores,
    summarize_rows,
)
from tunesmith.tools.evaluate.scorers import check_scorer_names
from tunesmith.training.program_rows import mappings
from tunesmith.units import count_of

log = logging.getLogger(__name__)

PACKED_ROW_TOKENS = 4096  # of a packed row that is scored
# Called with what is counted, their count so far, their total, and for answers their tokens so far
Progress = Callable[..., None]


@dataclass(frozen=True)
class EvalResult:
    """One model on one file.

    Attributes:
        tokens: supervised ones; of answers that are compared or labeled those of the good ones,
            and so for loss, perplexity and accuracy.
        loss: mean cross-entropy over them, in nats.
        perplexity: exp(loss).
        token_accuracy: share of them that are the most likely token after all true tokens before.
        pairs: of each pair of answers, whether the model finds the chosen one likelier, by its mean
            log-probability of a token: 1, 0, or 0.5 where both are alike; in an order that all
            models share.
        row_losses, row_tokens: of each row the sum of its losses, in nats, and of how many tokens.
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float
    token_accuracy: float
    pairs: tuple[float, ...] = field(default=(), repr=False)
    row_losses: tuple[float, ...] = field(default=(), repr=False)
    row_tokens: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Evaluation(Tabular):
    """The result of `evaluate`.

    Attributes:
        scores: of `base` and `tuned`, or of `model` for a plain model.
        data: the rows that were scored, and where they are from.
        dropped: rows left out, because they are longer than the recipe's seq_len.
        cut: rows shortened for the same reason.
        by_scorer: what each scorer says of the answers; empty without scorers.
        answers: the file of the answers, one line each; None without scorers.
        unanswered: rows without an answer of their own, which no scorer takes.
        unfinished: of each model's answers those that were cut at the longest allowed.
        empty: rows whose answer is empty, of which the loss is that of its end.
        seen: rows that the run was trained on, token for token; None where unknown.
        seen_fault: why it is not known; empty for a model that is no run's.
        row_hash: of the rows as tokens; two runs with one hash were scored on the same tokens.
        reference_hash: of what the scorers compare answers with; empty without scorers.
    """

    scores: dict[str, EvalResult]
    data: str
    rows: int
    dropped: int
    cut: int
    by_scorer: tuple[RowScores, ...] = ()
    answers: Path | None = None
    unanswered: int = 0
    empty: int = 0
    unfinished: Mapping[str, int] = field(default_factory=dict)
    seen: Repeats | None = None
    seen_fault: str = ""
    row_hash: str = ""
    reference_hash: str = ""

    def table(self) -> ResultTable:
        """The scores, a column for each model, and what a reader should know of the rows."""
        intervals = {}
        for scores in self.by_scorer:
            # The file may have answers of a base that is not evaluated now.
            intervals[scores.name] = [scores.models[model] for model in self.scores]
        rows = [*loss_rows(list(self.scores.values())), *interval_rows(intervals)]
        notes = [*self.warnings(), *self.verdicts(), *self.notes()]
        return ResultTable(rows, list(self.scores), title=f"rows: {self.data}", notes=notes)

    @property
    def loss_difference(self) -> LossDifference | None:
        """The loss of tuned less that of base; None without a base, and of pairs, where both may
        rise while the model learns which answer is better."""
        base, tuned = self.scores.get("base"), self.scores.get("tuned")
        if base is None or tuned is None or tuned.pairs or not tuned.row_losses:
            return None
        return paired_losses(base.row_losses, tuned.row_losses, tuned.row_tokens)

    def verdicts(self) -> list[str]:
        """A sentence for the loss and for each scorer: whether tuned is better than base."""
        verdicts = []
        if self.loss_difference is not None:
            verdicts.append(loss_sentence(self.loss_difference))
        return verdicts + [scores.verdict for scores in self.by_scorer if scores.verdict]

    def warnings(self) -> list[str]:
        """Tell what a reader must know before believing the scores."""
        warnings = []
        if self.empty:
            warnings.append(
                f"warning: {self.empty} of {count_of(self.rows, 'row')} with an empty answer: its "
                "loss is that of the end; fix: leave these rows out"
            )
        if self.seen is not None and self.seen.count:
            warnings.append(
                f"warning: trained on {self.seen.count} of {count_of(self.rows, 'row')}, so the "
                "scores do not show how good the model is on new rows; "
                f"first {self.seen.where} ({self.seen.earlier})"
            )
        return warnings

    def notes(self) -> Iterator[str]:
        """Yield what else there is to know of the rows, a line each."""
        rows = count_of(self.rows, "row")
        for count, what in ((self.dropped, "dropped"), (self.cut, "cut short")):
            if count:
                yield f"{what}: {count} of {rows}, longer than the recipe's seq_len"
        if self.seen is not None and not self.seen.count:
            yield f"of {rows} none was trained on (compared by tokens)"
        if self.seen_fault:
            yield f"could not check whether rows were trained on:  {self.seen_fault}"
        if self.unanswered:
            yield f"not scored: {self.unanswered} of {rows}, with an empty answer"
        for model, count in self.unfinished.items():
            if count:
                answers = count_of(self.by_scorer[0].rows, "answer")
                cut = f"{model}: {count} of {answers} cut off at max_new_tokens"
                yield f"{cut}, which may lower the score"
        if self.answers is not None:
            yield f"answers: {self.answers}"


def interval_rows(by_scorer: Mapping[str, Sequence[Interval]]) -> list[list[str]]:
    """Format the mean and interval of each scorer, a cell for each model."""
    rows = []
    for scorer, intervals in by_scorer.items():
        cells = []
        for interval in intervals:
            ends = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
            cells.append(f"{interval.mean:.1%} ({ends})")
        rows.append([f"{scorer}, 95 % interval", *cells])
    return rows


def loss_rows(results: Sequence[EvalResult]) -> list[list[str]]:
    """Loss and what else is measured without scorers, a cell for each model."""
    perplexities = []
    for result in results:
        # exp of a large loss overflows.
        is_finite = result.perplexity < math.inf
        perplexities.append(f"{result.perplexity:.3f}" if is_finite else "above 1e308")
    return [
        ["loss (nats per token)", *(f"{result.loss:.4f}" for result in results)],
        ["perplexity", *perplexities],
        ["token accuracy", *(f"{result.token_accuracy:.2%}" for result in results)],
        ["rows", *(str(result.rows) for result in results)],
        ["supervised tokens", *(str(result.tokens) for result in results)],
    ]


def score(
    train_model: TrainModel,
    tokens: TokenSet,
    *,
    pad_id: int,
    progress: Progress = lambda *_: None,
    ranks: Ranks = ONE_PROCESS,
) -> EvalResult:
    """Loss, perplexity and token accuracy of every supervised token, each example once; the loss of
    each row, and the order of each pair.

    Several ranks take the batches in turn. Their sums are added in the order of the batches, so
    that the result is that of one process.
    """
    hits = 0
    rows = 0
    pairs: list[float] = []
    row_losses = np.zeros(len(tokens))
    row_tokens = np.zeros(len(tokens), np.int64)
    supervised = tokens.supervised
    progress("rows scored", 0, len(tokens))
    with evaluating(train_model):
        layout = Layout(pad_id, train_model.packs_rows)
        batches = layout.batches(tokens, PACKED_ROW_TOKENS)
        for turn in iter(lambda: list(islice(batches, ranks.world)), []):
            sums = _BatchSums([], [], [], 0, [])
            with ranks.raise_on_all_ranks():
                if ranks.rank < len(turn):
                    indices, batch = turn[ranks.rank]
                    sums = _batch_sums(train_model, batch, indices, supervised[indices].tolist())
            for of_batch in ranks.all_gather_object(sums):
                hits += of_batch.hits
                rows += len(of_batch.indices)
                pairs += of_batch.pairs
                row_losses[of_batch.indices] = of_batch.row_losses
                row_tokens[of_batch.indices] = of_batch.row_tokens
            progress("rows scored", rows, len(tokens))
    count = int(row_tokens.sum())
    if count == 0:
        return EvalResult(rows, 0, math.nan, math.nan, math.nan)
    loss = float(row_losses.sum()) / count
    # exp overflows a double from 709.8 on.
    perplexity = math.exp(loss) if loss < 709 else math.inf
    return EvalResult(
        rows,
        count,
        loss,
        perplexity,
        hits / count,
        pairs=tuple(pairs),
        row_losses=tuple(row_losses.tolist()),
        row_tokens=tuple(row_tokens.tolist()),
    )


class _BatchSums(NamedTuple):
    """The sum of losses and the count of tokens of each row of a batch, the tokens of all that are
    right, and the order of each pair."""

    indices: list[int]
    row_losses: list[float]
    row_tokens: list[float]
    hits: int
    pairs: list[float]


def _batch_sums(
    train_model: TrainModel, batch: Batch, indices: list[int], counts: list[int]
) -> _BatchSums:
    """`indices`: of the batch's examples; `counts`: supervised tokens of each."""
    batch = batch.to(train_model.model.device)
    losses, correct = train_model.token_scores(batch)
    index, _ = supervised_positions(batch)
    of_targets = losses.flatten()[index].double()
    is_scored = torch.ones_like(of_targets, dtype=torch.bool)
    pairs: list[float] = []
    sequences = batch.sequences
    if sequences is not None:
        is_scored = sequences.labels[sequences.of_target]
        if batch.chosen_tokens:
            sums = torch.segment_reduce(of_targets, "sum", lengths=sequences.lengths)
            means = -sums / sequences.lengths
            pairs = accuracy(means[0::2] - means[1::2]).tolist()
    # The examples are laid one after the other, and so are their targets.
    row_of_target = np.repeat(np.arange(len(indices)), counts)

    def sums_of_rows(values: torch.Tensor) -> list[float]:
        return np.bincount(row_of_target, values.cpu().numpy(), len(indices)).tolist()

    return _BatchSums(
        indices,
        sums_of_rows(of_targets.where(is_scored, 0)),
        sums_of_rows(is_scored),
        int((correct.flatten()[index] & is_scored).sum()),
        pairs,
    )


@lines_by_default()
def evaluate(
    path: str | os.PathLike[str],
    data: object = None,
    *,
    split: str | None = None,
    format_name: str = "auto",
    columns: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    base: bool = True,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    device: str | None = None,
    scorers: str | Sequence[str] = (),
    decoding: Decoding | None = None,
    output: str | Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda *_, **__: None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Score a run on held-out rows, and its base beside it; one model is loaded at a time.

    >>> tunesmith.evaluate("runs/my-run", "held-out.jsonl").scores["tuned"].loss

    Args:
        path: as for `load_run`; `base` scores the base of it too.
        data: rows with answers: a file, a Hub id, mappings, or a `datasets.Dataset`; `split` and
            `max_examples` take a part of them. None takes the rows that the run itself validates
            on: `data.validation`, or what `data.hold_out` drew.
        format_name, columns: how the rows of `data` are read, as for `generate`; all alike.
        max_new_tokens, batch_size: for answers: the longest one in tokens, and rows answered at
            once.
        scorers: one name or several, such as `exact` or `f1`, or `file.py:function`: answer every
            row and score the answers, with intervals.
        decoding: for scorers: how tokens are chosen; None is greedy, up to `max_new_tokens`.
        output: for scorers: the file of the answers; None takes one in evals/ of the run. Answers
            that exist are kept, and the missing ones are added.
        fresh: move existing answers aside.
        trust_remote_code: as for `load_run`.
        progress: called with what is counted, their count so far, and their total.
        ranks: each has the entire model and evaluates a part of the rows. Rank 0 writes the
            answers. All return the result of a single process. None is one process.

    Raises:
        UsageError, ModelError, CheckpointError, MachineError: as `load_run`.
        DataError: there is no such file, or a row is broken.
        StoppedError: a signal came while rows were answered; the same call resumes.
    """
    scoring = None
    ranks = ranks or ONE_PROCESS
    with ranks.raise_on_all_ranks():
        # Wrong names end it before a model is loaded.
        scorers = check_scorer_names(scorers)
        location = locate_run(path, trust_remote_code=trust_remote_code)
        if data is None:
            parts, name = _held_out_rows(location, os.fspath(path))
        else:
            source, rows = _rows_of(data, split, max_examples)
            name = source.source
            parts = [_read_source(source, rows, location, format_name, columns, ranks)]
        if scorers and all(source.format == "text" for source, _ in parts):
            raise no_scored_rows(name, "rows of the format text were read")
        for _, rows in parts:
            location = that_sees(location, sample_rows(rows)[0].values())
        loaded = load_run(location, device=device)
        tokens = _eval_tokens(parts, loaded, name)
        shown = name
        if data is None:
            tokens = _first_validated(tokens, location, max_examples)
        else:
            shown = _short_name(name)
        if scorers:
            decoding = decoding or Decoding(max_new_tokens)
            scoring = Scoring(loaded, tokens, parts, shown, scorers, decoding, batch_size, ranks)
            scoring.open(answers_path(location, name, output), fresh)

    def score_model(loaded: LoadedModel, model: str) -> EvalResult:
        if scoring is not None:
            scoring.answer(loaded, model, progress)
        with loaded.training_attention() as train_model:
            return score(train_model, tokens, pad_id=loaded.pad_id, progress=progress, ranks=ranks)

    with scoring or nullcontext():
        tuned = "model" if location.holds == "base" else "tuned"
        scores = {tuned: score_model(loaded, tuned)}
        seen, seen_fault = _seen_rows(tokens, loaded, ranks)
        if base and location.holds == "adapter":
            # The base of an adapter is the same model with the adapter off.
            with disabled(loaded.model):
                scores = {"base": score_model(loaded, "base"), **scores}
        elif base and location.holds == "full":
            # One model at a time.
            del loaded
            base_model = load_run(
                path, device=device, base_only=True, trust_remote_code=trust_remote_code
            )
            scores = {"base": score_model(base_model, "base"), **scores}
        evaluation = replace(_evaluation(scores, tokens, shown), seen=seen, seen_fault=seen_fault)
        _keep_losses(evaluation, tokens, location, ranks, has_answers=bool(scorers))
        if scoring is None:
            return evaluation
        by_scorer = scoring.finish(_about(evaluation, location))
        return replace(
            evaluation,
            by_scorer=(*evaluation.by_scorer, *by_scorer),
            answers=scoring.path,
            unanswered=scoring.unanswered,
            unfinished=scoring.unfinished(),
            reference_hash=scoring.reference_hash,
        )


def _evaluation(scores: dict[str, EvalResult], tokens: TokenSet, name: str) -> Evaluation:
    """The scores of the models, with what the rows called `name` became."""
    counts = tokens.counts
    dropped = counts.dropped + counts.emptied
    by_scorer: tuple[RowScores, ...] = ()
    if tokens.has_pairs:
        orders = {model: list(result.pairs) for model, result in scores.items()}
        by_scorer = (summarize_rows(PAIRS, orders),)
    return Evaluation(
        scores,
        name,
        counts.rows,
        dropped,
        counts.cut,
        by_scorer,
        empty=counts.flaws.get("empty", [0])[0],
        row_hash=counts.digest,
    )


def _keep_losses(
    evaluation: Evaluation,
    tokens: TokenSet,
    location: RunLocation,
    ranks: Ranks,
    *,
    has_answers: bool,
) -> None:
    """Write the losses, and the order of pairs where there are any, into evals/ of the run, for
    `report`.

    has_answers: the losses stand beside the scores of the answers too; of pairs the order does not.
    """
    is_of_run = location.run is not None and location.holds != "base"
    if not is_of_run or not ranks.is_main_process or (has_answers and not tokens.has_pairs):
        return
    scores = {scores.name: saved_scores(scores) for scores in evaluation.by_scorer}
    values = {**_about(evaluation, location), "scores": scores}
    answers = answers_path(location, evaluation.data, None)
    kind = "pairs" if tokens.has_pairs else "loss"
    path = answers.with_name(f"{answers.stem}-{kind}.jsonl")
    try:
        save_scores(path, evaluation.data, len(tokens), evaluation.row_hash, values)
    except MachineError as error:
        # The scores are still shown: the run may be somebody else's.
        log.warning(f"{error.what} for the report: {error.where}: {error.why}")


def _about(evaluation: Evaluation, location: RunLocation) -> dict[str, object]:
    """Collect what the file of the scores says beside them."""
    losses = {}
    row_losses = {}
    row_tokens: tuple[int, ...] = ()
    for name, result in evaluation.scores.items():
        # JSON has neither NaN nor infinity.
        losses[name] = result.loss if math.isfinite(result.loss) else None
        if losses[name] is not None:
            row_losses[name] = result.row_losses
            row_tokens = result.row_tokens
    return {
        "checkpoint": location.folder.name if location.folder else None,
        "step": weights_step(location.folder) if location.run else None,
        "losses": losses,
        "row_losses": {"row_hash": evaluation.row_hash, "tokens": row_tokens, **row_losses},
        "seen": None if evaluation.seen is None else evaluation.seen.count,
    }


def _seen_rows(tokens: TokenSet, loaded: LoadedModel, ranks: Ranks) -> tuple[Repeats | None, str]:
    """The rows that the run was trained on, or why that is not known; of no run neither.

    Rank 0 reads them, which takes as long as at the start of the run.
    """
    run = loaded.run
    seen: tuple[Repeats | None, str] = (None, "")
    with ranks.raise_on_all_ranks():
        if ranks.is_main_process and run is not None and loaded.location.holds != "base":
            # The training rows may be gone: the scores are valid without them.
            seen = find_trained_rows(tokens, run, run.data, loaded.template)
    return ranks.broadcast_object(seen)


def _rows_of(data: object, split: str | None, max_examples: int | None) -> tuple[Source, Rows]:
    """Return the rows of a file or of the Hub, or those that a program passes."""
    if isinstance(data, str | os.PathLike):
        source = Source(source=os.fspath(data), split=split, max_examples=max_examples)
        return source, read_rows(source)
    argument = "evaluate(data=...)"
    listed = [dict(row) for row in mappings(data, argument)][:max_examples]
    if not listed or split is not None:
        what = "there are no rows" if split is None else "rows of a program have no split"
        raise DataError(what, where=argument, fix="pass the rows to score, without split")
    rows = from_list(listed)
    return Source(source=rows.name), rows


def _read_source(
    source: Source,
    rows: Rows,
    location: RunLocation,
    format_name: str,
    columns: Mapping[str, str] | None,
    ranks: Ranks,
) -> tuple[Source, Rows]:
    """Return the rows, and their source with the format and columns that fit them."""
    if ranks.is_main_process:
        for line in describe_layouts([rows]):
            log.info(line)
    # Rows of a file are read as those of the run, where they have its columns.
    like = find_source(rows, location.sources, format_name, columns)
    return replace(source, format=like.format, columns=like.columns), rows


def _held_out_rows(location: RunLocation, path: str | Path) -> tuple[SourceRows, str]:
    """The rows that a run validates on, and their name for the user."""
    run = require_held_out(location, path)
    # Without hold_out the training rows need not be read.
    data = run.data if run.data.hold_out else replace(run.data, train=())
    _, parts = read_splits(data, run.train.seed)
    sources = (f"{_short_name(source.source)} {source.split or ''}" for source, _ in parts)
    names = ", ".join(map(str.rstrip, sources))
    return parts, f"{data.hold_out} of {names}, held out" if data.hold_out else names


def _short_name(source: str) -> str:
    """A source as tables and saved scores have it: a file by its name alone."""
    return Path(source).name if is_local(source) else source


def _first_validated(tokens: TokenSet, location: RunLocation, count: int | None) -> TokenSet:
    """The first `count` of the examples that the run validated on; UsageError where they are not
    the same any more."""
    run = location.run
    if location.held_out_hash not in (None, tokens.counts.digest):
        raise UsageError(
            "these are not the run's held-out rows",
            where="--data",
            why="the file, the template or the tokenizer has changed: with data.hold_out, "
            "other rows would be held out now",
            fix="undo the change, or use rows that it was not trained on: --data FILE",
        )
    if run and run.validate.max_examples is not None:
        tokens = tokens.first(run.validate.max_examples)
    return tokens if count is None else tokens.first(count)


def _eval_tokens(parts: SourceRows, loaded: LoadedModel, name: str) -> TokenSet:
    if loaded.run:
        data = loaded.run.data
    else:
        sources = tuple(source for source, _ in parts)
        data = Data(train=sources, seq_len=min(loaded.context or 1 << 20, 1 << 20))
    tokens = tokenize(parts, data, loaded.template, cache=None, what="eval")
    if loaded.template.pictures is not None:
        tokens.pictures = PixelReader(loaded.template.pictures)
    if not len(tokens):
        raise UsageError(
            f"of {count_of(tokens.counts.rows, 'row')} none can be scored",
            where=name,
            why=f"all are longer than data.seq_len: {data.seq_len}",
            fix="use shorter rows",
        )
    return tokens

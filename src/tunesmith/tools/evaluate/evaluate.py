"""Evaluation of a model on held-out rows: loss, perplexity, token accuracy, scores of answers.

Loss and accuracy are computed over the supervised tokens with teacher forcing. The code for the
forward pass and for packed batches is the same as in training. Values are summed over all tokens
and divided once at the end, so that the results do not depend on the batch size. For scorers
(`score_rows.py`) the model generates an answer to every row. The answers are saved, and the mean
scores have confidence intervals.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from tunesmith.adapter.lora import disabled
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import (
    LoadedModel,
    RunLocation,
    add_vision_if_needed,
    load_run,
    locate_run,
    require_held_out,
)
from tunesmith.answers.scoring.scorers import check_scorer_names
from tunesmith.batches.batch import Batch
from tunesmith.batches.layout import Layout
from tunesmith.batches.pixels import PixelReader
from tunesmith.config.schema import Data, Source
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import DataError, MachineError, UsageError
from tunesmith.host.functions import file_and_name
from tunesmith.host.logger import lines_by_default
from tunesmith.methods.pairs import accuracy
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.presentation.data import layout_lines
from tunesmith.rows.compare.splits import SourceRows, read_splits
from tunesmith.rows.detect import sample_rows
from tunesmith.rows.source.open_source import (
    Rows,
    from_list,
    is_local,
    read_rows,
)
from tunesmith.run_dir import PAIRS, weights_step
from tunesmith.start.prepare import find_trained_rows
from tunesmith.tokens.token_set import Repeats, TokenSet
from tunesmith.tokens.tokenize import tokenize
from tunesmith.tools.evaluate.row_source import find_source
from tunesmith.tools.evaluate.score_rows import (
    Progress,
    RowComparison,
    RowScores,
    Scoring,
    answers_path,
    compare_rows,
    no_scored_rows,
    save_scores,
    summarize_rows,
)
from tunesmith.train_model import TrainModel, evaluating, supervised_positions
from tunesmith.training.program_rows import mappings
from tunesmith.units import count_of

log = logging.getLogger(__name__)

PACKED_ROW_TOKENS = 4096  # maximum tokens of a packed row when losses are computed


@dataclass(frozen=True)
class EvalResult:
    """Loss and accuracy of one model on the evaluated rows.

    Attributes:
        rows: number of rows.
        tokens: number of supervised tokens. If rows have pairs of answers or labeled answers, only
            the tokens of good answers count. The same tokens are used for loss, perplexity and
            accuracy.
        loss: mean cross-entropy of these tokens, in nats.
        perplexity: exp(loss).
        token_accuracy: fraction of these tokens that are the model's most likely next token.
        pairs: one number per pair of answers: 1 if the chosen answer has a higher mean log
            probability per token than the rejected answer, 0 if lower, 0.5 if equal. All models
            have the same order of pairs.
        row_losses: for each row the sum of its token losses, in nats.
        row_tokens: for each row the number of its tokens.
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
    """Evaluation of a run and of its base model, or of several runs, on held-out rows.

    Attributes:
        scores: the result of each model: `base` and `tuned`, or `model` if the path is a base
            model. For several runs: the result of each run by its name, and of `base`.
        data: description of the scored rows and their source.
        rows: number of rows, including dropped rows.
        dropped: number of rows that were dropped because they are longer than the recipe's seq_len.
        cut: number of rows that were truncated because they are longer than the recipe's seq_len.
        by_scorer: the scores of each scorer; empty if no scorer was used.
        answers: the file of the answers, one line per answer; None if no scorer was used.
        unanswered: number of rows that are not scored because they contain no answer.
        unfinished: for each model the number of answers that were cut off at max_new_tokens.
        seen: the evaluated rows that also occur in the training data, compared by tokens; None if
            unknown.
        seen_fault: why `seen` is unknown; empty for a base model.
        row_hash: hash of the rows' tokens. Two runs with the same hash were scored on the same
            tokens.
        reference_hash: hash of the answers in the rows; empty if no scorer was used.
        loss_comparisons: the loss of the tuned model compared with that of the base, or the best
            of several runs with each of the others. Empty for pairs: the loss of pairs is
            misleading, because it can rise while the model learns which answer is better.
        obstacles: for each measure by which runs cannot be compared, a sentence with the reason.
        runs: the evaluation of each run by its name, if there are several. The other values are
            those of the first run.
    """

    scores: dict[str, EvalResult]
    data: str
    rows: int
    dropped: int
    cut: int
    by_scorer: tuple[RowScores, ...] = ()
    answers: Path | None = None
    unanswered: int = 0
    unfinished: Mapping[str, int] = field(default_factory=dict)
    seen: Repeats | None = None
    seen_fault: str = ""
    row_hash: str = ""
    reference_hash: str = ""
    loss_comparisons: tuple[RowComparison, ...] = ()
    obstacles: tuple[str, ...] = ()
    runs: Mapping[str, "Evaluation"] = field(default_factory=dict)

    def table(self) -> ResultTable:
        """Return a table with a column for each model, and notes about the rows."""
        columns = []
        for result in self.scores.values():
            # `score` sets the perplexity to infinity if exp(loss) overflows.
            is_finite = result.perplexity < math.inf
            columns.append(
                [
                    f"{result.loss:.4f}",
                    f"{result.perplexity:.3f}" if is_finite else "above 1e308",
                    f"{result.token_accuracy:.2%}",
                    str(result.rows),
                    str(result.tokens),
                ]
            )
        names = ["loss (nats per token)", "perplexity", "token accuracy", "rows"]
        rows = list(zip([*names, "supervised tokens"], *columns, strict=True))
        if not any(result.tokens for result in self.scores.values()):
            rows = [row for row in rows if row[0] == "rows"]  # rows without answers have no loss
        for scores in self.by_scorer:
            # Show only the models of this evaluation. With --no-base, the answers file can still
            # have answers of the base model from an earlier evaluation.
            intervals = [scores.models[model] for model in self.scores]
            cells = [
                f"{mean:.1%} ({100 * low:.1f} to {100 * high:.1f})" for mean, low, high in intervals
            ]
            rows.append((f"{scores.name}, 95 % interval", *cells))
        notes = [*self.warnings(), *self.verdicts(), *self.notes()]
        return ResultTable(rows, list(self.scores), title=f"rows: {self.data}", notes=notes)

    @property
    def comparisons(self) -> list[RowComparison]:
        """The comparisons of the models by the loss and by each scorer."""
        by_score = [each for scores in self.by_scorer for each in scores.comparisons]
        return [*self.loss_comparisons, *by_score]

    def verdicts(self) -> list[str]:
        """Return one sentence per comparison, and one per measure that cannot be compared."""
        return [*self.obstacles, *(comparison.verdict for comparison in self.comparisons)]

    def warnings(self) -> list[str]:
        """Return warnings about problems of the rows that can make the scores unreliable."""
        if self.runs:
            return [
                f"warning: {name}: {warning.removeprefix('warning: ')}"
                for name, evaluation in self.runs.items()
                for warning in evaluation.warnings()
            ]
        if self.seen is None or not self.seen.count:
            return []
        return [
            f"warning: the run was trained on {self.seen.count} of {count_of(self.rows, 'row')}, "
            "so the scores do not show how good the model is on new rows; "
            f"the first such row is {self.seen.where} (in training: {self.seen.earlier})"
        ]

    def notes(self) -> Iterator[str]:
        """Yield further notes about the rows, one line each."""
        for name, evaluation in self.runs.items():
            yield from (f"{name}: {note}" for note in evaluation.notes())
        if self.runs:
            return
        rows = count_of(self.rows, "row")
        for count, what in ((self.dropped, "dropped"), (self.cut, "cut short")):
            if count:
                yield f"{what}: {count} of {rows}, with more tokens than the recipe's data.seq_len"
        if self.seen is not None and not self.seen.count:
            yield "the run was not trained on any of the evaluated rows (compared by tokens)"
        if self.seen_fault:
            yield f"could not check whether the run was trained on these rows: {self.seen_fault}"
        if self.unanswered:
            yield f"not scored, because the answer is empty: {self.unanswered} of {rows}"
        for model, count in self.unfinished.items():
            if count:
                answers = count_of(self.by_scorer[0].rows, "answer")
                cut = f"{model}: max_new_tokens cut off {count} of {answers}"
                yield f"{cut}, which may lower the score"
        if self.answers is not None:
            yield f"answers: {self.answers}"


def score(
    train_model: TrainModel,
    tokens: TokenSet,
    *,
    pad_id: int,
    progress: Progress = lambda *_: None,
    ranks: Ranks = ONE_PROCESS,
) -> EvalResult:
    """Compute loss, perplexity and token accuracy over all supervised tokens of the examples.

    With several ranks, each rank computes a part of the batches. The sums are added in the order of
    the batches, so the result is the same as with one process.
    """
    pairs: list[float] = []
    sums = np.zeros((3, len(tokens)))  # the sums that `_batch_sums` returns, for all examples
    supervised = tokens.supervised
    rows = 0
    progress("rows scored", rows, len(tokens))
    with evaluating(train_model):
        batches = Layout(pad_id, train_model.packs_rows).batches(tokens, PACKED_ROW_TOKENS)
        # In each turn, every rank computes one batch. In the last turn, some ranks have no batch.
        while turn := list(islice(batches, ranks.world)):
            computed = None
            with ranks.raise_on_all_ranks():
                if ranks.rank < len(turn):
                    indices, batch = turn[ranks.rank]
                    computed = _batch_sums(train_model, batch, supervised[indices].tolist())
            for (indices, _), of_rank in zip(turn, ranks.all_gather_object(computed), strict=False):
                assert of_rank is not None
                sums[:, indices], batch_pairs = of_rank
                pairs += batch_pairs
                rows += len(indices)
            progress("rows scored", rows, len(tokens))
    row_losses, row_tokens, row_hits = sums
    count = int(row_tokens.sum())
    if count == 0:
        return EvalResult(rows, 0, math.nan, math.nan, math.nan)
    loss = float(row_losses.sum()) / count
    # math.exp overflows for arguments above 709.8.
    perplexity = math.exp(loss) if loss < 709 else math.inf
    return EvalResult(
        rows,
        count,
        loss,
        perplexity,
        int(row_hits.sum()) / count,
        pairs=tuple(pairs),
        row_losses=tuple(row_losses.tolist()),
        row_tokens=tuple(row_tokens.astype(int).tolist()),
    )


def _batch_sums(
    train_model: TrainModel, batch: Batch, counts: list[int]
) -> tuple[np.ndarray, list[float]]:
    """Compute the loss sums and token counts of the examples in one batch.

    Args:
        counts: number of supervised tokens of each example.

    Returns:
        For each example the sum of its token losses, the number of its scored tokens, and how many
        of them are the model's most likely token, float64 [3, examples]; and one number per pair of
        answers, see `EvalResult.pairs`.
    """
    batch = batch.to(train_model.model.device)
    losses, correct = train_model.token_scores(batch)
    index, _ = supervised_positions(batch)
    target_losses = losses.flatten()[index].double()
    values = torch.stack(
        [target_losses, torch.ones_like(target_losses), correct.flatten()[index].double()]
    )
    pairs = []
    sequences = batch.sequences
    if sequences is not None:
        values = values.where(sequences.labels[sequences.sequence_indices], 0)
        if batch.chosen_tokens:
            sums = torch.segment_reduce(target_losses, "sum", lengths=sequences.lengths)
            means = -sums / sequences.lengths
            pairs = accuracy(means[0::2] - means[1::2]).tolist()
    # Index of the example that each target token belongs to.
    example = np.repeat(np.arange(len(counts)), counts)
    per_example = [np.bincount(example, row, len(counts)) for row in values.cpu().numpy()]
    return np.stack(per_example), pairs


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
    scorers: str | Callable[..., float] | Sequence[str | Callable[..., float]] = (),
    decoding: Decoding | None = None,
    output: str | Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda *_, **__: None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Score a run on held-out rows, and compare it with its base model.

    Only one model is loaded at a time.

    >>> tunesmith.evaluate("runs/my-run", "held-out.jsonl").scores["tuned"].loss

    Args:
        path: as for `load_run`.
        data: rows with answers: a file, a Hub id, mappings, or a `datasets.Dataset`. None: the
            validation rows of the run, from `data.validation` or `data.hold_out`.
        split: split of `data`, or a slice of the rows.
        format_name, columns: format and columns of `data`, as for `generate`.
        max_examples: use only the first rows.
        base: also score the base model.
        max_new_tokens: maximum number of tokens of an answer.
        batch_size: number of rows that are answered at once.
        device: device of the model; None: the default device.
        scorers: one scorer or several: a name such as `exact`, `f1` or `file.py:function`, or a
            function at the top level of a file. The model
            answers every row, and the answers are scored, with confidence intervals.
        decoding: how the tokens of answers are chosen; None: greedy, up to `max_new_tokens`.
        output: the file for the answers; None: a file in evals/ of the run. If the file exists, its
            answers are used, and only missing answers are generated.
        fresh: rename the file of existing answers, and answer all rows again.
        trust_remote_code: as for `load_run`.
        progress: function that is called with a label, the number of finished items and the number
            of all items.
        ranks: the processes of a distributed evaluation. Each rank has the entire model and
            evaluates a part of the rows. Rank 0 writes the answers. All ranks return the same
            result as a single process. None: one process.

    Raises:
        UsageError, ModelError, CheckpointError, MachineError: as `load_run`.
        DataError: the file does not exist, or a row is invalid.
        StoppedError: a stop signal was received. The same call resumes.
    """
    scoring = None
    ranks = ranks or ONE_PROCESS
    with ranks.raise_on_all_ranks():
        # Check the names of the scorers before a model is loaded.
        given = [scorers] if isinstance(scorers, str) or callable(scorers) else scorers
        names = [file_and_name(one) if callable(one) else one for one in given]
        check_scorer_names(names)
        location = locate_run(path, trust_remote_code=trust_remote_code)
        if data is None:
            parts, name = _held_out_rows(location, os.fspath(path))
        else:
            source, rows = _rows_of(data, split, max_examples, ranks)
            name = source.source
            like = find_source(rows, location.sources, format_name, columns)
            parts = [(replace(source, format=like.format, columns=like.columns), rows)]
        has_answers = _have_answers(parts, name, names)
        for _, rows in parts:
            location = add_vision_if_needed(location, sample_rows(rows)[0].values())
        loaded = load_run(location, device=device)
        tokens = _eval_tokens(parts, loaded, name)
        if data is None:
            tokens = _first_validated(tokens, location, max_examples)
        shown = name if data is None else _short_name(name)
        if names:
            scoring = Scoring(
                loaded,
                tokens,
                parts,
                shown,
                names,
                decoding or Decoding(max_new_tokens),
                batch_size,
                answers_path(location, name, output),
                fresh=fresh,
                ranks=ranks,
            )

    def score_model(loaded: LoadedModel, model: str) -> EvalResult:
        if scoring is not None:
            scoring.answer(loaded, model, progress)
        root = loaded.train_model
        if not has_answers:
            return EvalResult(len(tokens), 0, math.nan, math.nan, math.nan)
        with root.attention_for("training"):
            return score(root, tokens, pad_id=loaded.pad_id, progress=progress, ranks=ranks)

    with scoring or nullcontext():
        tuned = "model" if location.holds == "base" else "tuned"
        scores = {tuned: score_model(loaded, tuned)}
        seen = _seen_rows(tokens, loaded, ranks)
        if base and location.holds == "full":
            # Free the tuned model first, so that only one model is in memory.
            del loaded
            loaded = load_run(
                path, device=device, base_only=True, trust_remote_code=trust_remote_code
            )
        if base and location.holds != "base":
            # If there is an adapter, disable it to get the base model.
            with disabled(loaded.model):
                scores = {"base": score_model(loaded, "base"), **scores}
        evaluation = _evaluation(scores, tokens, shown, *seen)
        about = _about(evaluation, location)
        # `Scoring.finish` writes a file with the losses, but without the scores of pairs.
        if scoring is None or tokens.has_pairs:
            _keep_losses(evaluation, about, len(tokens), location, ranks)
        if scoring is None:
            return evaluation
        return replace(
            evaluation,
            by_scorer=(*evaluation.by_scorer, *scoring.finish(about)),
            answers=scoring.path,
            unanswered=scoring.unanswered,
            unfinished=scoring.unfinished(),
            reference_hash=scoring.reference_hash,
        )


def _have_answers(parts: SourceRows, name: str, scorers: Sequence[str]) -> bool:
    """Return whether the rows have answers. Raise UsageError if nothing could be measured."""
    formats = {source.format for source, _ in parts}
    if scorers and formats == {"text"}:
        raise no_scored_rows(name, "rows of the format text were read")
    if not scorers and formats == {"prompt"}:
        raise UsageError(
            "the rows have no answers, so there is no loss to compute",
            where=name,
            fix="score the model's answers with your own scorer: --score my_scorer.py:function",
        )
    return formats != {"prompt"}


def _evaluation(
    scores: dict[str, EvalResult], tokens: TokenSet, name: str, seen: Repeats | None, fault: str
) -> Evaluation:
    """Build the result from the scores of the models and the counts of the rows."""
    by_scorer: tuple[RowScores, ...] = ()
    if tokens.has_pairs:
        pairs = {model: list(result.pairs) for model, result in scores.items()}
        by_scorer = (summarize_rows(PAIRS, pairs),)
    counts = tokens.counts
    return Evaluation(
        scores,
        name,
        counts.rows,
        counts.dropped + counts.emptied,
        counts.cut,
        by_scorer,
        seen=seen,
        seen_fault=fault,
        row_hash=counts.digest,
        loss_comparisons=compare_losses(scores, next(reversed(scores))),
    )


def compare_losses(results: Mapping[str, EvalResult], best: str) -> tuple[RowComparison, ...]:
    """Compare the losses of the model `best` with those of each other model, row by row."""
    if any(result.pairs or not result.tokens for result in results.values()):
        return ()  # pairs are compared by their order, and rows without answers have no loss
    by_row = {model: result.row_losses for model, result in results.items()}
    return compare_rows("loss", by_row, best, results[best].row_tokens)


def _keep_losses(
    evaluation: Evaluation,
    about: dict[str, object],
    examples: int,
    location: RunLocation,
    ranks: Ranks,
) -> None:
    """Write a file with the losses, and with the scores of pairs, to the folder evals/ of the run.

    The command `report` reads this file. Do nothing if the evaluated model is not from a run.

    Args:
        about: the values that `_about` returns.
        examples: number of examples.
    """
    if location.run is None or location.holds == "base" or not ranks.is_main_process:
        return
    answers = answers_path(location, evaluation.data, None)
    # Only pairs have scores at this point.
    kind = "pairs" if evaluation.by_scorer else "loss"
    path = answers.with_name(f"{answers.stem}-{kind}.jsonl")
    results = evaluation.by_scorer
    try:
        save_scores(path, evaluation.data, examples, evaluation.row_hash, results, about)
    except MachineError as error:
        # Only warn, because the run directory of another user may not be writable.
        log.warning(
            f"{error.what}, so the report will not show these scores: {error.where}: {error.why}"
        )


def _about(evaluation: Evaluation, location: RunLocation) -> dict[str, object]:
    """Return all values of the scores file except the scores.

    They are the checkpoint, its step, the losses, and how many of the rows the run was trained on.
    """
    losses: dict[str, float | None] = {}
    row_losses: dict[str, object] = {"row_hash": evaluation.row_hash, "tokens": ()}
    for name, result in evaluation.scores.items():
        # Store None instead of NaN or infinity, which JSON does not have.
        losses[name] = None
        if math.isfinite(result.loss):
            losses[name] = result.loss
            row_losses |= {"tokens": result.row_tokens, name: result.row_losses}
    return {
        "checkpoint": location.folder.name if location.folder else None,
        "step": weights_step(location.folder) if location.run else None,
        "losses": losses,
        "row_losses": row_losses,
        "seen": None if evaluation.seen is None else evaluation.seen.count,
    }


def _seen_rows(tokens: TokenSet, loaded: LoadedModel, ranks: Ranks) -> tuple[Repeats | None, str]:
    """Find the evaluated rows that the run was also trained on.

    Return (rows, "") or (None, reason).

    Return (None, "") for a base model. Rank 0 reads all training rows, which takes as long as at
    the start of the training.
    """
    run = loaded.run
    seen: tuple[Repeats | None, str] = (None, "")
    with ranks.raise_on_all_ranks():
        if ranks.is_main_process and run is not None and loaded.location.holds != "base":
            # If the training rows are missing, `find_trained_rows` returns the reason instead of
            # raising an error, because the scores are valid without it.
            seen = find_trained_rows(tokens, run, run.data, loaded.template)
    return ranks.broadcast_object(seen)


def _rows_of(
    data: object, split: str | None, max_examples: int | None, ranks: Ranks
) -> tuple[Source, Rows]:
    """Return the rows and their source. `data` is a file, a Hub id, or the rows themselves."""
    if isinstance(data, str | os.PathLike):
        source = Source(source=os.fspath(data), split=split, max_examples=max_examples)
        rows = read_rows(source)
    else:
        listed = [dict(row) for row in mappings(data, "evaluate(data=...)")][:max_examples]
        if not listed or split is not None:
            raise DataError(
                "data has no rows" if split is None else "rows from Python have no splits",
                where="evaluate(data=...)",
                fix="pass at least one row, and do not pass split",
            )
        rows = from_list(listed)
        source = Source(source=rows.name)
    if ranks.is_main_process:
        for line in layout_lines([rows]):
            log.info(line)
    return source, rows


def _held_out_rows(location: RunLocation, path: str | Path) -> tuple[SourceRows, str]:
    """Return the rows that a run validates on, and a description of them."""
    run = require_held_out(location, path)
    # Without data.hold_out the validation rows have their own files, so the training rows need not
    # be read.
    data = run.data if run.data.hold_out else replace(run.data, train=())
    _, parts = read_splits(data, run.train.seed)
    sources = (f"{_short_name(source.source)} {source.split or ''}" for source, _ in parts)
    names = ", ".join(map(str.rstrip, sources))
    return parts, f"{data.hold_out} of {names}, held out" if data.hold_out else names


def _short_name(source: str) -> str:
    """Return the name of a source for tables and saved scores: a file name without its folder."""
    return Path(source).name if is_local(source) else source


def _first_validated(tokens: TokenSet, location: RunLocation, count: int | None) -> TokenSet:
    """Return the first `count` validation examples of the run, or all if `count` is None.

    Raise UsageError if the validation examples have changed since the training.
    """
    if location.held_out_hash not in (None, tokens.counts.digest):
        raise UsageError(
            "the held-out rows of the run have changed",
            where="--data",
            why="the data file, the template or the tokenizer has changed, so data.hold_out now "
            "selects other rows",
            fix="undo the change, or give --data FILE with rows that the run was not trained on",
        )
    if location.run and location.run.validate.max_examples is not None:
        tokens = tokens.first(location.run.validate.max_examples)
    return tokens if count is None else tokens.first(count)


def _eval_tokens(parts: SourceRows, loaded: LoadedModel, name: str) -> TokenSet:
    if loaded.run:
        data = loaded.run.data
        loaded.template.samples_answers = loaded.run.samples_answers
    else:
        sources = tuple(source for source, _ in parts)
        data = Data(train=sources, seq_len=min(loaded.context or 1 << 20, 1 << 20))
    tokens = tokenize(parts, data, loaded.template, cache=None, what="eval")
    if loaded.template.pictures is not None:
        tokens.pictures = PixelReader(loaded.template.pictures).of
    if not len(tokens):
        raise UsageError(
            "no row can be scored",
            where=name,
            why=f"every row is longer than data.seq_len, which is {data.seq_len} tokens",
            fix="give shorter rows with --data FILE",
        )
    return tokens

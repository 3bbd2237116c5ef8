"""Several runs on the same rows: each as `evaluate` measures it, and compared row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.inference.load_run import RunLocation, locate_run, require_held_out
from tunesmith.metrics.intervals import (
    Interval,
    difference_sentence,
    loss_sentence,
    paired_intervals,
    paired_losses,
)
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.run_dir import PAIRS
from tunesmith.tools.evaluate.evaluate import (
    Evaluation,
    evaluate,
    interval_rows,
    loss_rows,
)


@dataclass(frozen=True)
class RowComparison:
    """Two runs by one number of each row.

    Attributes:
        name: `loss`, or a scorer.
        best, other: names of the runs, the first one with the better mean.
        mean, interval: of the difference, that of `best` less that of `other`; no interval where
            too few rows differ.
        is_better: whether the difference is more than chance.
        verdict: the same in a sentence.
    """

    name: str
    best: str
    other: str
    mean: float
    interval: Interval | None
    is_better: bool
    verdict: str


@dataclass(frozen=True)
class RunsEvaluation(Tabular):
    """The result of `evaluate_runs`.

    Attributes:
        evaluations: by the name of the run.
        comparisons: by each number, of the best run with each of the others.
        obstacles: what is not compared, and why, in sentences.
    """

    evaluations: dict[str, Evaluation]
    comparisons: tuple[RowComparison, ...]
    obstacles: tuple[str, ...]

    @property
    def data(self) -> str:
        """The rows that were scored, and where they are from."""
        return next(iter(self.evaluations.values())).data

    def table(self) -> ResultTable:
        """The scores, a column for the base and for each run, and which run is better."""
        scores = {}
        intervals: dict[str, list[Interval]] = {}
        for name, evaluation in self.evaluations.items():
            for model, result in evaluation.scores.items():
                scores["base" if model == "base" else name] = result
                for row_scores in evaluation.by_scorer:
                    intervals.setdefault(row_scores.name, []).append(row_scores.models[model])
        rows = [*loss_rows(list(scores.values())), *interval_rows(intervals)]
        notes = [*self.warnings(), *self.verdicts(), *self.notes()]
        return ResultTable(rows, list(scores), title=f"rows: {self.data}", notes=notes)

    def warnings(self) -> list[str]:
        """Tell what a reader must know before believing the scores."""
        return [
            f"warning: {name}: {warning.removeprefix('warning: ')}"
            for name, evaluation in self.evaluations.items()
            for warning in evaluation.warnings()
        ]

    def verdicts(self) -> list[str]:
        """A sentence for each comparison, and for each that is not possible."""
        return [*self.obstacles, *(comparison.verdict for comparison in self.comparisons)]

    def notes(self) -> Iterator[str]:
        """Yield what else there is to know of the rows, a line each."""
        texts = [set(evaluation.notes()) for evaluation in self.evaluations.values()]
        of_all = set.intersection(*texts)
        for i, (name, evaluation) in enumerate(self.evaluations.items()):
            for note in evaluation.notes():
                if note not in of_all:
                    yield f"{name}: {note}"
                # What is said of all runs is said once.
                elif i == 0:
                    yield note


def evaluate_runs(
    paths: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    base: bool = False,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> RunsEvaluation:
    """Score several runs on the same rows, one after the other, and compare them row by row.

    Args:
        paths: as for `load_run`, each once.
        data: as for `evaluate`; None takes the rows that all of them have held out.
        base: score the base beside them, which must be the same of all.
        output: for scorers: the folder of the files of answers, one for each run; None takes evals/
            of each.
        trust_remote_code: as for `load_run`.
        options: others of `evaluate`.

    Raises:
        UsageError: the runs have held out other rows, or have other bases; and what `evaluate`
            raises.
    """
    locations = [locate_run(path, trust_remote_code=trust_remote_code) for path in paths]
    if data is None:
        _check_held_out(paths, locations)
    if base:
        _check_same_base(paths, locations)
    evaluations: dict[str, Evaluation] = {}
    for name, path in zip(_names(paths), paths, strict=True):
        # The base is the same of all, so that one run brings it.
        has_base = base and not evaluations
        file = output and Path(output) / f"{name.replace('/', '-')}.jsonl"
        evaluations[name] = evaluate(
            path,
            data,
            base=has_base,
            output=file,
            trust_remote_code=trust_remote_code,
            **options,
        )
    comparisons: list[RowComparison] = []
    obstacles = []
    has_same_tokens = len({evaluation.row_hash for evaluation in evaluations.values()}) == 1
    if has_same_tokens:
        comparisons += _compare_losses(evaluations)
    else:
        obstacles.append(
            "loss: not comparable: the rows differ as tokens, because the runs differ in template, "
            "tokenizer, seq_len or train_on; --score compares their answers"
        )
    has_same_answers = len({evaluation.reference_hash for evaluation in evaluations.values()}) == 1
    if not has_same_answers:
        obstacles.append("scores: not comparable: the runs have answered different rows")
    for i, row_scores in enumerate(next(iter(evaluations.values())).by_scorer):
        if has_same_tokens if row_scores.name == PAIRS else has_same_answers:
            comparisons += _compare_scores(evaluations, i)
    return RunsEvaluation(evaluations, tuple(comparisons), tuple(obstacles))


def _check_held_out(paths: Sequence[str | Path], locations: Sequence[RunLocation]) -> None:
    """UsageError where a run has held out no rows, or other ones than the first."""
    for path, location in zip(paths, locations, strict=True):
        require_held_out(location, path)
    for path, location in zip(paths, locations, strict=True):
        hashes = {location.held_out_hash, locations[0].held_out_hash} - {None}
        if len(hashes) > 1:
            raise UsageError(
                "the runs have held out different rows",
                where=f"{paths[0]} and {path}",
                why="their hashes differ (validation_hash in env.json)",
                fix="use a file with answers that none was trained on: --data FILE",
            )


def _check_same_base(paths: Sequence[str | Path], locations: Sequence[RunLocation]) -> None:
    """UsageError where the runs have different bases."""
    for path, location in zip(paths, locations, strict=True):
        if location.base != locations[0].base:
            raise UsageError(
                "the runs have different bases",
                where=f"{paths[0]} and {path}",
                why=f"{locations[0].base.name} and {location.base.name}",
                fix="remove --base, or evaluate each run alone",
            )


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Name the runs by their folders' names, if these differ."""
    names = [Path(path).name for path in paths]
    if len(set(names)) == len(names) and "base" not in names and all(names):
        return names
    return [str(path) for path in paths]


def _tuned_of(evaluation: Evaluation) -> str:
    """The name of the model that the evaluation is of: `tuned`, or `model` of a plain one."""
    return "tuned" if "tuned" in evaluation.scores else "model"


def _compare_losses(evaluations: dict[str, Evaluation]) -> Iterator[RowComparison]:
    results = {}
    for name, evaluation in evaluations.items():
        results[name] = evaluation.scores[_tuned_of(evaluation)]
    if any(result.pairs for result in results.values()):
        return  # of pairs the order decides
    best = min(results, key=lambda name: results[name].loss)
    for other, result in results.items():
        if other == best:
            continue
        loss = paired_losses(result.row_losses, results[best].row_losses, result.row_tokens)
        verdict = loss_sentence(loss, first=other, second=best)
        yield RowComparison("loss", best, other, loss.mean, loss.interval, loss.is_apart, verdict)


def _compare_scores(evaluations: dict[str, Evaluation], scorer: int) -> Iterator[RowComparison]:
    """The comparisons by one scorer, named by its place among those of each evaluation."""
    by_row = {}
    for run, evaluation in evaluations.items():
        by_row[run] = evaluation.by_scorer[scorer].scores[_tuned_of(evaluation)]
    name = next(iter(evaluations.values())).by_scorer[scorer].name
    best = max(by_row, key=lambda run: fmean(by_row[run]))
    for other, scores in by_row.items():
        if other != best:
            paired = paired_intervals(scores, by_row[best])
            verdict = difference_sentence(name, paired, len(scores), first=other, second=best)
            mean = paired.difference.mean
            yield RowComparison(
                name, best, other, mean, paired.difference, paired.is_apart, verdict
            )

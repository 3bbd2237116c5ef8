"""Evaluation of several runs on the same rows, with a comparison row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.inference.load_run import RunLocation, locate_run, require_held_out
from tunesmith.metrics.intervals import (
    Interval,
    PairedIntervals,
    difference_sentence,
    paired_intervals,
    paired_losses,
)
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.run_dir import PAIRS
from tunesmith.tools.evaluate.evaluate import (
    Evaluation,
    evaluate,
    score_table,
)


@dataclass(frozen=True)
class RowComparison:
    """Comparison of two runs by one measure, which has a value for each row.

    Attributes:
        name: the measure: `loss`, or the name of a scorer.
        best: the run with the better mean.
        other: the other run.
        is_better: whether the difference is significant.
        verdict: the result in a sentence.
        mean: mean difference, `best` minus `other`.
        interval: confidence interval of the mean; infinite if too few rows differ.
    """

    name: str
    best: str
    other: str
    is_better: bool
    verdict: str
    mean: float
    interval: Interval


@dataclass(frozen=True)
class RunsEvaluation(Tabular):
    """Evaluations of several runs on the same rows, and their comparisons.

    Attributes:
        evaluations: the evaluation of each run, by the run's name.
        comparisons: for each measure, the comparison of the best run with each of the other runs.
        obstacles: for each measure that cannot be compared, a sentence with the reason.
    """

    evaluations: dict[str, Evaluation]
    comparisons: tuple[RowComparison, ...]
    obstacles: tuple[str, ...]

    @property
    def data(self) -> str:
        """Description of the scored rows and their source."""
        return next(iter(self.evaluations.values())).data

    def table(self) -> ResultTable:
        """Return a table with one column for the base and one per run. Notes compare the runs."""
        scores = {}
        intervals: dict[str, list[Interval]] = {}
        for name, evaluation in self.evaluations.items():
            for model, result in evaluation.scores.items():
                scores["base" if model == "base" else name] = result
                for row_scores in evaluation.by_scorer:
                    intervals.setdefault(row_scores.name, []).append(row_scores.models[model])
        notes = [*self.warnings(), *self.verdicts(), *self.notes()]
        return score_table(self.data, scores, intervals, notes)

    def warnings(self) -> list[str]:
        """Return warnings about problems of the rows that can make the scores unreliable."""
        return [
            f"warning: {name}: {warning.removeprefix('warning: ')}"
            for name, evaluation in self.evaluations.items()
            for warning in evaluation.warnings()
        ]

    def verdicts(self) -> list[str]:
        """Return one sentence per comparison, and one per measure that cannot be compared."""
        return [*self.obstacles, *(comparison.verdict for comparison in self.comparisons)]

    def notes(self) -> Iterator[str]:
        """Yield the notes about the rows, one line each.

        A note that does not apply to all runs starts with the name of its run.
        """
        texts = [set(evaluation.notes()) for evaluation in self.evaluations.values()]
        common = set.intersection(*texts)
        for i, (name, evaluation) in enumerate(self.evaluations.items()):
            for note in evaluation.notes():
                if note not in common:
                    yield f"{name}: {note}"
                # A note that all runs have is shown only once.
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
        paths: paths as for `load_run`. No path may occur twice.
        data: as for `evaluate`; None: the held-out rows, which must be the same in all runs.
        base: also score the base model, which must be the same in all runs.
        output: folder for the answers that are scored, with one file per run; None: evals/ of each
            run.
        trust_remote_code: as for `load_run`.
        options: further options of `evaluate`.

    Raises:
        UsageError: the runs have different held-out rows, or different base models.
        Also the errors of `evaluate`.
    """
    locations = [locate_run(path, trust_remote_code=trust_remote_code) for path in paths]
    if data is None:
        _check_held_out(paths, locations)
    if base:
        _check_same_base(paths, locations)
    evaluations: dict[str, Evaluation] = {}
    for name, path in zip(_names(paths), paths, strict=True):
        # All runs have the same base, so it is scored only with the first run.
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
            "loss: not comparable, because the runs have different tokens for the same rows: "
            "they differ in template, tokenizer, seq_len or train_on; use --score to compare the "
            "answers"
        )
    has_same_answers = len({evaluation.reference_hash for evaluation in evaluations.values()}) == 1
    if not has_same_answers:
        obstacles.append("scores: not comparable, because the runs have answered different rows")
    for i, row_scores in enumerate(next(iter(evaluations.values())).by_scorer):
        if has_same_tokens if row_scores.name == PAIRS else has_same_answers:
            comparisons += _compare_scores(evaluations, i)
    return RunsEvaluation(evaluations, tuple(comparisons), tuple(obstacles))


def _check_held_out(paths: Sequence[str | Path], locations: Sequence[RunLocation]) -> None:
    """Raise UsageError if a run has no held-out rows, or other held-out rows than the first run."""
    first = locations[0].held_out_hash
    for path, location in zip(paths, locations, strict=True):
        require_held_out(location, path)
        # The hash is None if it is unknown.
        if first and location.held_out_hash not in (None, first):
            raise UsageError(
                "the runs have different held-out rows",
                where=f"{paths[0]} and {path}",
                why="the hashes of the held-out rows differ (validation_hash in env.json)",
                fix="use --data FILE with rows that no run was trained on",
            )


def _check_same_base(paths: Sequence[str | Path], locations: Sequence[RunLocation]) -> None:
    """Raise UsageError if the runs have different base models."""
    first = vars(locations[0].base)
    for path, location in zip(paths, locations, strict=True):
        differing = [
            f"model.{key} is {first[key]} and {value}"
            for key, value in vars(location.base).items()
            if value != first[key]
        ]
        if differing:
            raise UsageError(
                "the runs have different base models",
                where=f"{paths[0]} and {path}",
                why=", ".join(differing),
                fix="remove --base, or evaluate each run separately",
            )


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Return a name for each run: its folder's name, or its path if the names are not unique."""
    names = [Path(path).name for path in paths]
    if len(set(names)) == len(names) and "base" not in names and all(names):
        return names
    return [str(path) for path in paths]


def _tuned_name(evaluation: Evaluation) -> str:
    """Return the evaluated model's key in `scores`: `tuned`, or `model` for a base model."""
    return "tuned" if "tuned" in evaluation.scores else "model"


def _compare_losses(evaluations: dict[str, Evaluation]) -> Iterator[RowComparison]:
    results = {
        name: evaluation.scores[_tuned_name(evaluation)] for name, evaluation in evaluations.items()
    }
    if any(result.pairs for result in results.values()):
        return  # for pairs of answers, `_compare_scores` compares which answer is more likely
    if not all(result.tokens for result in results.values()):
        return  # rows without answers have no loss
    best = min(results, key=lambda name: results[name].loss)
    for other, result in results.items():
        if other != best:
            loss = paired_losses(result.row_losses, results[best].row_losses, result.row_tokens)
            yield _comparison("loss", loss, best, other)


def _compare_scores(evaluations: dict[str, Evaluation], scorer: int) -> Iterator[RowComparison]:
    """Yield the comparisons by one scorer. `scorer` is its index in `Evaluation.by_scorer`."""
    by_row = {}
    for run, evaluation in evaluations.items():
        row_scores = evaluation.by_scorer[scorer]
        by_row[run] = row_scores.scores[_tuned_name(evaluation)]
    best = max(by_row, key=lambda run: fmean(by_row[run]))
    for other, scores in by_row.items():
        if other != best:
            paired = paired_intervals(scores, by_row[best])
            yield _comparison(row_scores.name, paired, best, other)


def _comparison(name: str, paired: PairedIntervals, best: str, other: str) -> RowComparison:
    verdict = difference_sentence(name, paired, first=other, second=best)
    interval = paired.difference
    return RowComparison(name, best, other, paired.is_apart, verdict, interval.mean, interval)

"""Evaluation of several runs on the same rows, with a comparison row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tunesmith.answers.load_run import RunLocation, locate_run, require_held_out
from tunesmith.errors import UsageError
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
        paired: the difference, `best` minus `other`, with its confidence interval.
    """

    name: str
    best: str
    other: str
    paired: PairedIntervals

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        return difference_sentence(self.name, self.paired, first=self.other, second=self.best)


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
        """Yield the notes about the rows of each run, one line each."""
        for name, evaluation in self.evaluations.items():
            for note in evaluation.notes():
                yield f"{name}: {note}"


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
    _check_comparable(
        paths,
        [locate_run(path, trust_remote_code=trust_remote_code) for path in paths],
        held_out=data is None,
        base=base,
    )
    evaluations: dict[str, Evaluation] = {}
    for name, path in zip(_names(paths), paths, strict=True):
        evaluations[name] = evaluate(
            path,
            data,
            # All runs have the same base, so it is scored only with the first run.
            base=base and not evaluations,
            output=output and Path(output) / f"{name.replace('/', '-')}.jsonl",
            trust_remote_code=trust_remote_code,
            **options,
        )
    obstacles = []
    results = evaluations.values()
    has_same_tokens = len({result.row_hash for result in results}) == 1
    if not has_same_tokens:
        obstacles.append(
            "loss: not comparable, because the runs have different tokens for the same rows: "
            "they differ in template, tokenizer, seq_len or train_on; use --score to compare the "
            "answers"
        )
    has_same_answers = len({result.reference_hash for result in results}) == 1
    if not has_same_answers:
        obstacles.append("scores: not comparable, because the runs have answered different rows")
    comparisons: list[RowComparison] = []
    if has_same_tokens:
        comparisons += _compare_losses(evaluations)
    for i, row_scores in enumerate(next(iter(results)).by_scorer):
        if has_same_tokens if row_scores.name == PAIRS else has_same_answers:
            comparisons += _compare_scores(evaluations, i)
    return RunsEvaluation(evaluations, tuple(comparisons), tuple(obstacles))


def _check_comparable(
    paths: Sequence[str | Path], locations: Sequence[RunLocation], *, held_out: bool, base: bool
) -> None:
    """Raise UsageError if the runs have other held-out rows or another base than the first run.

    Args:
        held_out: compare the held-out rows, because they are evaluated.
        base: compare the base models, because the base is evaluated only once.
    """
    first = locations[0]
    for path, location in zip(paths, locations, strict=True):
        where = f"{paths[0]} and {path}"
        if held_out:
            require_held_out(location, path)
        # The hash is None if it is unknown.
        hashes = {first.held_out_hash, location.held_out_hash} - {None}
        if held_out and len(hashes) == 2:
            raise UsageError(
                "the runs have different held-out rows",
                where=where,
                why="the hashes of the held-out rows differ (validation_hash in env.json)",
                fix="use --data FILE with rows that no run was trained on",
            )
        own = vars(location.base)
        differing = [
            f"model.{key} is {value} and {own[key]}"
            for key, value in vars(first.base).items()
            if value != own[key]
        ]
        if base and differing:
            raise UsageError(
                "the runs have different base models",
                where=where,
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
            paired = paired_losses(result.row_losses, results[best].row_losses, result.row_tokens)
            yield RowComparison("loss", best, other, paired)


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
            yield RowComparison(row_scores.name, best, other, paired)

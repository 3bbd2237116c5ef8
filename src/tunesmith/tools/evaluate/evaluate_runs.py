"""Evaluation of one run or several runs on the same rows, with a comparison row by row."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tunesmith.answers.load_run import RunLocation, locate_run, require_held_out
from tunesmith.errors import UsageError
from tunesmith.run_dir import PAIRS
from tunesmith.tools.evaluate.evaluate import Evaluation, compare_losses, evaluate
from tunesmith.tools.evaluate.score_rows import RowScores, summarize_rows


def evaluate_runs(
    paths: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    base: bool = False,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Evaluation:
    """Score runs on the same rows, one after the other. Compare several runs row by row.

    Args:
        paths: paths as for `load_run`. No path may occur twice.
        data: as for `evaluate`; None: the held-out rows, which must be the same in all runs.
        base: also score the base model, which must be the same in all runs.
        output: the file for the answers of one run; for several runs, the folder with one file per
            run; None: evals/ of each run.
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
        # The path `output / ""` is `output`.
        file_name = f"{name.replace('/', '-')}.jsonl" if len(paths) > 1 else ""
        evaluations[name] = evaluate(
            path,
            data,
            # All runs have the same base, so it is scored only with the first run.
            base=base and not evaluations,
            output=output and Path(output) / file_name,
            trust_remote_code=trust_remote_code,
            **options,
        )
    if len(evaluations) == 1:
        return next(iter(evaluations.values()))
    return _combine(evaluations)


def _combine(evaluations: dict[str, Evaluation]) -> Evaluation:
    """Return the results of all runs, with comparisons of the best run with each other run."""
    first, *_ = evaluations.values()
    results = {name: run.scores[_tuned_name(run)] for name, run in evaluations.items()}
    base = {name: first.scores[name] for name in first.scores if name == "base"}
    obstacles = []
    has_same_tokens = len({run.row_hash for run in evaluations.values()}) == 1
    if not has_same_tokens:
        obstacles.append(
            "loss: not comparable, because the runs have different tokens for the same rows: "
            "they differ in template, tokenizer, seq_len or train_on; use --score to compare the "
            "answers"
        )
    has_same_answers = len({run.reference_hash for run in evaluations.values()}) == 1
    if not has_same_answers:
        obstacles.append("scores: not comparable, because the runs have answered different rows")
    by_scorer = []
    for i, row_scores in enumerate(first.by_scorer):
        is_compared = has_same_tokens if row_scores.name == PAIRS else has_same_answers
        by_scorer.append(_combine_scores(evaluations, i, is_compared=is_compared))
    best = min(results, key=lambda name: results[name].loss)
    return replace(
        first,
        scores=base | results,
        by_scorer=tuple(by_scorer),
        loss_comparisons=compare_losses(results, best) if has_same_tokens else (),
        obstacles=tuple(obstacles),
        runs=evaluations,
    )


def _combine_scores(
    evaluations: dict[str, Evaluation], scorer: int, *, is_compared: bool
) -> RowScores:
    """Return the scores of all runs by one scorer.

    Args:
        scorer: index of the scorer in `Evaluation.by_scorer`.
        is_compared: compare the best run with each of the others.
    """
    by_row = {}
    models = {}
    for run, evaluation in evaluations.items():
        row_scores = evaluation.by_scorer[scorer]
        tuned = _tuned_name(evaluation)
        if "base" in evaluation.scores:
            models["base"] = row_scores.models["base"]
        models[run] = row_scores.models[tuned]
        by_row[run] = row_scores.scores[tuned]
    if not is_compared:
        return RowScores(row_scores.name, row_scores.rows, models, by_row)
    best = max(by_row, key=lambda run: fmean(by_row[run]))
    return replace(summarize_rows(row_scores.name, by_row, best), models=models)


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
    return next(reversed(evaluation.scores))

"""The comparison of runs side by side: the keys that differ, and which run is better.

Only `eval` says which is better: it measures each row, so that rows that are hard for all runs do
not blur the difference, and the difference has a 95 % interval. A training loss or val_loss of
single runs has no such interval, so it gives no verdict.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tunesmith.config.dump import is_free, leaves
from tunesmith.host.shell import shell_path
from tunesmith.metrics.intervals import (
    difference_sentence,
    loss_sentence,
    paired_intervals,
    paired_losses,
)
from tunesmith.reader.figures import environment_rows
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import PAIRS, EvalScores, RunState, shown

HASHES_OF_INPUTS = {"data_hash": "the training rows", "model_hash": "the base's weights"}
# Keys that may change when a run resumes, but end it sooner or choose its weights.
_CHOOSES_WEIGHTS = re.compile(r"validate\..+|checkpoint\.final")
_TRAINING_FILE = re.compile(r"data\.train(\.\d+)?\.source")


def changes_learning(key: str, runs: Sequence[RunFiles]) -> bool:
    """Return whether runs that differ in a key of their recipes learn something else.

    The same training rows may be in files of two names: a Python program's rows are kept in each
    run directory.
    """
    if _CHOOSES_WEIGHTS.fullmatch(key):
        return True
    # The best weights of full fine-tuning are at a step that has a checkpoint.
    if key == "checkpoint.every":
        return any(run.key("adapter", "kind") == "none" for run in runs)
    if is_free(key):
        return False
    data_hashes = {run.env.get("data_hash") for run in runs}
    has_same_rows = len(data_hashes) == 1 and None not in data_hashes
    return not (has_same_rows and _TRAINING_FILE.fullmatch(key))


class KeyDifference(NamedTuple):
    """A key that is not the same in all runs; `learns`: whether it changes what is learned."""

    key: str
    values: list[object]
    learns: bool


def differing_keys(runs: Sequence[RunFiles]) -> list[KeyDifference]:
    """Return the keys of the recipes that differ, those that change what is learned first.

    The output folder is left out.
    """
    recipes = [leaves(run.recipe | {"method": run.method_keys}) for run in runs]
    names = dict.fromkeys(key for recipe in recipes for key in recipe if key != "output_dir")
    differing = []
    for key in names:
        # The keys that another run has in an empty section show the difference.
        if any(name.startswith(f"{key}.") for name in names):
            continue
        values = [recipe.get(key) for recipe in recipes]
        if any(value != values[0] for value in values):
            differing.append(KeyDifference(key, values, changes_learning(key, runs)))
    return sorted(differing, key=lambda difference: not difference.learns)


class Verdict(NamedTuple):
    """Which run is better, in words.

    Attributes:
        kind: better | equal | none (it cannot be said) | alone (one run).
        headline, reasons: sentences.
        best: the indices of the better runs.
    """

    kind: str
    headline: str
    reasons: list[str]
    best: tuple[int, ...] = ()


def judge(runs: Sequence[RunFiles]) -> Verdict:
    """Return which run is better and why, or why that cannot be said."""
    if len(runs) == 1:
        return _alone(runs[0])
    verdict = _compare(runs)
    names = [f"`{name}`" for name, _, differs in environment_rows(runs) if differs]
    if names:
        verdict.reasons.append(
            f"Ranks, machines or software differ: {', '.join(names)}. "
            "Speed and memory are not comparable."
        )
    return verdict


def _alone(run: RunFiles) -> Verdict:
    headline = f"{run.label}: {run.described_state}"
    best = run.best_val_loss_text
    if best is not None:
        return Verdict("alone", f"{headline}, lowest val_loss {best}", [])
    reasons = []
    if not run.validation_hash:
        reasons.append("Without held-out rows the quality is unknown: data.hold_out: 5 %.")
    return Verdict("alone", f"{headline}, without val_loss", reasons)


class MeasuredRows(NamedTuple):
    """The measurements of an `eval`, row by row.

    Attributes:
        data: the name of the file of rows.
        row_hash: equal for the same rows.
        mean: the loss in nats per token, or the accuracy on pairs.
        values: by row, the loss summed over its tokens, or 1 for a pair in order and 0 otherwise.
        tokens: by row; None for pairs.
    """

    data: str
    row_hash: str
    mean: float
    values: list[float]
    tokens: list[int] | None

    @property
    def badness(self) -> float:
        """A number that is lower for the better run."""
        return -self.mean if self.tokens is None else self.mean

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} %" if self.tokens is None else f"{self.mean:.4f}"


def _compare(runs: Sequence[RunFiles]) -> Verdict:
    """Compare the best of the runs that `eval` measured on the same rows with each other one."""
    evals = _common_evals(runs)
    if len(evals) < 2:
        fix = f"To compare them: {_eval_command(runs)}"
        reason = f"`eval` has not measured them on the same rows. {fix}"
        return Verdict("none", "No verdict: these runs were not evaluated side by side", [reason])

    best, *others = sorted(evals, key=lambda index: evals[index].badness)
    compared = [_compare_rows(evals, runs, best, other) for other in others]
    # A run further off may vary so much from row to row that it cannot be told apart.
    nearest = next((i for i, (_, is_apart) in enumerate(compared) if not is_apart), 0)
    sentence, is_apart = compared[nearest]
    first, second = runs[best], runs[others[nearest]]
    reasons = [f"{evals[best].data}, row by row: {sentence}.", _differences(first, second)]
    absent = [run.label for index, run in enumerate(runs) if index not in evals]
    if absent:
        reasons.append(f"Not evaluated on these rows: {', '.join(absent)}. {_eval_command(runs)}")

    measure = "loss" if evals[best].tokens else "accuracy on pairs"
    other_value = evals[others[nearest]]
    against = f"{measure} by eval {evals[best]} against {other_value} of {second.label}"
    if {first.state, second.state} != {RunState.FINISHED}:
        return Verdict("none", f"So far {first.label} leads: {against}", reasons)
    if is_apart:
        headline = f"{first.label} is better on these rows: {against}"
        return Verdict("better", headline, reasons, (best,))
    if is_apart is None:
        headline = f"No verdict, because too few rows differ: {first.label} has {against}"
        return Verdict("none", headline, reasons)
    headline = f"No significant difference: {first.label} has {against}"
    return Verdict("equal", headline, reasons)


def _eval_command(runs: Sequence[RunFiles]) -> str:
    """Return the command that compares runs row by row."""
    folders = " ".join(shell_path(shown(run.folder)) for run in runs)
    hashes = {run.validation_hash for run in runs}
    # Without --data, each run is evaluated on its own held-out rows.
    has_same_rows = len(hashes) == 1 and None not in hashes
    data = "" if has_same_rows else " --data held-out.jsonl"
    return f"`tunesmith eval {folders}{data}`"


def _common_evals(runs: Sequence[RunFiles]) -> dict[int, MeasuredRows]:
    """Return what `eval` measured on the rows that most runs share, by the run's index.

    If several sets of rows have equally many runs, the largest set is used.
    """
    is_sft = {run.method for run in runs} == {"sft"}
    by_rows: dict[tuple[int, str], dict[int, MeasuredRows]] = {}
    for index, run in enumerate(runs):
        # The newest eval of a run comes last, and one of the final weights counts most.
        for result in sorted(run.evals, key=lambda result: result["step"] == run.final_step):
            measured = _row_losses(run, result) if is_sft else _row_orders(result)
            if measured is not None:
                rows = (len(measured.values), measured.row_hash)
                by_rows.setdefault(rows, {})[index] = measured
    if not by_rows:
        return {}
    return by_rows[max(by_rows, key=lambda rows: (len(by_rows[rows]), rows))]


def _row_losses(run: RunFiles, result: EvalScores) -> MeasuredRows | None:
    """Return the losses that an `eval` measured.

    Return None for rows that the run was trained on, except for its own held-out rows.
    """
    rows = result["row_losses"]
    mean = (result["losses"] or {}).get("tuned")
    if rows is None or mean is None:
        return None
    if result["seen"] and rows["row_hash"] != run.validation_hash:
        return None
    return MeasuredRows(result["data"], rows["row_hash"], mean, rows["tuned"], rows["tokens"])


def _row_orders(result: EvalScores) -> MeasuredRows | None:
    """Return which pairs an `eval` found in order; it measures runs of all methods alike."""
    score = result["scores"].get(PAIRS)
    values = score and score.get("by_row", {}).get("tuned")
    if not score or not values:
        return None
    return MeasuredRows(result["data"], result["row_hash"], score["tuned"][0], values, None)


def _compare_rows(
    evals: Mapping[int, MeasuredRows], runs: Sequence[RunFiles], better: int, worse: int
) -> tuple[str, bool | None]:
    """Compare two runs row by row.

    Return a sentence with the 95 % interval of their difference, and whether it is more than
    chance: None if too few rows differ.
    """
    names = {"first": runs[worse].label, "second": runs[better].label}
    values = evals[worse].values, evals[better].values
    tokens = evals[better].tokens
    if tokens is None:
        paired = paired_intervals(*values)
        return difference_sentence(PAIRS, paired, len(values[0]), **names), paired.is_apart
    loss = paired_losses(*values, tokens)
    return loss_sentence(loss, **names), loss.is_apart if loss.interval else None


def _differences(first: RunFiles, second: RunFiles) -> str:
    """Describe what two runs differ in, if it affects training."""
    differences = []
    for difference in differing_keys([first, second]):
        if difference.learns:
            values = " against ".join(map(json.dumps, difference.values))
            differences.append(f"`{difference.key}` ({values})")
    for key, name in HASHES_OF_INPUTS.items():
        if first.env.get(key) != second.env.get(key):
            differences.append(name)
    if differences:
        return f"They differ in {', '.join(differences)}."
    return "Their recipes do not differ in anything that affects training."

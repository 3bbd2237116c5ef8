"""Comparison of several runs: the keys that differ, and which run is better.

Only results of `eval` can show which run is better. `eval` measures each row, so rows that are
difficult for all runs do not hide the difference, and the difference has a 95 % interval. A
training loss or val_loss has no such interval, so it cannot show which run is better.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from tunesmith.config.dump import is_free, leaves
from tunesmith.host.shell import shell_path
from tunesmith.metrics.intervals import (
    difference_sentence,
    paired_intervals,
    paired_losses,
)
from tunesmith.run_dir import PAIRS, EvalScores, RunState, shown
from tunesmith.tools.report.figures import environment_rows
from tunesmith.tools.report.run_files import RunFiles

HASHES_OF_INPUTS = {"data_hash": "the training rows", "model_hash": "the base's weights"}
# Keys that may change when a run resumes, but affect the result: they determine when the run ends
# or which weights it keeps.
_CHOOSES_WEIGHTS = re.compile(r"validate\..+|checkpoint\.final")
_TRAINING_FILE = re.compile(r"data\.train(\.\d+)?\.source")


def changes_learning(key: str, runs: Sequence[RunFiles]) -> bool:
    """Return whether a different value of this recipe key changes what a run learns.

    The name of the data file does not count if the rows are the same. The name can differ because
    rows from a Python program are stored in each run directory.
    """
    if _CHOOSES_WEIGHTS.fullmatch(key):
        return True
    # In full fine-tuning, this key affects which weights are kept, because the best weights are
    # available only at steps with a checkpoint.
    if key == "checkpoint.every":
        return any(run.key("adapter", "kind") == "none" for run in runs)
    if is_free(key):
        return False
    data_hashes = {run.env.get("data_hash") for run in runs}
    has_same_rows = len(data_hashes) == 1 and None not in data_hashes
    return not (has_same_rows and _TRAINING_FILE.fullmatch(key))


class KeyDifference(NamedTuple):
    """A recipe key with different values in the runs.

    Attributes:
        learns: whether the key changes what is learned.
    """

    key: str
    values: list[object]
    learns: bool


def differing_keys(runs: Sequence[RunFiles]) -> list[KeyDifference]:
    """Return the recipe keys that differ. Keys that change what is learned are first.

    The output folder is not included.
    """
    recipes = [leaves(run.recipe | {"method": run.method_keys}) for run in runs]
    names = dict.fromkeys(chain(*recipes))
    names.pop("output_dir", None)

    differing = []
    for key in names:
        # Skip an empty section if another run has keys in this section, because these keys show the
        # difference.
        if any(name.startswith(f"{key}.") for name in names):
            continue
        values = [recipe.get(key) for recipe in recipes]
        if any(value != values[0] for value in values):
            differing.append(KeyDifference(key, values, changes_learning(key, runs)))
    return sorted(differing, key=lambda difference: not difference.learns)


class Verdict(NamedTuple):
    """The result of a comparison of runs, as text.

    Attributes:
        kind: "better", "equal", "none" (no verdict is possible) or "alone" (only one run).
        headline, reasons: sentences.
        best: indices of the better runs.
    """

    kind: str
    headline: str
    reasons: list[str]
    best: tuple[int, ...] = ()


def judge(runs: Sequence[RunFiles]) -> Verdict:
    """Return which run is better and why, or why this cannot be decided."""
    if len(runs) == 1:
        (run,) = runs
        best = run.best_val_loss_text
        text = "without val_loss" if best is None else f"lowest val_loss {best}"
        is_unknown = best is None and not run.validation_hash
        reason = "Without held-out rows the quality is unknown: data.hold_out: 5 %."
        headline = f"{run.label}: {run.described_state}, {text}"
        return Verdict("alone", headline, [reason] if is_unknown else [])
    verdict = _compare(runs)
    names = [f"`{name}`" for name, _, differs in environment_rows(runs) if differs]
    if names:
        verdict.reasons.append(
            f"Ranks, machines or software differ: {', '.join(names)}. "
            "Speed and memory are not comparable."
        )
    return verdict


class MeasuredRows(NamedTuple):
    """The measurements of one `eval`, row by row.

    Attributes:
        data: name of the file of rows.
        row_hash: hash of the rows. Equal hashes mean equal rows.
        mean: loss in nats per token, or the accuracy on preference pairs.
        values: one value per row: the loss, summed over the tokens of the row. For a preference
            pair: 1 if the chosen answer is more probable than the rejected answer, else 0.
        tokens: number of tokens per row. None for pairs.
    """

    data: str
    row_hash: str
    mean: float
    values: list[float]
    tokens: list[int] | None

    @property
    def badness(self) -> float:
        """A number that is lower for a better run."""
        return -self.mean if self.tokens is None else self.mean

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} %" if self.tokens is None else f"{self.mean:.4f}"


def _compare(runs: Sequence[RunFiles]) -> Verdict:
    """Compare the best run with every other run that `eval` has measured on the same rows."""
    evals = _common_evals(runs)
    if len(evals) < 2:
        fix = f"To compare them, run {_eval_command(runs)}"
        reason = f"`eval` has not measured these runs on the same rows. {fix}"
        return Verdict("none", "No verdict: these runs were not evaluated together", [reason])

    best, *others = sorted(evals, key=lambda index: evals[index].badness)
    compared = {other: _compare_rows(evals, runs, best, other) for other in others}
    # Compare the best run with the first run that is not significantly worse. This need not be the
    # run with the smallest difference, because the significance also depends on how much the
    # difference varies between rows.
    nearest = next((other for other in others if not compared[other][1]), others[0])
    sentence, is_apart = compared[nearest]
    first = runs[best]
    second = runs[nearest]
    measured = evals[best]
    reasons = [f"{measured.data}, row by row: {sentence}.", _differences(first, second)]
    absent = [run.label for index, run in enumerate(runs) if index not in evals]
    if absent:
        reasons.append(f"Not evaluated on these rows: {', '.join(absent)}. {_eval_command(runs)}")

    measure = "loss" if measured.tokens else "accuracy on pairs"
    against = f"{measure} {measured}, {second.label} {evals[nearest]}"
    if {first.state, second.state} != {RunState.FINISHED}:
        return Verdict("none", f"So far {first.label} leads: {against}", reasons)
    if is_apart:
        headline = f"{first.label} is better on these rows: {against}"
        return Verdict("better", headline, reasons, (best,))
    kind, headline = "equal", "No significant difference"
    if is_apart is None:
        kind, headline = "none", "No verdict, because too few rows differ"
    return Verdict(kind, f"{headline}: {first.label} has {against}", reasons)


def _eval_command(runs: Sequence[RunFiles]) -> str:
    """Return the command that compares the runs row by row."""
    folders = " ".join(shell_path(shown(run.folder)) for run in runs)
    hashes = {run.validation_hash for run in runs}
    # Omit --data if all runs have the same held-out rows, which `eval` uses by default.
    has_same_rows = len(hashes) == 1 and None not in hashes
    data = "" if has_same_rows else " --data held-out.jsonl"
    return f"`tunesmith eval {folders}{data}`"


def _common_evals(runs: Sequence[RunFiles]) -> dict[int, MeasuredRows]:
    """Return a dict from the index of each run to its `eval` on the rows that most runs share.

    If several sets of rows are shared by the same number of runs, the largest set is used.
    """
    is_sft = all(run.method == "sft" for run in runs)

    by_rows: dict[tuple[int, str], dict[int, MeasuredRows]] = {}
    for index, run in enumerate(runs):
        # In the loop below, later evals overwrite earlier evals. Sort the evals of the final
        # weights last, so that they are used.
        evals = sorted(run.evals, key=lambda result: result["step"] == run.final_step)
        for result in evals:
            measured = _row_losses(run, result) if is_sft else _row_orders(result)
            if measured is not None:
                rows = (len(measured.values), measured.row_hash)
                by_rows.setdefault(rows, {})[index] = measured

    most_shared = max(by_rows, key=lambda rows: (len(by_rows[rows]), rows), default=None)
    return by_rows[most_shared] if most_shared else {}


def _row_losses(run: RunFiles, result: EvalScores) -> MeasuredRows | None:
    """Return the losses per row of one `eval`.

    Return None if the run was trained on some of these rows, unless the rows are its own held-out
    rows.
    """
    rows = result["row_losses"]
    mean = (result["losses"] or {}).get("tuned")
    if rows is None or mean is None:
        return None
    if result["seen"] and rows["row_hash"] != run.validation_hash:
        return None
    return MeasuredRows(result["data"], rows["row_hash"], mean, rows["tuned"], rows["tokens"])


def _row_orders(result: EvalScores) -> MeasuredRows | None:
    """Return for each preference pair of an `eval` whether the chosen answer is more probable.

    Unlike losses, these values can be compared between all training methods.
    """
    score = result["scores"].get(PAIRS)
    values = score.get("by_row", {}).get("tuned") if score else None
    if not score or not values:
        return None
    return MeasuredRows(result["data"], result["row_hash"], score["tuned"][0], values, None)


def _compare_rows(
    evals: Mapping[int, MeasuredRows], runs: Sequence[RunFiles], better: int, worse: int
) -> tuple[str, bool | None]:
    """Compare two runs row by row.

    Returns:
        A sentence with the 95 % interval of the difference, and whether the difference is
        significant. The second value is None if too few rows differ.
    """
    names = {"first": runs[worse].label, "second": runs[better].label}
    first = evals[worse].values
    second = evals[better].values
    tokens = evals[better].tokens

    # If the rows are preference pairs, `tokens` is None and the values are 0 or 1.
    if tokens is None:
        paired = paired_intervals(first, second)
        sentence = difference_sentence(PAIRS, paired, **names)
    else:
        paired = paired_losses(first, second, tokens)
        sentence = difference_sentence("loss", paired, **names)
    return sentence, paired.is_apart if math.isfinite(paired.difference.low) else None


def _differences(first: RunFiles, second: RunFiles) -> str:
    """Return a sentence that lists the differing keys and inputs that affect training."""
    differences = [
        f"`{key}` ({' against '.join(map(json.dumps, values))})"
        for key, values, learns in differing_keys([first, second])
        if learns
    ]
    for key, name in HASHES_OF_INPUTS.items():
        if first.env.get(key) != second.env.get(key):
            differences.append(name)

    if differences:
        return f"They differ in {', '.join(differences)}."
    return "Their recipes do not differ in anything that affects training."

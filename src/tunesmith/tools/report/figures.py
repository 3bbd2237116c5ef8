"""The tables that compare runs: recipes, results of training, results of `eval`, environments."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from tunesmith.config.dump import is_free, leaves
from tunesmith.metrics.intervals import paired_losses, share_interval
from tunesmith.metrics.run_figures import mean
from tunesmith.run_dir import EvalScores, RowLosses, Score
from tunesmith.tools.report.run_files import RunFiles
from tunesmith.units import count_of, format_seconds

# Keys of env.json that are not shown in the table: hashes of the inputs, the command, and results
# of checks.
HASHES = ("data_hash", "validation_hash", "model_hash", "recipe_hash")
NO_ENVIRONMENT = (*HASHES, "command", "commit", "checks", "validation_examples", "template")
# Keys that may change when a run resumes, but affect the result: they determine when the run ends
# or which weights it keeps.
_CHOOSES_WEIGHTS = re.compile(r"validate\..+|checkpoint\.final")
_TRAINING_FILE = re.compile(r"data\.train(\.\d+)?\.source")
Figure = str | float | None


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


def _mean(run: RunFiles, name: str) -> float | None:
    return mean(run.figures.column(name))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _best_accuracy_text(run: RunFiles) -> str | None:
    """Return the highest accuracy on held-out pairs with its 95 % interval and step."""
    accuracies = run.figures.accuracies
    if not accuracies:
        return None

    step = max(accuracies, key=accuracies.__getitem__)
    accuracy = accuracies[step]
    text = f"{100 * accuracy:.1f} %"
    held_out = run.env.get("validation_examples")
    if held_out:
        _, low, high = share_interval(round(accuracy * held_out), held_out)
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{text} at step {step}"


# Rows of the table. The key is the name of the row. The function returns the value for a run.
FIGURE_ROWS: dict[str, Callable[[RunFiles], Figure]] = {
    "state": lambda run: run.described_state,
    "reward": lambda run: run.figures.reward_text or None,
    "lowest val_loss": lambda run: run.best_val_loss_text,
    "val_loss, last": lambda run: next(reversed(run.figures.validations.values()), None),
    "highest accuracy on held-out pairs": _best_accuracy_text,
    "training loss, mean of the last steps": lambda run: run.figures.loss,
    "tokens/s, without the first step": lambda run: run.figures.speed,
    "MFU": lambda run: _percent(run.figures.mfu),
    "waiting for data": lambda run: _percent(run.figures.waiting),
    "peak memory, GiB": lambda run: run.figures.memory_gib,
    "training tokens": lambda run: f"{run.figures.tokens:,.0f}",
    "total step time": lambda run: format_seconds(run.figures.seconds),
    "gradient norm": lambda run: _mean(run, "grad_norm"),
    "GPU utilization, %": lambda run: _mean(run, "gpu_utilization"),
    "GPU power, W": lambda run: _mean(run, "gpu_power_watts"),
}


def figure_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of results.

    Each row has a name and one text per run. The text is `–` if the value was not measured.
    """
    figures: list[tuple[str, Sequence[Figure]]] = []
    for name, figure in FIGURE_ROWS.items():
        # Omit the losses of a run that has rewards, because its loss does not measure quality.
        is_loss = "loss" in name
        cells = [None if is_loss and run.figures.reward_text else figure(run) for run in runs]
        figures.append((name, cells))
    figures += eval_figures(runs)
    # Omit a row if no run has a value.
    return [(name, list(map(figure_text, cells))) for name, cells in figures if any(cells)]


def figure_text(value: Figure) -> str:
    """Format a value of the table: four significant digits, or a dash if it was not measured."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    # Use four significant digits: 0.03125, 1.234, 12,480.
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def eval_figures(runs: Sequence[RunFiles]) -> list[tuple[str, list[str | None]]]:
    """Return the table rows for the results of `eval`.

    Each row has a label and one cell per run. A cell is None if there is no result.

    Results of several runs are in the same table row if they are for the same data rows. The name
    of the data file does not matter.
    """
    # Maps each table row to the texts of each run, one for each checkpoint that was evaluated. A
    # dict removes duplicates, because several files of scores can contain the same loss.
    lines: dict[tuple[str, str], list[dict[str, bool]]] = {}
    labels: dict[tuple[str, str], str] = {}
    for index, run in enumerate(runs):
        for result in run.evals:
            at_step = f"at step {result['step']}"
            if result["seen"]:
                at_step += f" ({result['seen']} of the rows were trained on)"
            for name, row_hash, text in _eval_texts(result):
                key = (name, row_hash)
                if key not in lines:
                    label = f"eval: {name} ({result['data']}, {count_of(result['rows'], 'row')})"
                    # Different data rows can have the same label. Add a hash to distinguish them.
                    if label in labels.values():
                        label += f", {row_hash[:8]}"
                    labels[key] = label
                    lines[key] = [{} for _ in runs]
                lines[key][index][f"{text} {at_step}"] = True

    return [
        (labels[key], ["; ".join(cells) or None for cells in line]) for key, line in lines.items()
    ]


def _eval_texts(result: EvalScores) -> Iterator[tuple[str, str, str]]:
    """Yield the loss and each score of an eval as a tuple (name, hash of the data rows, text)."""
    if result["losses"] is not None:
        rows = result["row_losses"]
        row_hash = rows["row_hash"] if rows else result["row_hash"]
        yield "loss", row_hash, _losses_text(result["losses"], rows)
    for scorer, score in result["scores"].items():
        yield scorer, result["row_hash"], _score_text(score)


def _losses_text(losses: dict[str, float | None], rows: RowLosses | None) -> str:
    """Format losses like `1.2500 (1.1000 to 1.4000), base 1.5000: -0.2500 (-0.3000 to -0.2000)`.

    The intervals are omitted if there are too few rows, or if the loss of each row is not known.
    """
    tuned = losses.get("tuned")
    text = "not finite" if tuned is None else f"{tuned:.4f}"
    if rows and tuned is not None:
        zeros = [0.0] * len(rows["tuned"])
        _, low, high = paired_losses(zeros, rows["tuned"], rows["tokens"]).difference
        if math.isfinite(low):
            # Limit the interval, because a loss is never below 0.
            text = _interval_text([tuned, max(low, 0.0), high], ".4f")

    base = losses.get("base")
    if base is None:
        return text
    text += f", base {base:.4f}"
    if rows and rows.get("base"):
        difference = paired_losses(rows["base"], rows["tuned"], rows["tokens"]).difference
        if math.isfinite(difference.low):
            text += f": {_interval_text(difference, '+.4f')}"
    return text


def _score_text(score: Score) -> str:
    """Format a score like `62.0 % (52.1 to 71.3), base 50.0 % (40.0 to 60.0): +12.0 points (+4.0
    to +20.1)`.
    """
    text = _interval_text(score["tuned"], ".1f", " %")
    base = score.get("base")
    difference = score.get("difference")
    if base:
        text += f", base {_interval_text(base, '.1f', ' %')}"
    if base and difference:
        text += f": {_interval_text(difference, '+.1f', ' points')}"
    return text


def _interval_text(interval: Sequence[float], form: str, unit: str = "") -> str:
    """Format a mean and the ends of its interval. With a unit, the values are fractions."""
    mean, low, high = (format(100 * value if unit else value, form) for value in interval)
    return f"{mean}{unit} ({low} to {high})"


def environment_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[object], bool]]:
    """Return the rows of env.json: the name, one value per run, and whether the values differ."""
    environments = []
    for run in runs:
        shown = {name: run.env[name] for name in run.env if name not in NO_ENVIRONMENT}
        environments.append(leaves(shown))

    rows = []
    for name in dict.fromkeys(chain(*environments)):
        # A key such as `x.why` is the reason for the value of `x` and has no table row.
        if not name.endswith(".why"):
            values = [env.get(name) for env in environments]
            rows.append((name, values, len(set(map(str, values))) > 1))
    return rows

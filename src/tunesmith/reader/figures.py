"""The tables of runs side by side: what was measured, by training and by `eval`, and on what."""

from collections.abc import Callable, Iterator, Sequence

from tunesmith.config.dump import leaves
from tunesmith.metrics.intervals import paired_losses, share_interval
from tunesmith.metrics.run_figures import mean
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import EvalScores, RowLosses, Score
from tunesmith.units import count_of, format_seconds

# Of env.json: hashes of what the run read, how it was started, and what its checks reported.
HASHES = ("data_hash", "validation_hash", "model_hash", "recipe_hash")
NO_ENVIRONMENT = (*HASHES, "command", "commit", "checks", "validation_examples", "template")
Figure = str | float | None


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
    text = f"{100 * accuracies[step]:.1f} %"
    held_out = run.env.get("validation_examples")
    if held_out:
        _, low, high = share_interval(round(accuracies[step] * held_out), held_out)
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{text} at step {step}"


# Name of a row of the table -> its figure of a run
FIGURE_ROWS: dict[str, Callable[[RunFiles], Figure]] = {
    "state": lambda run: run.described_state,
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
    """The table of figures: a name, and a text for each run, `–` for what was not measured."""
    rows = []
    for name, figure in FIGURE_ROWS.items():
        cells = [figure(run) for run in runs]
        # A figure that no run has is left out.
        if any(cells):
            rows.append((name, [figure_text(cell) for cell in cells]))
    return rows + [(name, [cell or "–" for cell in cells]) for name, cells in eval_figures(runs)]


def figure_text(value: Figure) -> str:
    """A figure: text as it is, a number with four digits, a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    # Four significant digits: 0.03125, 1.234, 12,480.
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def eval_figures(runs: Sequence[RunFiles]) -> list[tuple[str, list[str | None]]]:
    """List what `eval` measured: a label, and a cell for each run, None where it did not.

    Runs share a line where they answered the same rows: not the file's name decides, but the rows.
    """
    # Of several checkpoints of a run, one after the other in its cell.
    lines: dict[tuple[str, str], list[list[str]]] = {}
    labels: dict[tuple[str, str], str] = {}
    for index, run in enumerate(runs):
        for result in run.evals:
            for name, row_hash, text in _eval_texts(result):
                key = (name, row_hash)
                label = f"eval: {name} ({result['data']}, {count_of(result['rows'], 'row')})"
                # Rows of the same name may differ.
                if key not in labels and label in labels.values():
                    label += f", {row_hash[:8]}"
                labels.setdefault(key, label)
                cell = f"{text} at step {result['step']}"
                if result["seen"]:
                    cell += f" ({result['seen']} of the rows were trained on)"
                cells = lines.setdefault(key, [[] for _ in runs])[index]
                # A loss is in the file of the scores too: shown once.
                if cell not in cells:
                    cells.append(cell)
    return [
        (labels[key], ["; ".join(cells) or None for cells in line]) for key, line in lines.items()
    ]


def _eval_texts(result: EvalScores) -> Iterator[tuple[str, str, str]]:
    """The loss and each score of an eval: name, hash of the rows, and text."""
    if result["losses"] is not None:
        rows = result["row_losses"]
        row_hash = rows["row_hash"] if rows else result["row_hash"]
        yield "loss", row_hash, _losses_text(result["losses"], rows)
    for scorer, score in result["scores"].items():
        yield scorer, result["row_hash"], _score_text(score)


def _losses_text(losses: dict[str, float], rows: RowLosses | None) -> str:
    """`1.2500 (1.1000 to 1.4000), base 1.5000: -0.2500 (-0.3000 to -0.2000)`, without the intervals
    where the losses of the rows are not there, or too few."""
    text = f"{losses['tuned']:.4f}" if "tuned" in losses else "not finite"
    if rows:
        own = paired_losses([0.0] * len(rows["tuned"]), rows["tuned"], rows["tokens"]).interval
        if own is not None:
            # No loss is below 0.
            text += f" ({max(own.low, 0.0):.4f} to {own.high:.4f})"
    if "base" not in losses:
        return text
    text += f", base {losses['base']:.4f}"
    if rows and rows.get("base"):
        difference = paired_losses(rows["base"], rows["tuned"], rows["tokens"]).interval
        if difference is not None:
            mean, low, high = difference
            text += f": {mean:+.4f} ({low:+.4f} to {high:+.4f})"
    return text


def _score_text(score: Score) -> str:
    """`62.0 % (52.1 to 71.3), base 50.0 % (40.0 to 60.0): +12.0 points (+4.0 to +20.1)`."""

    def percent(interval: Sequence[float]) -> str:
        mean, low, high = (100 * value for value in interval)
        return f"{mean:.1f} % ({low:.1f} to {high:.1f})"

    text = percent(score["tuned"])
    base, difference = score.get("base"), score.get("difference")
    if base:
        text += f", base {percent(base)}"
    if base and difference:
        mean, low, high = (100 * value for value in difference)
        text += f": {mean:+.1f} points ({low:+.1f} to {high:+.1f})"
    return text


def environment_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[object], bool]]:
    """The rows of env.json: name, a value a run, whether they differ."""
    environments = []
    for run in runs:
        environments.append(leaves({k: run.env[k] for k in run.env if k not in NO_ENVIRONMENT}))
    rows = []
    for name in dict.fromkeys(name for env in environments for name in env):
        # A reason belongs to the value beside it, and has no row.
        if not name.endswith(".why"):
            values = [env.get(name) for env in environments]
            rows.append((name, values, len({str(value) for value in values}) > 1))
    return rows

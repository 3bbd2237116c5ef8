"""Functions that write the closing summary of a run, and failure.json."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.errors import TunesmithError
from tunesmith.host.files import relative_to_cwd, write_atomically
from tunesmith.host.shell import shell_command, shell_path
from tunesmith.metrics.conversations import turns_of
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.run_figures import RunFigures
from tunesmith.run_dir import (
    FAILURE,
    FINAL,
    HELD_OUT,
    IDENTITY,
    LOG,
    METRICS,
    RECIPE,
    Manifest,
    describe_weights,
    read_manifest,
    read_samples,
)
from tunesmith.units import count_of, format_seconds

ANSWER_WIDTH = 69  # maximum characters of a sample answer, so that its line fits in 80 columns


def write_failure(
    folder: Path, error: TunesmithError, *, last_step: int, next_command: str
) -> None:
    """Write failure.json, which describes the error that ended the run.

    The file has the error, where and why it happened, and the last step. It has `error.fix`, or
    `next_command` if the error has no fix. It also has the likely cause and the failed rank, which
    are null if they are not known.
    """
    failure = {
        "what": error.what,
        "where": error.where,
        "why": error.why,
        "last_step": last_step,
        "next": error.fix or next_command,
        "cause": error.cause or None,
    }
    for name in ("rank", "host", "phase", "collective"):
        failure[name] = error.failed_rank.get(name)
    write_atomically(folder / FAILURE, json.dumps(failure, indent=2) + "\n")


def closing_summary(
    run: Run,
    *,
    steps: int,
    seconds: float = 0.0,
    took: float | None = None,
    finished_before: bool = False,
) -> str:
    """Return the closing summary as plain text.

    The text has statistics over all starts of the run, answers before and after training, the files
    that were written, and commands to continue with.

    Args:
        seconds: training time. If it is 0, the sum of the recorded steps is used.
        took: duration of this start, including the time outside of steps.
        finished_before: the run was already finished, so this start did nothing.
    """
    folder = Path(relative_to_cwd(run.output_dir))
    records = read_records(folder / METRICS)
    rows = []
    if finished_before:
        duration = run.train.duration
        longer = replace(duration, amount=2 * duration.amount)
        command = [
            "tunesmith",
            "train",
            relative_to_cwd(folder / RECIPE),
            f"train.duration={longer}",
        ]
        rows = [
            f"this run had already finished: {count_of(steps, 'step')}",
            f"  to continue: {shell_command(command)}",
            "  to start over: the same command with --fresh (the old run is moved aside)",
            "",
        ]

    weights = None
    with suppress(ValueError):
        weights = read_manifest(folder / FINAL)
    rows += [*run_figures(records, seconds, took=took), "", *_answers(folder, weights)]
    rows += [*_written(folder, weights), "", *_next(run, folder)]
    return "\n".join(rows)


def run_figures(
    records: Sequence[StepRecord], seconds: float, *, took: float | None = None
) -> list[str]:
    """Return statistics of a run, one per line, such as its duration, speed and loss.

    For `seconds` and `took`, see `closing_summary`.
    """
    if not records:
        return ["no steps"]
    figures = named_figures(records, seconds)
    if took is not None:
        figures["time"] += f"; this start took {format_seconds(took)}"
    return [f"{name:<12}{text}" for name, text in figures.items()]


def named_figures(records: Sequence[StepRecord], seconds: float) -> dict[str, str]:
    """Return statistics of a run with at least one step. The keys are the printed names."""
    figures = RunFigures.of(records)
    last = records[-1]
    examples = count_of(round(figures.total("examples")), "example")
    supervised = figures.total("supervised_tokens")
    # Use the sum of the recorded steps if the training time was not measured.
    time = format_seconds(seconds or figures.seconds)

    rows = {
        "steps": f"{last.step:,} ({last.epoch:.2f} epochs, {examples})",
        "time": f"{time} in steps",
        "tokens": f"{figures.tokens:,.0f} without padding, {supervised:,.0f} of them supervised",
        "speed": f"{figures.speed or 0.0:,.0f} tokens/s",
        "loss": f"{records[0].loss:.4f} -> {last.loss:.4f}",
    }
    if figures.mfu is not None:
        peak = figures.last("mfu_peak_tflops") or 0.0
        rows["speed"] += f", {figures.mfu:.1%} MFU of {peak:,.0f} TFLOP/s"

    # The loss of one batch is noisy, and the mean of all steps does not describe the end of the
    # run. Therefore show the mean of the last steps.
    averaged = len(figures.last_losses)
    if figures.loss is not None and averaged < len(records):
        rows["loss"] += f" (mean of the last {averaged}: {figures.loss:.4f})"

    val_losses = [value for value in figures.column("val_loss") if value is not None]
    if val_losses:
        text = f"{val_losses[0]:.4f}"
        if len(val_losses) > 1:
            text += f" -> {val_losses[-1]:.4f}"
            step = figures.best_step
            if step is not None:
                text += f", best {figures.validations[step]:.4f} at step {step}"
        rows["val_loss"] = text
    rows["peak memory"] = f"{figures.memory_gib or 0.0:.1f} GiB"
    return rows


_FILE_NOTES = (
    (FINAL, "the weights {weights}"),
    (METRICS, "one record per step"),
    (HELD_OUT, "the held-out rows: file, line and first words of each"),
    ("tensorboard", "tensorboard --logdir {path}"),
    (LOG, "this output"),
    (RECIPE, "the resolved recipe"),
    (IDENTITY, "versions and hardware"),
    ("profile", "traces for ui.perfetto.dev"),
)


def _written(folder: Path, weights: Manifest | None) -> list[str]:
    """Return one line per file of the run. `weights` is the manifest of final/."""
    rows = [f"written to {folder}"]
    which = ""
    if weights:
        which = describe_weights(weights["step"], weights["last_step"])
    for name, what in _FILE_NOTES:
        path = folder / name
        if path.exists():
            text = what.format(path=shell_path(path), weights=which)
            rows.append(f"  {name:<16}{text}".rstrip())

    checkpoints = folder.glob("checkpoint-*")
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
    if newest:
        rows.append(f"  {newest.name:<16}the newest checkpoint, to resume from")
    return rows


def _next(run: Run, folder: Path) -> list[str]:
    """Return commands that are useful after the run. They use the weights in final/."""
    # Use the absolute path, because `folder` can be ".", to which no suffix can be appended.
    exported = shell_path(relative_to_cwd(f"{folder.absolute()}-exported"))
    tuned = shell_path(folder)
    rows = ["next", f"  tunesmith chat {tuned}"]
    if run.data.validation or run.data.hold_out:
        rows.append(f"  tunesmith eval {tuned}     # on held-out rows, compared with the base")
    return [
        *rows,
        f"  tunesmith report {tuned}   # curves, compared with other runs",
        f"  tunesmith export {tuned} --to ollama --output {exported}   # or --to vllm, gguf",
    ]


def _answers(folder: Path, weights: Manifest | None) -> list[str]:
    """Return lines with the first two prompts that have answers before and after training.

    The answers after training are from the weights in final/, whose manifest is `weights`.
    """
    samples = read_samples(folder).value
    if not samples or not weights:
        return []
    last = weights["step"]
    before = {}
    after = {}
    for row in samples:
        if row["step"] == 0:
            before[row["prompt"]] = row["answer"]
        elif row["step"] == last:
            after[row["prompt"]] = row["answer"]

    prompts = [prompt for prompt in after if prompt in before]
    if not prompts:
        return []
    rows = []
    for prompt in prompts[:2]:
        # Show the beginning of a long answer but the end of a long question, because the end of a
        # question usually says what is asked.
        rows += [
            f"prompt  {_one_line(_question(prompt), from_end=True)}",
            f"  before  {_one_line(before[prompt])}",
            f"  after   {_one_line(after[prompt])}",
        ]
    if last != weights["last_step"]:
        rows.append(f"after: by the weights {describe_weights(last, weights['last_step'])}")
    return [*rows, ""]


def _question(prompt: str) -> str:
    """Return the last turn of a prompt without the text of the chat template."""
    turns = turns_of(prompt)
    return turns[-1].text if turns else prompt


def _one_line(text: str, *, from_end: bool = False) -> str:
    """Convert a text to one line of a terminal.

    A long text is truncated at its end or its beginning.
    """
    text = " ".join(text.split())
    if len(text) <= ANSWER_WIDTH:
        return text
    if from_end:
        return f"…{text[1 - ANSWER_WIDTH :]}"
    return f"{text[: ANSWER_WIDTH - 1]}…"

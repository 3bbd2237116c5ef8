"""The end of a run in words: the closing summary, and failure.json."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.errors import TunesmithError
from tunesmith.host.files import from_here, write_atomically
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

# An increase of val_loss above its minimum, as a share of that, that is more than noise.
RISE = 0.01
ANSWER_WIDTH = 69  # characters of a sample answer, so that its line fits 80 columns


def write_failure(
    folder: Path, error: TunesmithError, *, last_step: int, next_command: str
) -> None:
    """Write failure.json: what stopped the run, where, why, its last step, and `error.fix` or else
    `next_command`; the likely cause, and the rank that failed, null where unknown."""
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
    """The closing summary as plain text: numbers of all starts of the run, answers before and
    after, files written, next commands.

    `seconds` of training: 0 takes the sum of the recorded steps; `took`: of this start, with all
    that is beside the steps. `finished_before`: this start did nothing.
    """
    folder = Path(from_here(run.output_dir))
    records = read_records(folder / METRICS)
    rows = []
    if finished_before:
        duration = run.train.duration
        longer = replace(duration, amount=2 * duration.amount)
        command = ["tunesmith", "train", from_here(folder / RECIPE), f"train.duration={longer}"]
        rows = [
            f"this run has already finished all {count_of(steps, 'step')} before",
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


def has_risen(loss: float, lowest: float) -> bool:
    """Tell whether a val_loss says that the step of the lowest one is the model to take; a NaN does
    not.
    """
    return loss - lowest > RISE * abs(lowest)


def run_figures(
    records: Sequence[StepRecord], seconds: float, *, took: float | None = None
) -> list[str]:
    """The numbers of a run, a line each; `seconds` and `took` as in `closing_summary`."""
    if not records:
        return ["no steps"]
    figures = named_figures(records, seconds)
    if took is not None:
        figures["time"] += f"; this start took {format_seconds(took)}"
    return [f"{name:<12}{text}" for name, text in figures.items()]


def named_figures(records: Sequence[StepRecord], seconds: float) -> dict[str, str]:
    """The numbers of a run of at least one step, by what they are."""
    figures = RunFigures.of(records)
    last = records[-1]
    examples = count_of(round(figures.total("examples")), "example")
    supervised = figures.total("supervised_tokens")
    # The sum of steps where nobody measured the whole.
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
    # One batch's loss is noisy; the mean of all steps says nothing of the end.
    averaged = len(figures.last_losses)
    if figures.loss is not None and averaged < len(records):
        rows["loss"] += f" (mean of the last {averaged}: {figures.loss:.4f})"
    val_losses = [value for value in figures.column("val_loss") if value is not None]
    if val_losses:
        rows["val_loss"] = f"{val_losses[0]:.4f}"
    if len(val_losses) > 1:
        rows["val_loss"] += f" -> {val_losses[-1]:.4f}"
        if figures.best_step is not None:
            best = figures.validations[figures.best_step]
            rows["val_loss"] += f", best {best:.4f} at step {figures.best_step}"
    rows["peak memory"] = f"{figures.memory_gib or 0.0:.1f} GiB"
    return rows


_FILE_NOTES = (
    (FINAL, "the weights {weights}"),
    (METRICS, "one record per step"),
    (HELD_OUT, "the rows that were held out: file, line and how each begins"),
    ("tensorboard", "tensorboard --logdir {path}"),
    (LOG, "this output"),
    (RECIPE, "the resolved recipe"),
    (IDENTITY, "versions and hardware"),
    ("profile", "traces for ui.perfetto.dev"),
)


def _written(folder: Path, weights: Manifest | None) -> list[str]:
    """The files of the run, a line each; `weights` is the manifest of final/."""
    rows = [f"written to {folder}"]
    which = describe_weights(weights["step"], weights["last_step"]) if weights else ""
    for name, what in _FILE_NOTES:
        if (folder / name).exists():
            text = what.format(path=shell_path(folder / name), weights=which)
            rows.append(f"  {name:<16}{text}".rstrip())
    checkpoints = folder.glob("checkpoint-*")
    newest = max(checkpoints, key=lambda p: p.stat().st_mtime, default=None)
    if newest:
        rows.append(f"  {newest.name:<16}the newest checkpoint, to resume from")
    return rows


def _next(run: Run, folder: Path) -> list[str]:
    """Complete commands that a user may want next; they use the weights of final/."""
    # `folder` may be `.`, without a name.
    exported = shell_path(from_here(f"{folder.absolute()}-exported"))
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
    """The first two prompts that were answered both before training and by the weights of final/,
    whose manifest is given.
    """
    samples = read_samples(folder).value
    if not samples or not weights:
        return []
    last = weights["step"]
    first_answers = {row["prompt"]: row["answer"] for row in samples if row["step"] == 0}
    last_answers = {row["prompt"]: row["answer"] for row in samples if row["step"] == last}
    prompts = [prompt for prompt in last_answers if prompt in first_answers and last > 0]
    rows = []
    for prompt in prompts[:2]:
        # The beginning of an answer identifies it, and the end of a long question.
        rows += [
            f"prompt  {_one_line(_question(prompt), from_end=True)}",
            f"  before  {_one_line(first_answers[prompt])}",
            f"  after   {_one_line(last_answers[prompt])}",
        ]
    if rows and last != weights["last_step"]:
        rows.append(f"after: by the weights {describe_weights(last, weights['last_step'])}")
    return [*rows, ""] if rows else []


def _question(prompt: str) -> str:
    """The last turn of a prompt, without what its template writes around it."""
    turns = turns_of(prompt)
    return turns[-1].text if turns else prompt


def _one_line(text: str, *, from_end: bool = False) -> str:
    """A text in one line of a terminal, cut at its beginning or at its end."""
    text = " ".join(text.split())
    if len(text) <= ANSWER_WIDTH:
        return text
    if from_end:
        return f"…{text[1 - ANSWER_WIDTH :]}"
    return f"{text[: ANSWER_WIDTH - 1]}…"

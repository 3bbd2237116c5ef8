"""Closing summary of a run, as `train` prints it."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.host.files import relative_to_cwd
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.metrics.conversations import turns_of
from tunesmith.metrics.record import read_records, read_start_values
from tunesmith.metrics.run_figures import explain_equal_rewards, run_figures
from tunesmith.run_dir import (
    FINAL,
    HELD_OUT,
    IDENTITY,
    LOG,
    METRICS,
    PROFILE,
    RECIPE,
    TENSORBOARD,
    Manifest,
    describe_weights,
    read_manifest,
    read_samples,
)
from tunesmith.units import count_of

ANSWER_WIDTH = 69  # maximum characters of a sample answer, so that its line fits in 80 columns


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
        longer = shell_word(f"train.duration={replace(duration, amount=2 * duration.amount)}")
        recipe = shell_word(relative_to_cwd(folder / RECIPE))
        rows = [
            f"this run had already finished: {count_of(steps, 'step')}",
            f"  to continue: tunesmith train {recipe} {longer}",
            "  to start over: the same command with --fresh (the old run is moved aside)",
            "",
        ]

    weights = None
    with suppress(ValueError):
        weights = read_manifest(folder / FINAL)
    steps_values = [record.extra for record in records]
    # Without different rewards there is no gradient, so the run must not look like a success.
    if steps_values and all(values.get("groups_with_variance") == 0 for values in steps_values):
        explained = explain_equal_rewards(steps_values)
        rows += [f"warning: the model has learned nothing: {explained}", ""]
    start = read_start_values(folder / METRICS)
    rows += run_figures(records, seconds, took=took, start=start)
    rows += ["", *_answers(folder, weights)]
    rows += [*_written(folder, weights), "", *_next(run, folder)]
    return "\n".join(rows)


_FILE_NOTES = (
    (FINAL, "the weights {weights}"),
    (METRICS, "one record per step"),
    (HELD_OUT, "the held-out rows: file, line and first words of each"),
    (TENSORBOARD, "tensorboard --logdir {path}"),
    (LOG, "this output"),
    (RECIPE, "the resolved recipe"),
    (IDENTITY, "versions and hardware"),
    (PROFILE, "traces for ui.perfetto.dev"),
)


def _written(folder: Path, weights: Manifest | None) -> list[str]:
    """Return one line per file of the run. `weights` is the manifest of final/."""
    rows = [f"written to {folder}"]
    which = describe_weights(weights["step"], weights["last_step"]) if weights else ""
    for name, what in _FILE_NOTES:
        path = folder / name
        if path.exists():
            text = what.format(path=shell_path(path), weights=which)
            rows.append(f"  {name:<16}{text}".rstrip())

    newest = max(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
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
        score = ""
        if run.samples_answers:
            scorers = (
                [run.method.reward] if isinstance(run.method.reward, str) else run.method.reward
            )
            words = ("--score", scorers[0], "--max-new-tokens", run.method.answer_tokens)
            score = "".join(f" {shell_word(str(word))}" for word in words)
        rows.append(
            f"  tunesmith eval {tuned}{score}     # on held-out rows, compared with the base"
        )
    return [
        *rows,
        f"  tunesmith report {tuned}   # curves, compared with other runs",
        f"  tunesmith export {tuned} --to ollama --output {exported}   # or --to vllm, gguf",
    ]


def _answers(folder: Path, weights: Manifest | None) -> list[str]:
    """Return lines with the first two prompts that have answers before and after training.

    The answers after training are from the weights in final/, whose manifest is `weights`.
    """
    if not weights or not weights["step"]:
        return []
    samples = read_samples(folder).value
    before, after = (
        {row["prompt"]: row["answer"] for row in samples if row["step"] == step}
        for step in (0, weights["step"])
    )
    rows = []
    for prompt in [prompt for prompt in after if prompt in before][:2]:
        # Show only the last turn, without the text of the chat template.
        turns = turns_of(prompt)
        question = turns[-1].text if turns else prompt
        # Show the beginning of a long answer but the end of a long question, because the end of a
        # question usually says what is asked.
        rows += [
            f"prompt  {_one_line(question, from_end=True)}",
            f"  before  {_one_line(before[prompt])}",
            f"  after   {_one_line(after[prompt])}",
        ]
    return [*rows, ""] if rows else []


def _one_line(text: str, *, from_end: bool = False) -> str:
    """Convert a text to one line of a terminal.

    A long text is truncated at its end or its beginning.
    """
    text = " ".join(text.split())
    if len(text) <= ANSWER_WIDTH:
        return text
    return f"…{text[1 - ANSWER_WIDTH :]}" if from_end else f"{text[: ANSWER_WIDTH - 1]}…"

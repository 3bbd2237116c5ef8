"""The files of a run directory, and values computed from these files, for code that only reads a
run.

The run can be running, finished, failed or copied. This module does not import torch. It accepts
files that do not exist yet, an incomplete last line, and fields of another version.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tunesmith.checkpoint.previous_crash import find_previous_crash
from tunesmith.config.dump import leaves
from tunesmith.errors import RunError, UsageError
from tunesmith.host.shell import shell_path
from tunesmith.launch.job import holds_run
from tunesmith.launch.jobs import is_at_work
from tunesmith.metrics.record import checked_values
from tunesmith.metrics.run_figures import Columns, RunFigures
from tunesmith.run_dir import (
    EVALS,
    FAILURE,
    FINAL,
    IDENTITY,
    LOG,
    MANIFEST,
    METRICS,
    NO_FINAL_ANSWERS,
    RECIPE,
    SAMPLES,
    SCORES,
    STOP_FILE,
    STOPPED,
    EvalScores,
    Failure,
    Fields,
    Part,
    RunState,
    ended_state,
    parse_json,
    read_bytes,
    read_env,
    read_failure,
    read_manifest,
    read_part,
    read_recipe,
    read_samples,
    read_scores,
    read_stopped,
    share_done,
    shown,
    suggest_run,
)
from tunesmith.units import count_of

T = TypeVar("T")

LOG_LINES = 40  # number of newest lines that are shown
WARNINGS = 20  # number of newest warnings that are shown
FINAL_MANIFEST = f"{FINAL}/{MANIFEST}"
_RANK_FILE = re.compile(r"metrics-rank(\d+)\.jsonl")

RANK_FILES = "metrics-rank*.jsonl"

# Files of a run that affect the report page.
PARTS = (
    METRICS,
    RANK_FILES,
    LOG,
    RECIPE,
    IDENTITY,
    FAILURE,
    STOPPED,
    SAMPLES,
    FINAL_MANIFEST,
    f"{EVALS}/{SCORES}",
)


class DamagedFile(NamedTuple):
    """A file of a run that cannot be read completely.

    Attributes:
        lines: number of skipped lines. None if the entire file cannot be read.
        why: why the file or the first skipped line cannot be read.
    """

    file: str
    lines: int | None
    why: str

    def __str__(self) -> str:
        if self.lines is None:
            return f"{self.file}: {self.why}"
        return f"{self.file}: {count_of(self.lines, 'line')} skipped; {self.why}"


def read_figures(path: Path) -> Part[RunFigures]:
    """Read the records of a .jsonl file, and return their statistics.

    Lines that are not records are skipped, and `fault` names the first of them. The last line is
    ignored if it has no line break, because a process may still be writing it.
    """
    content, fault, _ = read_part(path, read_bytes)
    text = content or b""
    figures = RunFigures()
    skipped = 0
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            figures.add(checked_values(parse_json(line)))
        except ValueError as error:
            skipped += 1
            fault = fault or f"line {number}: {error}"

    return Part(figures, fault, skipped or None)


class RunFiles:
    """The contents of a run directory's files at the time of reading.

    Attributes:
        label: the folder's name, or its entire path if several compared runs have the same name.
        recipe, env: config.yaml and env.json as plain values. Empty if they do not exist yet.
        figures: statistics of the records in metrics.jsonl.
        ranks: columns of metrics-rank<r>.jsonl by rank.
        samples: sample answers in the order of their steps. Step 0 is before training.
        failure, stopped: contents of failure.json and stopped.json. None if the file does not
            exist.
        final: manifest of final/. None if it does not exist or is damaged.
        evals: contents of each score file of `eval`, oldest first.
        state: state of the run.
        steps: number of completed optimizer steps.
        log_tail: last lines of log.txt.
        warnings: newest warnings in log.txt, without duplicates.
        damaged: files that cannot be read completely.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read a run directory. Raise UsageError if `folder` contains no file of a run."""
        self.folder = Path(folder)
        self.name = shown(self.folder.absolute().name)
        self.label = self.name
        if not holds_run(self.folder):
            what = f"there is no {folder}"
            why = ""
            if self.folder.exists():
                what = "this is not a run directory"
                why = "it has no metrics.jsonl, config.yaml, env.json or log.txt"
            raise UsageError(what, where=folder, why=why, fix=suggest_run(Path(folder)))
        self.refresh()

    def refresh(self) -> None:
        """Read all files again."""
        folder = self.folder
        content_of = self._content_of
        self.damaged: list[DamagedFile] = []
        self.figures = content_of(METRICS, read_figures(folder / METRICS))
        self.ranks: dict[int, Columns] = {}
        for path in sorted(folder.glob(RANK_FILES)):
            match = _RANK_FILE.fullmatch(path.name)
            if match:
                figures = content_of(path.name, read_figures(path))
                self.ranks[int(match[1])] = figures.columns
        content = content_of(LOG, read_part(folder / LOG, read_bytes)) or b""
        lines = content.decode(errors="replace").splitlines()
        self.log_tail = lines[-LOG_LINES:]

        warnings = [line.partition("warning: ")[2] for line in lines if "warning: " in line]
        # A dict removes duplicates and keeps the order of the file.
        self.warnings = list(dict.fromkeys(map(str.strip, warnings)))[-WARNINGS:]

        self.recipe = content_of(RECIPE, read_recipe(folder))
        self.env = content_of(IDENTITY, read_env(folder))
        self.failure = content_of(FAILURE, read_failure(folder))
        self.stopped = content_of(STOPPED, read_stopped(folder))
        self.samples = content_of(SAMPLES, read_samples(folder))
        self.final = content_of(FINAL_MANIFEST, read_part(folder / FINAL, read_manifest))

        self.evals: list[EvalScores] = []
        for path in sorted(folder.glob(f"{EVALS}/{SCORES}"), key=signature_of):
            name = shown(path.relative_to(folder))
            scores = content_of(name, read_part(path, read_scores))
            if scores is not None:
                self.evals.append(scores)

        last_step = self.figures.last("step")
        self.state, self.steps = ended_state(last_step, self.failure, self.stopped, self.final)
        if is_at_work(folder):
            self.state = RunState.RUNNING

    def _content_of(self, name: str, part: Part[T]) -> T:
        """Return the content of a file.

        If a part of it cannot be read, add the file to `damaged`.
        """
        if part.fault:
            self.damaged.append(DamagedFile(name, part.lines, part.fault))
        return part.value

    def signature(self) -> object:
        """Return a value that changes when a file of the run or its state changes."""
        paths = [path for pattern in PARTS for path in sorted(self.folder.glob(pattern))]
        return is_at_work(self.folder), [(str(path), signature_of(path)) for path in paths]

    @property
    def final_step(self) -> int | None:
        """Step of the weights in final/. None if final/ does not exist or its step is not known."""
        return self.final["step"] if self.final else None

    @property
    def described_state(self) -> str:
        """State and last step of the run, and the step of final/ if it is an earlier one."""
        text = f"{self.state} at step {self.steps}"
        if self.state is RunState.FINISHED and self.final_step not in (None, self.steps):
            text += f", {FINAL}/ is of step {self.final_step}"
        return text

    @property
    def best_val_loss_text(self) -> str | None:
        """The lowest val_loss and its step as text. None if there was no validation."""
        step = self.figures.best_step
        return None if step is None else f"{self.figures.validations[step]:.4f} at step {step}"

    @property
    def best_text(self) -> str:
        """The reward or the lowest val_loss as text, or "" if the run has neither."""
        best = self.best_val_loss_text
        return self.figures.reward_text or (f"lowest val_loss {best}" if best else "")

    def key(self, section: str, name: str) -> object:
        """Return the value of a recipe key, or None if the recipe does not have the key."""
        value: object = (self.recipe.get(section) or {}).get(name)
        return value

    @property
    def method_keys(self) -> Fields:
        """The `method` section of the recipe.

        A recipe may also contain only the name of the method.
        """
        method = self.recipe.get("method", "sft")
        return method if isinstance(method, dict) else {"name": method}

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the entire run, estimated from its duration. None if unknown."""
        epochs = self.figures.last("epoch") or 0.0
        share = share_done(self.recipe, self.steps, epochs, self.figures.seconds)
        return round(self.steps / share) if share else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated number of seconds until a running run ends. None if unknown."""
        seconds_per_step = self.figures.recent_mean("step_seconds")
        if self.state is not RunState.RUNNING or not self.total_steps or not seconds_per_step:
            return None
        return (self.total_steps - self.steps) * seconds_per_step

    def missing_answers(self) -> str:
        """Return why there are no answers of the final weights, or "" if there are some."""
        if self.final_step is None:
            return "there are no final weights, so the newest answers are shown"
        if any(row["step"] == self.final_step for row in self.samples):
            return ""
        if self.key("log", "samples") == 0:
            return f"{NO_FINAL_ANSWERS}log.samples is 0"
        return f"{NO_FINAL_ANSWERS}see log.txt"


def label_apart(runs: Sequence[RunFiles]) -> None:
    """Set the labels of runs that have the same name to the paths of their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.label = shown(run.folder)


def eval_command(runs: Sequence[RunFiles]) -> str:
    """Return the command that compares the runs row by row."""
    return " ".join(["tunesmith eval", *(shell_path(shown(run.folder)) for run in runs)])


def end_fields(run: RunFiles) -> Fields:
    """Return why a run failed, stopped or was killed, and which command to run next.

    Return an empty dict for a running or finished run.
    """
    fields = {}
    # failure.json may be from an earlier start, because a later start deletes it only after the
    # model is loaded. Use it only if the state is FAILED.
    if run.failure and run.state is RunState.FAILED:
        fields = {name: run.failure.get(name) for name in Failure.__annotations__}
    elif run.state is RunState.STOPPED and run.stopped:
        fields = leaves(run.stopped)
        if fields.get("reason") == "file":
            fields["reason"] = f"`tunesmith stop`, or the file `{STOP_FILE}` in its directory"
    elif run.state is RunState.KILLED:
        command = f"tunesmith train {shell_path(shown(run.folder / RECIPE))}"
        end = find_previous_crash(run.folder) or RunError(
            "no process of this run is active here, and the run has no failure record",
            why="the run was killed, or this is a copy of a run that is active elsewhere",
            fix=f"{command}   # resumes from the newest checkpoint",
        )
        fields = {"what": end.what, "where": end.where, "why": end.why, "cause": end.cause}
        fields["next"] = end.fix

    return {name: value for name, value in fields.items() if value not in (None, "")}


def signature_of(path: Path) -> tuple[int, int, int]:
    """Return the modification time, size and inode of a file, or zeros if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_size, status.st_ino

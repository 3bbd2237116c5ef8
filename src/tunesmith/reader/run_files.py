"""A run directory as a reader sees it: the files of a running, finished, failed or copied run, and
the figures that follow from them.

It needs no torch, and takes a directory as it is: files that do not exist yet, a last line that is
still being written, fields of another version.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import pydantic_core

from tunesmith.checkpoint.previous_crash import find_previous_crash
from tunesmith.config.dump import leaves
from tunesmith.errors import RunError, UsageError
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import holds_run, is_at_work
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
    how_far,
    name_a_run,
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
)
from tunesmith.units import count_of

T = TypeVar("T")

LOG_LINES = 40  # the newest
WARNINGS = 20  # the newest
FINAL_MANIFEST = f"{FINAL}/{MANIFEST}"
_RANK_FILE = re.compile(r"metrics-rank(\d+)\.jsonl")

RANK_FILES = "metrics-rank*.jsonl"

# The files of a run that a page shows.
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
    """A file of a run that is not read as a whole: how many of its lines were skipped (None: all of
    it is), and why."""

    file: str
    lines: int | None
    why: str

    def __str__(self) -> str:
        if self.lines is None:
            return f"{self.file}: {self.why}"
        return f"{self.file}: {count_of(self.lines, 'line')} skipped; {self.why}"


def read_figures(path: Path) -> Part[RunFigures]:
    """Read the numbers of a .jsonl file of records.

    A line that is not a record is skipped, and the first one is named. A last line without its end
    may still be written.
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
    """A run directory and its files, as they were when it was read. Figures are in the units of
    the records.

    Attributes:
        label: the folder's name, or the entire path if runs side by side share the name.
        recipe, env: config.yaml and env.json as plain values; empty if they do not exist yet.
        figures: the figures of metrics.jsonl; ranks: those of metrics-rank<r>.jsonl, by rank.
        samples: in the order of the steps; step 0 is before training.
        failure, stopped: failure.json and stopped.json, None if the file does not exist.
        final: the manifest of final/; None if it does not exist or is damaged.
        evals: the content of each file of scores of `eval`, the oldest first.
        state: the run's state; steps: the optimizer steps that were taken.
        log_tail: the last lines of log.txt; warnings: its newest warnings, each once.
        damaged: the files that cannot be read, or only in part.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read a run directory. Raise UsageError if `folder` holds no file of a run."""
        self.folder = Path(folder)
        self.name = shown(self.folder.absolute().name)
        self.label = self.name
        if not holds_run(self.folder):
            what = f"there is no {folder}"
            why = ""
            if self.folder.exists():
                what = "this is not a run directory"
                why = "it has no metrics.jsonl, config.yaml, env.json or log.txt"
            raise UsageError(what, where=str(folder), why=why, fix=name_a_run(Path(folder)))
        self.refresh()

    def refresh(self) -> None:
        """Read all files again."""
        folder, take = self.folder, self._take
        self.damaged: list[DamagedFile] = []
        self.figures = take(METRICS, read_figures(folder / METRICS))
        self.ranks: dict[int, Columns] = {}
        for path in sorted(folder.glob(RANK_FILES)):
            match = _RANK_FILE.fullmatch(path.name)
            if match:
                self.ranks[int(match[1])] = take(path.name, read_figures(path)).columns
        self._read_log()
        self.recipe = take(RECIPE, read_recipe(folder))
        self.env = take(IDENTITY, read_env(folder))
        self.failure = take(FAILURE, read_failure(folder))
        self.stopped = take(STOPPED, read_stopped(folder))
        self.samples = take(SAMPLES, read_samples(folder))
        self.final = take(FINAL_MANIFEST, read_part(folder / FINAL, read_manifest))
        self.evals: list[EvalScores] = []
        for path in sorted(folder.glob(f"{EVALS}/{SCORES}"), key=signature_of):
            scores = take(shown(path.relative_to(folder)), read_part(path, read_scores))
            if scores is not None:
                self.evals.append(scores)

        last_step = self.figures.last("step")
        state, self.steps = how_far(last_step, self.failure, self.stopped, self.final)
        self.state = RunState.RUNNING if is_at_work(folder) else state

    def _take(self, name: str, part: Part[T]) -> T:
        """Return what a file holds, and note what of it cannot be read."""
        if part.fault:
            self.damaged.append(DamagedFile(name, part.lines, part.fault))
        return part.value

    def _read_log(self) -> None:
        content = self._take(LOG, read_part(self.folder / LOG, read_bytes)) or b""
        lines = content.decode(errors="replace").splitlines()
        self.log_tail = lines[-LOG_LINES:]
        warnings = [line.partition("warning: ")[2].strip() for line in lines if "warning: " in line]
        self.warnings = list(dict.fromkeys(warnings))[-WARNINGS:]

    def signature(self) -> object:
        """Return a value that changes when a file of the run or its state changes."""
        paths = [path for pattern in PARTS for path in sorted(self.folder.glob(pattern))]
        return [is_at_work(self.folder), *((str(path), signature_of(path)) for path in paths)]

    @property
    def final_step(self) -> int | None:
        """The step of the weights in final/; None: there are none, or that is not known."""
        return self.final["step"] if self.final else None

    @property
    def described_state(self) -> str:
        """The state, the last step, and the step in final/ where that is an earlier one."""
        text = f"{self.state} at step {self.steps}"
        if self.state is RunState.FINISHED and self.final_step not in (None, self.steps):
            text += f", {FINAL}/ is of step {self.final_step}"
        return text

    @property
    def best_val_loss_text(self) -> str | None:
        """Return the lowest val_loss and its step as text; None without a validation."""
        step = self.figures.best_step
        return None if step is None else f"{self.figures.validations[step]:.4f} at step {step}"

    @property
    def validation_hash(self) -> str | None:
        """The hash of the held-out rows as tokens."""
        return self.env.get("validation_hash")

    def key(self, section: str, name: str) -> object:
        """The value of a key of the recipe; None where it is not there."""
        value: object = (self.recipe.get(section) or {}).get(name)
        return value

    @property
    def method(self) -> str:
        """The name of the method, which says what val_loss is the loss of."""
        return str(self.method_keys.get("name"))

    @property
    def method_keys(self) -> Fields:
        """The section of the recipe; a method without keys is written as its name."""
        method = self.recipe.get("method", "sft")
        return method if isinstance(method, dict) else {"name": method}

    @property
    def seed(self) -> int | None:
        return cast("int | None", self.key("train", "seed"))

    @property
    def total_steps(self) -> int | None:
        """Return the steps of the entire run, as estimated from its duration; None if unknown."""
        epochs = self.figures.last("epoch") or 0.0
        share = share_done(self.recipe, self.steps, epochs, self.figures.seconds)
        return round(self.steps / share) if share else None

    @property
    def seconds_left(self) -> float | None:
        """Estimate the time that a running run still takes; None if unknown."""
        seconds_per_step = self.figures.recent_mean("step_seconds")
        if self.state is not RunState.RUNNING or not self.total_steps or not seconds_per_step:
            return None
        return (self.total_steps - self.steps) * seconds_per_step

    def missing_answers(self) -> str:
        """Return why there are no answers of the final weights; empty if there are some."""
        if self.final_step is None:
            return "there are no final weights, so the newest answers are shown"
        if any(row["step"] == self.final_step for row in self.samples):
            return ""
        reason = "log.samples is 0" if self.key("log", "samples") == 0 else "see log.txt"
        return NO_FINAL_ANSWERS + reason


def label_apart(runs: Sequence[RunFiles]) -> None:
    """Label runs that share a name by their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.label = shown(run.folder)


def how_it_ended(run: RunFiles) -> Fields:
    """Find what a run that neither goes on nor finished left behind to tell why, and what to do
    next; else nothing.
    """
    fields: Fields = {}
    # failure.json of an earlier start stays; only the state says whether it counts.
    if run.failure and run.state is RunState.FAILED:
        fields = {name: run.failure.get(name) for name in Failure.__annotations__}
    elif run.state is RunState.STOPPED and run.stopped:
        fields = leaves(run.stopped)
        if fields.get("reason") == "file":
            fields["reason"] = f"`tunesmith stop`, or the file `{STOP_FILE}` in its directory"
    elif run.state is RunState.KILLED:
        command = f"tunesmith train {shell_path(shown(run.folder / RECIPE))}"
        end = find_previous_crash(run.folder) or RunError(
            "no process is running here, and it wrote no failure record",
            why="it was killed, or this is a copy of a running run",
            fix=f"{command}   # resumes from the newest checkpoint",
        )
        fields = {"what": end.what, "where": end.where, "why": end.why, "cause": end.cause}
        fields["next"] = end.fix
    return {name: value for name, value in fields.items() if value not in (None, "")}


def signature_of(path: Path) -> tuple[int, int, int]:
    """The time, size and inode of a file; zeros without one."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_size, status.st_ino


def to_json(value: object) -> str:
    """Strict JSON: what is not finite is null there."""
    return pydantic_core.to_json(value, inf_nan_mode="null").decode()

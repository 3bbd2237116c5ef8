"""A run directory as a reader sees it: the files of a running, finished, failed or copied run.

It reads what was appended since the last look, needs no torch, and takes a directory as it is:
files that are not there yet, a last line that is still being written, fields of another version.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pydantic_core

from tunesmith.checkpoint.previous_crash import find_previous_crash
from tunesmith.config.dump import leaves
from tunesmith.errors import RunError, UsageError
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import holds_run, is_at_work
from tunesmith.metrics.conversations import conversations_of, whole_characters
from tunesmith.metrics.record import checked_values
from tunesmith.run_dir import (
    EVALS,
    FAILURE,
    FINAL,
    IDENTITY,
    LOG,
    MANIFEST,
    METRICS,
    PROFILES,
    RECIPE,
    SAMPLES,
    SCORES,
    STOP_FILE,
    STOPPED,
    Part,
    RunState,
    ended_state,
    name_a_run,
    open_regular,
    parse_json,
    read_env,
    read_failure,
    read_manifest,
    read_part,
    read_profile,
    read_recipe,
    read_samples,
    read_scores,
    read_stopped,
    reason_of,
    shown,
    steps_taken,
)
from tunesmith.units import Length

Columns = dict[str, list[float | None]]

FAILURE_FIELDS = (
    "what",
    "where",
    "why",
    "cause",
    "rank",
    "host",
    "phase",
    "collective",
    "last_step",
    "next",
)
LOG_LINES = 40  # the newest
WARNINGS = 20  # the newest
RECENT_STEPS = 20  # that speeds are means of: one step alone would flicker
FINAL_MANIFEST = f"{FINAL}/{MANIFEST}"
_RANK_METRICS_NAME = re.compile(r"metrics-rank(\d+)\.jsonl")

# The small files of a run, by pattern: what reads one.
PART_READERS: dict[str, Callable[[Path], Part[Any]]] = {
    RECIPE: lambda path: read_recipe(path.parent),
    IDENTITY: lambda path: read_env(path.parent),
    FAILURE: lambda path: read_failure(path.parent),
    STOPPED: lambda path: read_stopped(path.parent),
    SAMPLES: lambda path: read_samples(path.parent),
    FINAL_MANIFEST: lambda path: read_part(path.parent, read_manifest),
    f"{EVALS}/{SCORES}": lambda path: read_part(path, read_scores),
    PROFILES: lambda path: read_part(path, read_profile),
}


class DamagedFile(NamedTuple):
    """A file of a run that is not read as a whole: how many of its lines were skipped (None: all of
    it is), and why."""

    file: str
    lines: int | None
    why: str

    def __str__(self) -> str:
        if self.lines is None:
            return f"{self.file}: {self.why}"
        skipped = "1 line was skipped" if self.lines == 1 else f"{self.lines:,} lines were skipped"
        return f"{self.file}: {skipped}; {self.why}"


class AppendedLines:
    """The lines added to a file that grows. One that was replaced or cut back is read anew.

    Attributes:
        fault: why a file that is there cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault = ""
        self._offset = 0
        self._inode = 0

    def read(self) -> tuple[bool, list[bytes]]:
        """Tell whether the lines of before no longer count, and read whole ones of those since."""
        anew = self._offset > 0
        text = b""
        self.fault = ""
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                is_replaced = status.st_ino != self._inode
                anew = anew and (is_replaced or status.st_size < self._offset)
                self._inode = status.st_ino
                file.seek(0 if anew else self._offset)
                text = file.read()
        # It may not be there yet, or no longer.
        except FileNotFoundError:
            pass
        except OSError as error:
            self.fault = reason_of(error)
        # A last line that is still being written is left to the next look.
        text = text[: text.rfind(b"\n") + 1]
        if anew:
            self._offset = 0
        self._offset += len(text)
        return anew, text.splitlines()


class JsonlColumns:
    """The numbers of a .jsonl file of records, by name; each list has one entry a record, None
    where it has no such number.

    A line that is no record is skipped: `skipped` counts them, `reason` says what is wrong with the
    first.
    """

    def __init__(self, path: Path) -> None:
        self._lines = AppendedLines(path)
        self._forget()

    def _forget(self) -> None:
        self.columns: Columns = {}
        self.rows = 0
        self.skipped = 0
        self.reason = ""

    @property
    def fault(self) -> str:
        """Why the file, or its first line that was skipped, was not read; empty for nothing."""
        return self._lines.fault or self.reason

    def read(self) -> bool:
        """Read what was appended; whether anything changed."""
        fault = self._lines.fault
        anew, lines = self._lines.read()
        if anew:
            self._forget()
        for line in lines:
            try:
                self._add(checked_values(parse_json(line)))
            except ValueError as error:
                self.skipped += 1
                self.reason = self.reason or f"line {self.rows + self.skipped}: {error}"
        return anew or bool(lines) or self._lines.fault != fault

    def _add(self, row: dict[str, float | None]) -> None:
        for name in row:
            if name not in self.columns:
                self.columns[name] = [None] * self.rows
        for name, column in self.columns.items():
            column.append(row.get(name))
        self.rows += 1


class RunFiles:
    """A run directory and what it holds now.

    Attributes:
        recipe, env: config.yaml and env.json as plain values; empty if not there yet.
        ranks: the columns of metrics-rank<r>.jsonl, by rank.
        samples: `{"step", "prompt", "answer", "expected", "row"}`, in the order of the steps; step
            0 is before training.
        failure, stopped: failure.json and stopped.json, None without one.
        evals: what each `eval --score` or `--tasks` said, as `read_scores` gives it.
        profiles: the summaries of `profile/`, each with its `name`.
        state: where it stands.
        final_step: of the weights in final/; None: there are none, or that is not known.
        revision: goes up when a file changes that is no table of records and no log.
        log_tail, warnings: the last lines of log.txt; the newest warnings of all of it, each once.
    """

    def __init__(self, folder: str | Path) -> None:
        """UsageError if `folder` holds nothing of a run."""
        self.folder = Path(folder)
        self.name = shown(self.folder.absolute().name)
        self.log_tail: list[str] = []
        self.warnings: list[str] = []
        self.state = RunState.KILLED
        self.revision = 0
        self._tables = {METRICS: JsonlColumns(self.folder / METRICS)}
        self._log = AppendedLines(self.folder / LOG)
        # By name: what its file looked like, and what was read of it.
        self._parts: dict[str, tuple[tuple[int, int, int], Part[Any]]] = {}
        # By axis; computed when a page asks, and held until the run has grown.
        self._axes: dict[str, list[float]] = {}
        if not holds_run(self.folder):
            what = f"there is no {folder}"
            why = ""
            if self.folder.exists():
                what = "this is not a run directory"
                why = "it has no metrics.jsonl, config.yaml, env.json or log.txt"
            raise UsageError(what, where=str(folder), why=why, fix=name_a_run(Path(folder)))
        self.refresh()

    @property
    def columns(self) -> Columns:
        """Read metrics.jsonl: record name -> one entry a step, None where it was not measured."""
        return self._tables[METRICS].columns

    @property
    def damaged(self) -> list[DamagedFile]:
        """List what could not be read, by file; empty for a run whose files are whole."""
        damaged = [
            DamagedFile(name, table.skipped or None, table.fault)
            for name, table in self._tables.items()
        ]
        damaged.append(DamagedFile(LOG, None, self._log.fault))
        for name, (_, part) in self._parts.items():
            damaged.append(DamagedFile(name, part.lines, part.fault))
        return [file for file in damaged if file.why]

    def refresh(self) -> bool:
        """Read what was written since the last look; whether anything changed."""
        previous_state = self.state
        for path in self.folder.glob("metrics-rank*.jsonl"):
            if _RANK_METRICS_NAME.fullmatch(path.name) and path.name not in self._tables:
                self._tables[path.name] = JsonlColumns(path)
        changed = [table.read() for table in self._tables.values()]
        changed += [self._read_log(), self._read_parts()]
        self.ranks: dict[int, Columns] = {}
        for name, table in self._tables.items():
            match = _RANK_METRICS_NAME.fullmatch(name)
            if match:
                self.ranks[int(match[1])] = table.columns
        self.state = self._state()
        if any(changed):
            self._axes = {}
        return any(changed) or self.state != previous_state

    def _read_parts(self) -> bool:
        """Read the small files that are new or were written again; whether anything changed."""
        parts: dict[str, tuple[tuple[int, int, int], Part[Any]]] = {}
        for pattern, read in PART_READERS.items():
            files = [(signature_of(path), path) for path in self.folder.glob(pattern)]
            # The oldest first: of two evals of the same rows the newer counts.
            for signature, path in sorted(files):
                name = shown(path.relative_to(self.folder))
                part = self._parts.get(name)
                if part is None or part[0] != signature:
                    part = (signature, read(path))
                parts[name] = part
        is_changed = parts != self._parts
        self._parts = parts
        self.revision += is_changed
        self.recipe: dict[str, Any] = self._value(RECIPE) or {}
        self.env: dict[str, Any] = self._value(IDENTITY) or {}
        self.samples: list[dict[str, Any]] = self._value(SAMPLES) or []
        self.failure: dict[str, Any] | None = self._value(FAILURE)
        self.stopped: dict[str, Any] | None = self._value(STOPPED)
        self.evals = [value for _, value in self._values(EVALS)]
        self.profiles = []
        for name, profile in self._values(Path(PROFILES).parent.name):
            title = Path(name).stem.removeprefix("summary-")
            self.profiles.append({"name": title, **profile})
        return is_changed

    def _value(self, name: str) -> Any:
        return self._parts[name][1].value if name in self._parts else None

    def _values(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, (_, part) in self._parts.items():
            if name.startswith(f"{folder}/") and part.value is not None:
                yield name, part.value

    def _read_log(self) -> bool:
        fault = self._log.fault
        # A log that became shorter was written anew.
        anew, lines = self._log.read()
        if anew:
            self.log_tail = []
            self.warnings = []
        newest = [line.decode(errors="replace") for line in lines[-LOG_LINES:]]
        self.log_tail = [*self.log_tail, *newest][-LOG_LINES:]
        warnings = self.warnings
        for line in lines:
            if b"warning: " in line:
                text = line.decode(errors="replace").partition("warning: ")[2]
                warnings = [*warnings, text.strip()]
        self.warnings = list(dict.fromkeys(warnings))[-WARNINGS:]
        return anew or bool(lines) or self._log.fault != fault

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken."""
        return steps_taken(int(self.last("step") or 0), self.state, self.stopped)

    @property
    def final_step(self) -> int | None:
        manifest = self._value(FINAL_MANIFEST)
        return manifest["step"] if manifest else None

    @property
    def described_state(self) -> str:
        """The state, the last step, and the step in final/ where that is an earlier one."""
        text = f"{self.state} at step {self.steps}"
        if self.state is RunState.FINISHED and self.final_step not in (None, self.steps):
            text += f", {FINAL}/ is of step {self.final_step}"
        return text

    def _state(self) -> RunState:
        if is_at_work(self.folder):
            return RunState.RUNNING
        manifest = self._value(FINAL_MANIFEST)
        return ended_state(
            failed=self.failure is not None,
            stopped=self.stopped is not None,
            final_step=manifest["last_step"] if manifest else None,
            last_step=self.last("step") or 0,
        )

    def last(self, name: str) -> float | None:
        """The newest finite value of a column."""
        values = reversed(self.columns.get(name, []))
        return next((value for value in values if value is not None and math.isfinite(value)), None)

    def recent_mean(self, name: str) -> float | None:
        """The mean of the last steps; the first step of a run, which compiles, is left out."""
        values = self.columns.get(name, [])
        recent = finite(values[1:][-RECENT_STEPS:] or values[-1:])
        return sum(recent) / len(recent) if recent else None

    def axis(self, name: str) -> list[float]:
        """For each record its step, the tokens up to it, or the seconds of training up to it."""
        if name not in self._axes:
            column = {"tokens": "tokens", "seconds": "step_seconds"}.get(name, "step")
            values = [
                value if value and math.isfinite(value) else 0.0
                for value in self.columns.get(column, [])
            ]
            self._axes[name] = values if column == "step" else list(accumulate(values))
        return self._axes[name]

    def status(self) -> dict[str, Any]:
        """Say where it stands: state, progress, newest figures, warnings, and how it ended.

        Figures are in the units of the records.
        """
        steps = self.steps
        progress = self._progress(steps)
        total_steps = steps / progress if progress else 0.0
        seconds_per_step = self.recent_mean("step_seconds")
        seconds_left = None
        if self.state is RunState.RUNNING and total_steps and seconds_per_step:
            seconds_left = (total_steps - steps) * seconds_per_step
        figures = {name: self.last(name) for name in self.columns}
        # Means of the last steps: one alone would flicker.
        if "tokens_per_second" in figures:
            figures["tokens_per_second"] = self.recent_mean("tokens_per_second")
        data_seconds = self.recent_mean("data_seconds")
        if seconds_per_step and data_seconds is not None:
            figures["data_share"] = data_seconds / seconds_per_step
        return {
            "name": self.name,
            "place": shown(self.folder),
            "state": self.state,
            "step": steps,
            "final_step": self.final_step,
            "steps": round(total_steps) if total_steps else None,
            "done": progress,
            "seconds_left": seconds_left,
            "figures": {name: value for name, value in figures.items() if value is not None},
            "warnings": self.warnings,
            "end": how_it_ended(self),
            "log": self.log_tail,
            "texts": self.revision,
            "damaged": [file._asdict() for file in self.damaged],
        }

    def _progress(self, step: float) -> float | None:
        """The part of its duration that it has trained, from 0 to 1.

        None where the recipe is not there yet.
        """
        try:
            duration = Length.parse(self.recipe["train"]["duration"])
            seconds = sum(finite(self.columns.get("step_seconds", [])))
            return duration.share(steps=step, epochs=self.last("epoch") or 0.0, seconds=seconds)
        except (KeyError, ValueError, TypeError, AttributeError):
            # There is no recipe yet, or somebody edited it.
            return None

    def texts(self) -> dict[str, Any]:
        """The samples, the turns of their prompts (role, text), and the system prompt of all."""
        samples = []
        for row in self.samples:
            place = shown(row["row"]) if row.get("row") else None
            samples.append(row | {"answer": whole_characters(row["answer"]), "row": place})
        conversations, system = conversations_of(row["prompt"] for row in samples)
        return {"samples": samples, "conversations": conversations, "system": system}


def how_it_ended(run: RunFiles) -> dict[str, Any]:
    """Find what a run that neither goes on nor finished left behind to tell why, and the command
    that goes on; else nothing.
    """
    fields: dict[str, Any] = {}
    # failure.json of an earlier start stays; only the state says whether it counts.
    if run.failure and run.state is RunState.FAILED:
        fields = {name: run.failure.get(name) for name in FAILURE_FIELDS}
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


def finite(values: Sequence[float | None]) -> list[float]:
    """The finite ones."""
    return [value for value in values if value is not None and math.isfinite(value)]


def to_json(value: Any) -> str:
    """Strict JSON: what is not finite is null there."""
    return pydantic_core.to_json(value, inf_nan_mode="null").decode()

"""A run directory as a reader sees it: the files of a running, finished, failed or copied run.

It reads what was appended since the last look, needs no torch, and takes a directory as it is:
files that are not there yet, a last line that is still being written, fields of another version.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from tunesmith.checkpoint.previous_crash import find_previous_crash
from tunesmith.config.dump import leaves
from tunesmith.errors import RunError, UsageError
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import holds_run, is_at_work
from tunesmith.metrics.record import checked_values, is_column
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
    read_profile,
    read_recipe,
    read_samples,
    read_scores,
    read_stopped,
    reason_of,
    shown,
    steps_taken,
)

Columns = dict[str, list[float | None]]

# Of the records: counts and positions, no curves.
NO_CHART = ("step", "epoch", "tokens", "supervised_tokens", "examples", "mfu_peak_tflops")
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
LINES = 512  # of a file that are parsed at a time: what one bad line spoils
LOG_LINES = 200  # the newest
WARNINGS = 20  # the newest
_RANK = re.compile(r"metrics-rank(\d+)\.jsonl")


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
    """What is added to a file that grows. One that was replaced or cut back is read anew.

    Attributes:
        fault: why a file that is there cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault = ""
        self._offset = 0
        self._inode = 0

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the lines of before no longer count, and those since, whole ones alone."""
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
        self._line_count = 0

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
        for start in range(0, len(lines), LINES):
            self._add(lines[start : start + LINES])
        return anew or bool(lines) or self._lines.fault != fault

    def _add(self, lines: list[bytes]) -> None:
        # All lines in one parse; one by one where some line is damaged.
        blocks = _parse_together(lines)
        if blocks is None:
            blocks = _blocks_of(self._parse_singly(lines))
        for names, columns in blocks:
            for name, values in zip(names, columns, strict=True):
                if name not in self.columns:
                    self.columns[name] = [None] * self.rows
                self.columns[name].extend(values)
            self.rows += len(columns[0])
            # Columns that the new rows lack are filled up, so that all have one length.
            for column in self.columns.values():
                column.extend([None] * (self.rows - len(column)))
        self._line_count += len(lines)

    def _parse_singly(self, lines: list[bytes]) -> list[dict[str, float | None]]:
        """The records of the lines; what is none is counted."""
        rows: list[dict[str, float | None]] = []
        for number, line in enumerate(lines, start=self._line_count + 1):
            try:
                rows.append(checked_values(parse_json(line)))
            except ValueError as error:
                self.skipped += 1
                self.reason = self.reason or f"line {number}: {error}"
        return rows


Block = tuple[tuple[str, ...], list[tuple[Any, ...]]]  # names, and a column of values for each


def _parse_together(lines: list[bytes]) -> list[Block] | None:
    """The records of lines that are all in order: twice as fast as one by one. None where some line
    is not."""
    try:
        rows = from_json(b"[" + b",".join(lines) + b"]", allow_inf_nan=False)
    except ValueError:
        return None
    # A line may hold two records, or a comma and half of one.
    if len(rows) != len(lines):
        return None
    for row in rows:
        if type(row) is not dict or "step" not in row:
            return None
    blocks = _blocks_of(rows)
    for names, columns in blocks:
        for name, values in zip(names, columns, strict=True):
            if not is_column(name, values):
                return None
    return blocks


def _blocks_of(rows: list[dict[str, Any]]) -> list[Block]:
    """Neighbors of the same names as columns: five times as fast as value by value."""
    blocks: list[Block] = []
    for names, group in groupby(rows, key=tuple):
        blocks.append((names, list(zip(*(row.values() for row in group), strict=True))))
    return blocks


class RunFiles:
    """A run directory and what it holds now.

    Attributes:
        recipe, env: config.yaml and env.json as plain values; empty if not there yet.
        columns: of metrics.jsonl: record name -> one entry a step, None where it was not measured.
        ranks: the same of metrics-rank<r>.jsonl, by rank.
        samples: `{"step", "prompt", "answer", "expected", "row"}`, in the order of the steps; step
            0 is before training.
        failure, stopped: failure.json and stopped.json, None without one.
        evals: what each `eval --score` or `--tasks` said, as `read_scores` gives it.
        state: where it stands.
        final_step: of the weights in final/; None: there are none, or that is not known.
        revision: goes up when the recipe or the samples change.
        log_tail, warnings: the last lines of log.txt; the newest warnings of all of it, each once.
        damaged: what could not be read, by file; empty for a run whose files are whole.
    """

    def __init__(self, folder: str | Path) -> None:
        """UsageError if `folder` holds nothing of a run."""
        self.folder = Path(folder)
        self.name = shown(self.folder.absolute().name)
        self.recipe: dict[str, Any] = {}
        self.env: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.failure: dict[str, Any] | None = None
        self.stopped: dict[str, Any] | None = None
        self.log_tail: list[str] = []
        self.warnings: list[str] = []
        self.state = RunState.KILLED
        self.final_step: int | None = None
        self.revision = 0
        self.ranks: dict[int, Columns] = {}
        self._metrics = JsonlColumns(self.folder / METRICS)
        self._log = AppendedLines(self.folder / LOG)
        self._rank_metrics: dict[int, JsonlColumns] = {}
        self._signatures: dict[str, tuple[int, int, int]] = {}
        self._faults: dict[str, Part[Any]] = {}
        self._evals: dict[str, dict[str, Any]] = {}
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
        return self._metrics.columns

    @property
    def damaged(self) -> list[DamagedFile]:
        tables = {METRICS: self._metrics}
        for rank, table in self._rank_metrics.items():
            tables[f"metrics-rank{rank}.jsonl"] = table
        damaged = [
            DamagedFile(name, table.skipped or None, table.fault) for name, table in tables.items()
        ]
        damaged.append(DamagedFile(LOG, None, self._log.fault))
        for name, (_, fault, lines) in self._faults.items():
            damaged.append(DamagedFile(name, lines, fault))
        return [file for file in damaged if file.why]

    def refresh(self) -> bool:
        """Read what was written since the last look; whether anything changed."""
        previous_state = self.state
        changed = self._metrics.read() | self._read_log()
        for path in self.folder.glob("metrics-rank*.jsonl"):
            match = _RANK.fullmatch(path.name)
            if match is None:
                continue
            rank = int(match[1])
            table = self._rank_metrics.setdefault(rank, JsonlColumns(path))
            changed |= table.read()
            self.ranks[rank] = table.columns
        # Only files that changed since the last look are read again.
        for name, (attribute, read) in PARTS.items():
            if self._changed(name):
                changed = True
                self._faults[name] = read(self.folder)
                vars(self)[attribute] = self._faults[name].value
                if name in (RECIPE, SAMPLES):
                    self.revision += 1
        changed |= self._read_evals()
        self.state = self._state()
        return changed or self.state != previous_state

    @property
    def evals(self) -> list[dict[str, Any]]:
        return list(self._evals.values())

    def _read_evals(self) -> bool:
        """Read the scores that are new or were written again; whether anything changed."""
        evals: dict[str, dict[str, Any]] = {}
        changed = False
        for path in sorted((self.folder / EVALS).glob(SCORES)):
            name = f"{EVALS}/{shown(path.name)}"
            if not self._changed(f"{EVALS}/{path.name}"):
                if name in self._evals:
                    evals[name] = self._evals[name]
                continue
            changed = True
            # The new content decides whether the file is damaged.
            self._faults.pop(name, None)
            try:
                evals[name] = read_scores(path)
            except (OSError, ValueError) as error:
                self._faults[name] = Part(None, reason_of(error))
        changed |= evals.keys() != self._evals.keys()
        self._evals = evals
        return changed

    def _read_log(self) -> bool:
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
        return anew or bool(lines)

    def _changed(self, name: str) -> bool:
        """Whether a file differs from the one last read, by its inode, size and time."""
        signature = (0, 0, 0)
        try:
            status = (self.folder / name).stat()
            signature = (status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            pass
        previous = self._signatures.get(name, (0, 0, 0))
        self._signatures[name] = signature
        return previous != signature

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken."""
        recorded = int((self.columns.get("step") or [0])[-1] or 0)
        return steps_taken(recorded, self.state, self.stopped)

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
        manifest = None
        name = f"{FINAL}/{MANIFEST}"
        self._faults.pop(name, None)
        try:
            manifest = read_manifest(self.folder / FINAL)
        except ValueError as error:
            self._faults[name] = Part(None, str(error))
        self.final_step = manifest["step"] if manifest else None
        return ended_state(
            failed=self.failure is not None,
            stopped=self.stopped is not None,
            final_step=manifest["last_step"] if manifest else None,
            last_step=(self.columns.get("step") or [0])[-1] or 0,
        )


def how_it_ended(run: RunFiles) -> dict[str, Any]:
    """What a run that neither goes on nor finished left behind to tell why, and the command that
    goes on; else nothing."""
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
        fields = {
            "what": end.what,
            "where": end.where,
            "why": end.why,
            "cause": end.cause,
            "next": end.fix,
        }
    return {name: value for name, value in fields.items() if value not in (None, "")}


# The other files of a run: the attribute that each is read into, and by what.
PARTS: dict[str, tuple[str, Callable[[Path], Part[Any]]]] = {
    RECIPE: ("recipe", read_recipe),
    IDENTITY: ("env", read_env),
    FAILURE: ("failure", read_failure),
    STOPPED: ("stopped", read_stopped),
    SAMPLES: ("samples", read_samples),
}


def read_profiles(folder: Path) -> tuple[list[dict[str, Any]], list[DamagedFile]]:
    """The summaries of `profile/`, each with its name, and those that are damaged, such as of a
    copy that was cut off."""
    profiles: list[dict[str, Any]] = []
    damaged: list[DamagedFile] = []
    for path in sorted(folder.glob(PROFILES)):
        name = shown(path.name)
        title = name.removeprefix("summary-").removesuffix(".json")
        try:
            profiles.append({"name": title, **read_profile(path)})
        except (OSError, ValueError) as error:
            damaged.append(DamagedFile(f"profile/{name}", None, reason_of(error)))
    return profiles, damaged


def downsample(
    x: Sequence[float | None], y: Sequence[float | None], points: int
) -> tuple[list[float], list[float]]:
    """At most `points` + 2 points of a curve, with the lowest and the highest of each stretch, the
    first and the last.

    A spike survives, which a mean would hide. Where either is None, NaN or infinite there is no
    point.
    """
    # Their sums find a None, NaN or infinity soonest: a third less time for 100,000 points.
    try:
        has_gaps = not math.isfinite(sum(x) + sum(y))  # type: ignore[arg-type]
    except TypeError:
        has_gaps = True
    if has_gaps:
        pairs = [
            (a, b)
            for a, b in zip(x, y, strict=False)
            if a is not None and b is not None and math.isfinite(b)
        ]
        x = [a for a, _ in pairs]
        y = [b for _, b in pairs]
    chosen: Iterable[int] = range(len(y))
    if len(y) > points:
        chosen = sorted(_extremes(y, max(1, points // 2)))  # type: ignore[arg-type]
    return [float(x[i] or 0.0) for i in chosen], [float(y[i] or 0.0) for i in chosen]


def _extremes(values: Sequence[float], stretches: int) -> set[int]:
    """The indices of the first, the last, and of each stretch the lowest and the highest value."""
    chosen = {0, len(values) - 1}
    for start, end in pairwise(len(values) * i // stretches for i in range(stretches + 1)):
        stretch = values[start:end]
        chosen.add(start + stretch.index(min(stretch)))
        chosen.add(start + stretch.index(max(stretch)))
    return chosen


def finite(values: Sequence[float | None]) -> list[float]:
    """The finite ones."""
    return [value for value in values if value is not None and math.isfinite(value)]


# The choices of the pages: what share of a run's steps a value counts over, and how many at least.
SMOOTHINGS = {"some": (0.02, 5), "strong": (0.1, 15)}
SMOOTH_FROM = 15  # steps; with fewer, the raw values read well


def smoothings(y: Sequence[float | None]) -> dict[str, list[float | None]]:
    """The values of a whole run by each choice of smoothing; none of few steps."""
    if len(finite(y)) < SMOOTH_FROM:
        return {}
    spans = {name: max(least, int(share * len(y))) for name, (share, least) in SMOOTHINGS.items()}
    return {name: smooth(y, span) for name, span in spans.items()}


def smooth(y: Sequence[float | None], span: int) -> list[float | None]:
    """The exponential moving average, with the weight of its start removed, as TensorBoard draws
    it.

    `span`: steps over which a value counts; its weight falls to 1/e in about half of that. Values
    that are missing or not finite are left out.
    """
    decay = 1.0 - 2.0 / (max(1, span) + 1)
    mean = 0.0
    weight = 0.0
    smoothed: list[float | None] = []
    for value in y:
        if value is None or not math.isfinite(value):
            smoothed.append(None)
            continue
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed

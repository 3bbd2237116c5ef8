"""A run directory as a reader sees it: the files of a running, finished, failed or copied run as plain values.

It reads what was appended since the last look, needs no torch, and takes a directory as it is: files that are not there
yet, a last line that is still being written, fields of another version.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from tunesmith.checkpoint.previous_crash import killed_before
from tunesmith.config.dump import leaves
from tunesmith.errors import RunError, UsageError
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import is_locked
from tunesmith.metrics.record import checked_values, is_column
from tunesmith.run_dir import (
    FAILURE,
    FINAL,
    IDENTITY,
    LOG,
    MANIFEST,
    METRICS,
    PROFILES,
    RECIPE,
    SAMPLES,
    STOPPED,
    Part,
    open_regular,
    parse_json,
    read_env,
    read_failure,
    read_manifest,
    read_profile,
    read_recipe,
    read_samples,
    read_stopped,
    reason_of,
    shown,
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
LOG_LINES, WARNINGS = 200, 20  # the newest
_RANK = re.compile(r"metrics-rank(\d+)\.jsonl")
# The last word of a run that a signal ended, in log.txt
_STOPPED = re.compile(r"  stopped (?:by|after) ")


class DamagedFile(NamedTuple):
    """A file of a run that is not read as a whole: how many of its lines were skipped (None: all of it is), and why."""

    file: str
    lines: int | None
    why: str

    def __str__(self) -> str:
        if self.lines is None:
            return f"{self.file}: {self.why}"
        skipped = "1 line was skipped" if self.lines == 1 else f"{self.lines:,} lines were skipped"
        return f"{self.file}: {skipped}; {self.why}"


class AppendedLines:
    """What is added to a file that grows. One that was replaced or cut back is read anew."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._file = path, 0, 0
        self.fault = ""  # why a file that is there cannot be read

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the lines of before no longer count, and those since, whole ones alone."""
        anew, text = self._offset > 0, b""
        self.fault = ""
        try:
            with open_regular(self.path) as file:
                now = os.fstat(file.fileno())
                anew = anew and (now.st_size < self._offset or now.st_ino != self._file)
                self._file = now.st_ino
                file.seek(0 if anew else self._offset)
                text = file.read()
        except FileNotFoundError:  # it may not be there yet, or no longer
            pass
        except OSError as error:
            self.fault = reason_of(error)
        text = text[: text.rfind(b"\n") + 1]
        self._offset = len(text) + (0 if anew else self._offset)
        return anew, text.splitlines()


class JsonlColumns:
    """The numbers of a .jsonl file of records, by name; each list has one entry a record, None where it has no such number.

    A line that is no record is skipped: `skipped` counts them, `reason` says what is wrong with the first.
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
        blocks = _parse_together(lines)
        if blocks is None:
            blocks = _blocks_of(self._parse_singly(lines))
        for names, columns in blocks:
            for name, values in zip(names, columns, strict=True):
                if name not in self.columns:
                    self.columns[name] = [None] * self.rows
                self.columns[name].extend(values)
            self.rows += len(columns[0])
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
    """The records of lines that are all in order: twice as fast as one by one. None where some line is not."""
    try:
        rows = from_json(b"[" + b",".join(lines) + b"]", allow_inf_nan=False)
    except ValueError:
        return None
    if len(rows) != len(lines) or not all(type(row) is dict and "step" in row for row in rows):
        return None
    blocks = _blocks_of(rows)
    whole = all(
        is_column(name, values)
        for names, columns in blocks
        for name, values in zip(names, columns, strict=True)
    )
    return blocks if whole else None


def _blocks_of(rows: list[dict[str, Any]]) -> list[Block]:
    """Neighbors of the same names as columns: five times as fast as value by value."""
    blocks: list[Block] = []
    for names, group in groupby(rows, key=tuple):
        blocks.append((names, list(zip(*(row.values() for row in group), strict=True))))
    return blocks


def holds_run(folder: Path) -> bool:
    """Whether there is a run to read: some file of it, or a process that has begun one."""
    return any((folder / name).is_file() for name in (METRICS, RECIPE, IDENTITY, LOG)) or is_locked(
        folder
    )


class RunFiles:
    """A run directory and what it holds now.

    Attributes:
        recipe, env: config.yaml and env.json as plain values; empty if not there yet.
        columns: of metrics.jsonl: record name -> one entry a step, None where it was not measured. `ranks` has those of
            metrics-rank<r>.jsonl.
        samples: `{"step", "prompt", "answer", "expected"}`, in the order of the steps; step 0 is before training.
        failure, stopped: failure.json and stopped.json, None without one.
        state: running | finished | stopped | failed | killed.
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
        self.state = "killed"
        self.revision = 0
        self.ranks: dict[int, Columns] = {}
        self._metrics, self._log = (
            JsonlColumns(self.folder / METRICS),
            AppendedLines(self.folder / LOG),
        )
        self._of_ranks: dict[int, JsonlColumns] = {}
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._faults: dict[str, Part[Any]] = {}
        if not holds_run(self.folder):
            why = "it has no metrics.jsonl, config.yaml, env.json or log.txt"
            what, fix = "this is no run directory", "give one, such as runs/my-run: ls -t runs"
            raise UsageError(what, where=str(folder), why=why, fix=fix)
        self.refresh()

    @property
    def columns(self) -> Columns:
        return self._metrics.columns

    @property
    def damaged(self) -> list[DamagedFile]:
        tables = {METRICS: self._metrics} | {
            f"metrics-rank{rank}.jsonl": table for rank, table in self._of_ranks.items()
        }
        parts = {
            name: Part(None, table.fault, table.skipped or None) for name, table in tables.items()
        }
        parts |= {LOG: Part(None, self._log.fault)} | self._faults
        return [
            DamagedFile(name, lines, fault) for name, (_, fault, lines) in parts.items() if fault
        ]

    def refresh(self) -> bool:
        """Read what was written since the last look; whether anything changed."""
        before = self.state
        changed = self._metrics.read() | self._read_log()
        for path in self.folder.glob("metrics-rank*.jsonl"):
            if found := _RANK.fullmatch(path.name):
                table = self._of_ranks.setdefault(int(found[1]), JsonlColumns(path))
                changed |= table.read()
                self.ranks[int(found[1])] = table.columns
        for name, (attribute, read) in PARTS.items():
            if self._changed(name):
                changed = True
                self._faults[name] = read(self.folder)
                vars(self)[attribute] = self._faults[name].value
                self.revision += name in (RECIPE, SAMPLES)
        self.state = self._state()
        return changed or self.state != before

    def _read_log(self) -> bool:
        anew, lines = self._log.read()
        if anew:
            self.log_tail, self.warnings = [], []
        self.log_tail = [
            *self.log_tail,
            *(line.decode(errors="replace") for line in lines[-LOG_LINES:]),
        ][-LOG_LINES:]
        told = [
            line.decode(errors="replace").partition("warning: ")[2]
            for line in lines
            if b"warning: " in line
        ]
        self.warnings = list(dict.fromkeys([*self.warnings, *map(str.strip, told)]))[-WARNINGS:]
        return anew or bool(lines)

    def _changed(self, name: str) -> bool:
        """Whether a file differs from the one last read, by its inode, size and time."""
        try:
            now = (self.folder / name).stat()
            seen = now.st_ino, now.st_size, now.st_mtime_ns
        except OSError:
            seen = 0, 0, 0
        before, self._seen[name] = self._seen.get(name, (0, 0, 0)), seen
        return before != seen

    def _state(self) -> str:
        if is_locked(self.folder):
            return "running"
        if self.failure is not None:  # removed by the next start
            return "failed"
        if self.stopped is not None or any(map(_STOPPED.search, self.log_tail[-6:])):
            return "stopped"
        manifest = None
        name = f"{FINAL}/{MANIFEST}"
        self._faults.pop(name, None)
        try:
            manifest = read_manifest(self.folder / FINAL)
        except ValueError as error:
            self._faults[name] = Part(None, str(error))
        last = (self.columns.get("step") or [0])[-1] or 0
        # final/ may be of a shorter run
        return "finished" if manifest and manifest["step"] >= last else "killed"


def how_it_ended(run: RunFiles) -> dict[str, Any]:
    """What a run that neither goes on nor finished left behind to tell why, and the command that goes on; else nothing."""
    told: dict[str, Any] = {}
    if run.failure and run.state == "failed":
        told = {name: run.failure.get(name) for name in FAILURE_FIELDS}
    elif run.state == "stopped":
        told = leaves(run.stopped) if run.stopped else {}
    elif run.state == "killed":
        unknown = RunError(
            "no process is at work here, and it left no word", why="it was killed, or this is a copy of a running one",
            fix=f"tunesmith train {shell_path(shown(run.folder / RECIPE))}   # goes on from the newest checkpoint",
        )  # fmt: skip
        end = killed_before(run.folder) or unknown
        told = {
            "what": end.what,
            "where": end.where,
            "why": end.why,
            "cause": end.cause,
            "next": end.fix,
        }
    return {name: value for name, value in told.items() if value not in (None, "")}


# The other files of a run: the attribute that each is read into, and by what.
PARTS: dict[str, tuple[str, Callable[[Path], Part[Any]]]] = {
    RECIPE: ("recipe", read_recipe), IDENTITY: ("env", read_env), FAILURE: ("failure", read_failure),
    STOPPED: ("stopped", read_stopped), SAMPLES: ("samples", read_samples),
}  # fmt: skip


def read_profiles(folder: Path) -> tuple[list[dict[str, Any]], list[DamagedFile]]:
    """The summaries of `profile/`, each with its name, and those that are damaged, such as of a copy that was cut off."""
    profiles: list[dict[str, Any]] = []
    damaged: list[DamagedFile] = []
    for path in sorted(folder.glob(PROFILES)):
        name = shown(path.name)
        try:
            profiles.append(
                {"name": name.removeprefix("summary-").removesuffix(".json"), **read_profile(path)}
            )
        except (OSError, ValueError) as error:
            damaged.append(DamagedFile(f"profile/{name}", None, reason_of(error)))
    return profiles, damaged


def downsample(
    x: Sequence[float | None], y: Sequence[float | None], points: int
) -> tuple[list[float], list[float]]:
    """At most `points` + 2 points of a curve, with the lowest and the highest of each stretch, the first and the last.

    A spike survives, which a mean would hide. Where either is None, NaN or infinite there is no point.
    """
    try:  # their sums find a None, NaN or infinity soonest
        whole = math.isfinite(sum(x)) and math.isfinite(sum(y))  # type: ignore[arg-type]
    except TypeError:
        whole = False
    if not whole:
        pairs = zip(x, y, strict=False)
        kept = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(b)]
        x, y = [a for a, _ in kept], [b for _, b in kept]
    if len(y) > points:
        stretches, chosen = max(1, points // 2), {0, len(y) - 1}
        for start, end in pairwise(len(y) * i // stretches for i in range(stretches + 1)):
            stretch: list[float] = list(y[start:end])  # type: ignore[arg-type]
            chosen |= {start + stretch.index(min(stretch)), start + stretch.index(max(stretch))}
        order = sorted(chosen)
        x, y = [x[i] for i in order], [y[i] for i in order]
    return [float(v or 0.0) for v in x], [float(v or 0.0) for v in y]


def known(values: Sequence[float | None]) -> list[float]:
    """The finite ones."""
    return [value for value in values if value is not None and math.isfinite(value)]


def smooth(y: Sequence[float | None], span: int) -> list[float | None]:
    """The exponential moving average, with the weight of its start taken out, as TensorBoard draws it.

    `span`: steps over which a value counts; its weight falls to 1/e in about half of that. Values that are missing or
    not finite are left out.
    """
    keep, mean, weight, out = 1.0 - 2.0 / (max(1, span) + 1), 0.0, 0.0, list[float | None]()
    for value in y:
        if value is not None and math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
            out.append(mean / weight)
        else:
            out.append(None)
    return out

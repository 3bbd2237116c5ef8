"""A run directory as a reader sees it: the files of a running, finished, failed or copied run as plain values.

It reads what was appended since the last look, needs no torch, and takes a directory as it is: files that are not there
yet, a last line that is still being written, fields of another version.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from tunesmith.checkpoint.killed import killed_before
from tunesmith.checkpoint.run_dir import IDENTITY, RECIPE, STOPPED
from tunesmith.config.dump import leaves
from tunesmith.config.tree import read_file
from tunesmith.errors import RecipeError, RunError, UsageError
from tunesmith.launch.jobs import is_locked

Columns = dict[str, list[float | None]]

# Of the records: counts and positions, no curves.
NO_CHART = ("step", "epoch", "tokens", "supervised_tokens", "examples", "mfu_peak_tflops")
METRICS, SAMPLES, LOG, FAILURE = "metrics.jsonl", "samples.jsonl", "log.txt", "failure.json"
FAILURE_FIELDS = ("what", "where", "why", "cause", "rank", "host", "phase", "collective", "last_step", "next")
LINES = 512  # of a file that are parsed at a time: what one bad line spoils
LOG_LINES, WARNINGS = 200, 20  # the newest
_RANK = re.compile(r"metrics-rank(\d+)\.jsonl")
_STOPPED = re.compile(r"  stopped (?:by|after) ")  # the last word of a run that a signal ended, in log.txt


class AppendedLines:
    """What is added to a file that grows. One that was replaced or cut back is read anew."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._file = path, 0, 0

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the lines of before no longer count, and those since, whole ones alone."""
        anew, text = self._offset > 0, b""
        with suppress(OSError), self.path.open("rb") as file:  # it may not be there yet, or no longer
            now = os.fstat(file.fileno())
            anew = anew and (now.st_size < self._offset or now.st_ino != self._file)
            self._file = now.st_ino
            file.seek(0 if anew else self._offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._offset = len(text) + (0 if anew else self._offset)
        return anew, text.splitlines()


class JsonlColumns:
    """The numbers of a .jsonl file, by name; each list has one entry a line, None where a line has no such number."""

    def __init__(self, path: Path) -> None:
        self._lines = AppendedLines(path)
        self.columns: Columns = {}
        self.rows = 0

    def read(self) -> bool:
        """Read what was appended; whether anything changed."""
        anew, lines = self._lines.read()
        if anew:
            self.columns, self.rows = {}, 0
        for start in range(0, len(lines), LINES):
            self._add(_parse(lines[start : start + LINES]))
        return anew or bool(lines)

    def _add(self, rows: list[dict[str, Any]]) -> None:
        # Lines of the same names are turned into columns at once: five times as fast as value by value.
        for names, group in groupby(rows, key=tuple):
            values = list(zip(*(row.values() for row in group), strict=True))
            count = len(values[0]) if values else 0
            for name, found in zip(names, values, strict=True):
                if name not in self.columns:
                    self.columns[name] = [None] * self.rows
                self.columns[name].extend(found)
            self.rows += count
            for column in self.columns.values():
                column.extend([None] * (self.rows - len(column)))


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    """The objects of the lines, with numbers and None alone; lines that hold none are left out."""
    joined = b",".join(lines)
    with suppress(ValueError):
        rows = from_json(b"[" + joined + b"]")  # twice as fast as json.loads
        if b': "' not in joined and all(type(row) is dict for row in rows):
            return rows
    found = []
    for line in lines:
        with suppress(ValueError):
            row = from_json(line)
            found += [{name: _number(value) for name, value in row.items()}] if isinstance(row, dict) else []
    return [row for row in found if row]


def _number(value: Any) -> float | None:
    """A number of a record; NaN and the infinities are written as text."""
    with suppress(ValueError):
        if isinstance(value, str):
            return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def holds_run(folder: Path) -> bool:
    """Whether there is a run to read: some file of it, or a process that has begun one."""
    return any((folder / name).is_file() for name in (METRICS, RECIPE, IDENTITY, LOG)) or is_locked(folder)


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
    """

    def __init__(self, folder: str | Path) -> None:
        """UsageError if `folder` holds nothing of a run."""
        self.folder = Path(folder)
        self.name = self.folder.absolute().name
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
        self._metrics, self._log = JsonlColumns(self.folder / METRICS), AppendedLines(self.folder / LOG)
        self._of_ranks: dict[int, JsonlColumns] = {}
        self._seen: dict[str, tuple[int, int, int]] = {}
        if not holds_run(self.folder):
            why = "it has no metrics.jsonl, config.yaml, env.json or log.txt"
            what, fix = "this is no run directory", "give one, such as runs/my-run: ls -t runs"
            raise UsageError(what, where=str(folder), why=why, fix=fix)
        self.refresh()

    @property
    def columns(self) -> Columns:
        return self._metrics.columns

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
                changed, vars(self)[attribute] = True, read(self.folder / name)
                self.revision += name in (RECIPE, SAMPLES)
        self.state = self._state()
        return changed or self.state != before

    def _read_log(self) -> bool:
        anew, lines = self._log.read()
        if anew:
            self.log_tail, self.warnings = [], []
        self.log_tail = [*self.log_tail, *(line.decode(errors="replace") for line in lines[-LOG_LINES:])][-LOG_LINES:]
        told = [line.decode(errors="replace").partition("warning: ")[2] for line in lines if b"warning: " in line]
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
        manifest = _json(self.folder / "final" / "manifest.json") or {}
        last = (self.columns.get("step") or [0])[-1] or 0
        return "finished" if manifest.get("step", -1) >= last else "killed"  # final/ may be of a shorter run


def how_it_ended(run: RunFiles) -> dict[str, Any]:
    """What a run that neither goes on nor finished left behind to tell why, and the command that goes on; else nothing."""
    told: dict[str, Any] = {}
    if run.failure and run.state == "failed":
        told = {name: run.failure.get(name) for name in FAILURE_FIELDS}
    elif run.state == "stopped":
        told = leaves(run.stopped or {})
    elif run.state == "killed":
        unknown = RunError(
            "no process is at work here, and it left no word", why="it was killed, or this is a copy of a running one",
            fix=f"tunesmith train {shlex.quote(f'{run.folder}/config.yaml')}   # goes on from the newest checkpoint",
        )  # fmt: skip
        end = killed_before(run.folder) or unknown
        told = {"what": end.what, "where": end.where, "why": end.why, "cause": end.cause, "next": end.fix}
    return {name: value for name, value in told.items() if value not in (None, "")}


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return dict(read_file(path).plain())
    except RecipeError:
        return {}


def _json(path: Path) -> dict[str, Any] | None:
    """An object of a JSON file; None where there is none, or it is still being written."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else None
    return None


def _samples(path: Path) -> list[dict[str, Any]]:
    found = []
    with suppress(OSError):
        for line in path.read_bytes().splitlines(keepends=True):
            with suppress(ValueError):
                row = json.loads(line)
                found += [row] if isinstance(row, dict) and {"step", "prompt", "answer"} <= row.keys() else []
    return sorted(found, key=lambda row: row["step"])


# The other files of a run: the attribute that each is read into, and by what.
PARTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    RECIPE: ("recipe", _recipe), IDENTITY: ("env", lambda path: _json(path) or {}), FAILURE: ("failure", _json),
    STOPPED: ("stopped", _json), SAMPLES: ("samples", _samples),
}  # fmt: skip


def downsample(x: Sequence[float | None], y: Sequence[float | None], points: int) -> tuple[list[float], list[float]]:
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

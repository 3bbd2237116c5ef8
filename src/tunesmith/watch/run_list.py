"""All runs of some folders, a line for each: state, step, losses and a sparkline.

A list of hundreds of runs must not hold their records. Each line is read from some places of a
run's files, and again only when these have changed.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from tunesmith.launch.jobs import is_at_work, run_folders
from tunesmith.metrics.record import checked_values
from tunesmith.report.run_files import finite
from tunesmith.run_dir import (
    FAILURE,
    FINAL,
    MANIFEST,
    METRICS,
    RECIPE,
    STOPPED,
    RunState,
    ended_state,
    open_regular,
    parse_json,
    read_failure,
    read_manifest,
    read_stopped,
    reason_of,
    shown,
    steps_taken,
)
from tunesmith.units import ceil_div

# Points of a sparkline, at most.
SPARK_POINTS = 48
# Bytes that are read for each: some records. A file of up to so many for each point is read whole.
CHUNK = 4096
# Records of which a point is the mean.
RECORDS_A_POINT = 4
# Bytes of the records that are searched for a val_loss: those of a few hundred steps.
VALIDATION_TAIL = 1 << 18
# The content of a line.
_FILES = (METRICS, FAILURE, STOPPED, f"{FINAL}/{MANIFEST}")

Record = dict[str, float | None]


class ListedRun:
    """A line of the list.

    Attributes:
        number: its id in addresses; it is that of no other run.
        row: what the page shows; plain values.
        changes: how often the row has changed.
    """

    def __init__(self, folder: Path, name: str, number: int) -> None:
        self.folder = folder
        self.name = name
        self.number = number
        self.changes = 0
        self.row: dict[str, Any] = {}
        self._signature: list[Any] = []

    def refresh(self) -> bool:
        """Read the run if its files or its lock have changed; whether they have."""
        is_running = is_at_work(self.folder)
        signature: list[Any] = [_signature_of(self.folder / name) for name in _FILES]
        signature.append(is_running)
        if signature == self._signature:
            return False
        self._signature = signature
        row = {
            "id": self.number,
            "name": self.name,
            "place": shown(self.folder),
            "state": RunState.KILLED,
            "step": 0,
            "loss": None,
            "val_loss": None,
            "started": _signature_of(self.folder / RECIPE)[1] / 1e9,
            "spark": [],
            "damage": "",
        }
        try:
            row |= self._read()
        except Exception as error:
            # An error of ours: one run must not stop the list of the others.
            row["damage"] = f"{type(error).__name__}: {error}"
        if is_running:
            row["state"] = RunState.RUNNING
        # Pages are sent the row by other threads: it is not changed any more.
        self.row = row
        self.changes += 1
        return True

    def _read(self) -> dict[str, Any]:
        damage = ""
        records: list[Record] = []
        val_loss = None
        try:
            records, bad_lines = sampled_records(self.folder / METRICS)
            val_loss = newest_val_loss(self.folder / METRICS)
            if bad_lines:
                damage = f"{METRICS}: some lines are not records"
        except FileNotFoundError:
            pass  # before the first step
        except OSError as error:
            damage = f"{METRICS}: {reason_of(error)}"
        newest = records[-1] if records else {}
        step = newest.get("step") or 0
        failure = read_failure(self.folder)
        stopped = read_stopped(self.folder)
        damage = damage or failure.fault or stopped.fault
        manifest = None
        try:
            manifest = read_manifest(self.folder / FINAL)
        except ValueError as error:
            damage = damage or f"{FINAL}/{MANIFEST}: {error}"
        state = ended_state(
            failed=failure.value is not None,
            stopped=stopped.value is not None,
            final_step=manifest["last_step"] if manifest else None,
            last_step=step,
        )
        return {
            "state": state,
            "step": steps_taken(int(step), state, stopped.value),
            "loss": newest.get("loss"),
            "val_loss": val_loss,
            "spark": sparkline(records),
            "damage": damage,
        }


class RunList:
    """The runs of some folders, and of folders in them, such as those of a sweep."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.runs: dict[Path, ListedRun] = {}

    def refresh(self) -> Iterator[bool]:
        """Look for new runs, then at each run; yields whether something changed."""
        for folder in self.folders:
            for path in run_folders(folder, listed=self.runs.keys()):
                if path not in self.runs:
                    # Runs of two sweeps may have the same name.
                    name = shown(path.relative_to(folder))
                    self.runs[path] = ListedRun(path, name, len(self.runs))
        for run in self.runs.values():
            yield run.refresh()

    def folder_of(self, number: int) -> Path | None:
        """The run directory of a line."""
        paths = list(self.runs)
        return paths[number] if 0 <= number < len(paths) else None


def sampled_records(path: Path) -> tuple[list[Record], int]:
    """Records from evenly spaced places of a metrics.jsonl, the newest among them, in their order.

    Also how many of the lines that were read are no records. OSError if it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= SPARK_POINTS * CHUNK:
            lines = _spread(file.read().split(b"\n")[:-1], SPARK_POINTS * RECORDS_A_POINT)
        else:
            lines = []
            for point in range(SPARK_POINTS):
                file.seek((size - CHUNK) * point // (SPARK_POINTS - 1))
                # The first and the last line of a piece are cut.
                lines += file.read(CHUNK).split(b"\n")[1:-1][-RECORDS_A_POINT:]
    records: list[Record] = []
    bad_lines = 0
    for line in lines:
        try:
            records.append(checked_values(parse_json(line)))
        except ValueError:
            bad_lines += 1
    return records, bad_lines


def newest_val_loss(path: Path) -> float | None:
    """The last val_loss in the end of a metrics.jsonl; few records have one."""
    for line in reversed(_end_of(path, VALIDATION_TAIL).split(b"\n")[:-1]):
        if b'"val_loss"' not in line:
            continue
        with suppress(ValueError):
            value = checked_values(parse_json(line)).get("val_loss")
            if value is not None:
                return value
    return None


def _end_of(path: Path, size: int) -> bytes:
    """The last bytes of a file, so many at most."""
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read()


def _spread(lines: list[bytes], count: int) -> list[bytes]:
    """So many of the lines, evenly spaced, the last one among them."""
    if len(lines) <= count:
        return lines
    return [lines[len(lines) * (part + 1) // count - 1] for part in range(count)]


def sparkline(records: Sequence[Record]) -> list[float]:
    """The losses of records as at most SPARK_POINTS means."""
    losses = finite([record.get("loss") for record in records])
    width = max(1, ceil_div(len(losses), SPARK_POINTS))
    means = [fmean(losses[start : start + width]) for start in range(0, len(losses), width)]
    return [float(f"{mean:.4g}") for mean in means]


def _signature_of(path: Path) -> tuple[int, int]:
    """Size and time of a file; zeros without one."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns

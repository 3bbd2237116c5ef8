"""All runs of some folders, a line for each: state, step, losses and a sparkline.

A list of hundreds of runs must not hold their records. Each line is read from some places of a
run's files, and again only when these have changed.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from tunesmith.launch.jobs import is_at_work, run_folders
from tunesmith.metrics.record import checked_values, newest_records
from tunesmith.reader.run_files import FINAL_MANIFEST, finite, signature_of
from tunesmith.run_dir import (
    FAILURE,
    FINAL,
    METRICS,
    RECIPE,
    STOPPED,
    RunState,
    how_far,
    open_regular,
    parse_json,
    read_failure,
    read_manifest,
    read_part,
    read_stopped,
    shown,
)
from tunesmith.units import ceil_div

SPARK_POINTS = 48  # of a sparkline, at most
PIECE_BYTES = 4096  # that are read for each: some records
RECORDS_A_POINT = 4  # of which it is the mean
VALIDATION_BYTES = 1 << 18  # of the records that are searched for a val_loss
# The content of a line.
_SIGNATURE_FILES = (METRICS, FAILURE, STOPPED, FINAL_MANIFEST)

Row = dict[str, object]  # what the page shows of a run


class RunList:
    """The runs of some folders, and of folders in them, such as those of a sweep.

    Attributes:
        rows: by folder, each with the number of its run as `id`, which is that of no other run.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.rows: dict[Path, Row] = {}
        self._signatures: dict[Path, list[object]] = {}

    def refresh(self) -> Iterator[bool]:
        """Look for new runs, then at each run; yields whether something changed."""
        for folder in self.folders:
            for path in run_folders(folder, listed=self.rows.keys()):
                # Runs of two sweeps may have the same name.
                about = {"id": len(self.rows), "name": shown(path.relative_to(folder))}
                self.rows.setdefault(path, about)
        for path, row in self.rows.items():
            is_running = is_at_work(path)
            signature = [is_running, *(signature_of(path / name) for name in _SIGNATURE_FILES)]
            if signature == self._signatures.get(path):
                yield False
                continue
            self._signatures[path] = signature
            # Pages are sent the row by other threads: it is not changed any more.
            self.rows[path] = {"id": row["id"], "name": row["name"], **_read(path)}
            if is_running:
                self.rows[path]["state"] = RunState.RUNNING
            yield True


def _read(folder: Path) -> Row:
    sampled = read_part(folder / METRICS, sampled_losses)
    losses, bad_lines = sampled.value or ([], 0)
    faults = [f"{METRICS}: {sampled.fault}" if sampled.fault else ""]
    if bad_lines:
        faults.append(f"{METRICS}: some lines are not records")
    records = newest_records(folder, VALIDATION_BYTES)
    newest = next(records, {})
    val_losses = (record.get("val_loss") for record in (newest, *records))
    failure = read_failure(folder)
    stopped = read_stopped(folder)
    final = read_part(folder / FINAL, read_manifest)
    faults += [failure.fault, stopped.fault, final.fault and f"{FINAL_MANIFEST}: {final.fault}"]
    state, steps = how_far(newest.get("step"), failure.value, stopped.value, final.value)
    return {
        "place": shown(folder),
        "state": state,
        "step": steps,
        "loss": newest.get("loss"),
        "val_loss": next((value for value in val_losses if value is not None), None),
        "started": signature_of(folder / RECIPE)[0] / 1e9,
        "spark": sparkline(losses),
        "damage": next(filter(None, faults), ""),
    }


def sampled_losses(path: Path) -> tuple[list[float], int]:
    """Losses from evenly spaced places of a metrics.jsonl, in their order.

    Also how many of the lines that were read are no records. OSError if it cannot be read.
    """
    lines: list[bytes] = []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        stride = max(PIECE_BYTES, size // SPARK_POINTS)
        for start in range(0, size, stride):
            file.seek(start)
            # The first and the last line of a piece are cut.
            whole = file.read(PIECE_BYTES).split(b"\n")[bool(start) : -1]
            lines += whole[-RECORDS_A_POINT:] if stride > PIECE_BYTES else whole
    losses: list[float | None] = []
    bad_lines = 0
    for line in lines:
        try:
            losses.append(checked_values(parse_json(line)).get("loss"))
        except ValueError:
            bad_lines += 1
    return finite(losses), bad_lines


def sparkline(losses: Sequence[float]) -> list[float]:
    """The losses as at most SPARK_POINTS means."""
    width = max(1, ceil_div(len(losses), SPARK_POINTS))
    means = [fmean(losses[start : start + width]) for start in range(0, len(losses), width)]
    return [float(f"{mean:.4g}") for mean in means]

"""One record per step, and `metrics.jsonl`, the file of them.

Every other view of a run is derived from it.

A record is one line of strict JSON. Floats are written by `repr`, so they read back bit for bit;
NaN and the infinities, which JSON lacks, become the strings "NaN", "Infinity" and "-Infinity". A
killed process leaves at most a partial last line.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from tunesmith.errors import RunError
from tunesmith.host.files import write_atomically
from tunesmith.run_dir import (
    METRICS,
    is_count,
    is_number,
    open_regular,
    parse_json,
    read_bytes,
)

VALIDATION = "val_"  # how names of what was measured on held-out rows begin
TAIL_BYTES = 1 << 16  # of metrics.jsonl: some hundred records


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The record of one optimizer step. Counts are those of the global batch, over all ranks.

    Attributes:
        step: optimizer steps so far, this one included; the first step is 1.
        epoch: passes over the training rows, such as 1.25.
        loss: mean over the supervised tokens, measured before the step's update.
        learning_rate: of this step's update.
        grad_norm: L2 norm over all trained parameters before clipping, tied ones once.
        tokens: non-padding input tokens.
        supervised_tokens: positions whose label enters the loss.
        step_seconds: from the end of the step before, by the device's clock.
        data_seconds: that the host waited for data.
        tokens_per_second: `tokens / step_seconds`.
        mfu: model FLOPs per second over the peak, from 0 to 1; None without a peak
            that bounds it.
        memory_gib: peak memory so far: allocated on the GPU, else resident in RAM.
        mfu_peak_tflops: the peak that `mfu` is relative to.
        gpu_utilization: percent. This and the other gauges of a GPU: GPU only.
        host_memory_percent: of this rank's host: 100 less the available share.
        network_bytes_per_second: several ranks: sent and received by this rank's host.
        nvlink_bytes_per_second: several ranks: sent and received by this rank's GPU.
        idle_share: several data ranks: share of their time without work, by micro batches' cost.
        val_loss: loss on the held-out rows, where it was measured after this step.
        extra: further metrics of the method, by names that no field has. On disk they follow the
            other values.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    examples: int
    step_seconds: float
    data_seconds: float
    tokens_per_second: float
    mfu: float | None
    memory_gib: float
    # Optional from here on, `_OPTIONAL`: left out of a record where they were not measured.
    mfu_peak_tflops: float | None = None
    gpu_utilization: float | None = None
    gpu_power_watts: float | None = None
    gpu_clock_mhz: float | None = None
    gpu_temperature_celsius: float | None = None
    host_memory_percent: float | None = None
    network_bytes_per_second: float | None = None
    nvlink_bytes_per_second: float | None = None
    idle_share: float | None = None
    val_loss: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clashes = [name for name in self.extra if name in self.__dataclass_fields__]
        if clashes:
            names = ", ".join(clashes)
            raise ValueError(f"{names} in `extra`: the record has a field of that name")

    def values(self) -> dict[str, int | float | None]:
        """Name -> value in the order of the fields, then `extra`; an optional value that was not
        measured is left out."""
        values = {}
        for name in _FIELD_NAMES:
            value = self.__dict__[name]
            if value is not None or name not in _OPTIONAL:
                values[name] = value
        return values | dict(self.extra)

    def tagged(self) -> dict[str, float]:
        """List the measured values by a tracker's names: `train/loss`, `validation/loss`."""
        tagged = {}
        for name, value in self.values().items():
            if value is not None and name != "step":
                held_out = name.removeprefix(VALIDATION)
                tagged[f"train/{name}" if held_out == name else f"validation/{held_out}"] = value
        return tagged

    def to_plain(self) -> dict[str, int | float | str | None]:
        """`values()` as strict JSON can hold them: non-finite floats are strings."""
        values = self.values().items()
        return {name: v if v is None or math.isfinite(v) else json.dumps(v) for name, v in values}

    def to_json(self) -> str:
        """One line of strict JSON, without the newline."""
        return json.dumps(self.to_plain(), allow_nan=False)

    @classmethod
    def from_plain(cls, values: object) -> Self:
        """The record of a `to_plain`. Unknown names go to `extra` if their value is a number,
        else they are skipped.

        ValueError for a missing name, a value of another type, and what is no dict.
        """
        numbers = checked_values(values)
        missing = [name for name in _FIELD_NAMES if name not in numbers and name not in _OPTIONAL]
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}")
        fields: dict[str, Any] = {name: numbers.pop(name, None) for name in _FIELD_NAMES}
        # A later version may write more: such numbers stay.
        extra = {name: number for name, number in numbers.items() if number is not None}
        return cls(**fields, extra=extra)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read what `to_json` wrote; ValueError for anything else."""
        return cls.from_plain(parse_json(line))


_FIELD_NAMES = tuple(field.name for field in fields(StepRecord) if field.name != "extra")
_OPTIONAL = frozenset(_FIELD_NAMES[_FIELD_NAMES.index("memory_gib") + 1 :])
_MAY_BE_NULL = _OPTIONAL | {"mfu"}
_INTEGER_FIELDS = frozenset({"step", "tokens", "supervised_tokens", "examples"})
_NON_FINITE = ("NaN", "Infinity", "-Infinity")  # as both json.dumps and float() spell them


def read_records(path: str | Path) -> list[StepRecord]:
    """All records of a metrics.jsonl, without a partial last line (of a run that still writes, or
    was killed).

    RunError names an unreadable line before the last by file:line.
    """
    path = Path(path)
    records = []
    lines = read_bytes(path).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(StepRecord.from_json(line))
        except ValueError as error:
            if number < len(lines):
                raise RunError(
                    "a line of the metrics cannot be read",
                    where=f"{path}:{number}",
                    why=str(error),
                    fix="remove that line",
                ) from None
    return records


def checked_values(row: object) -> dict[str, int | float | None]:
    """The numbers of one parsed line, for readers of a run of any version; ValueError for what is
    no record.

    A name that no field has may hold anything: what is no number becomes None. Fields other than
    `step` may be absent.
    """
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError("it is not a JSON object with a step")
    values: dict[str, int | float | None] = {}
    for name, value in row.items():
        # JSON has no NaN and infinity: they are written as words.
        number = float(value) if value in _NON_FINITE else value
        is_wrong = not is_number(number) and not isinstance(number, float)
        if name in _INTEGER_FIELDS:
            is_wrong = not is_count(value)
        if is_wrong and name in _FIELD_NAMES and not (value is None and name in _MAY_BE_NULL):
            raise ValueError(f"{name} is {value!r:.40}, which is not a number of that kind")
        values[name] = None if is_wrong else number
    return values


def newest_record(folder: Path) -> dict[str, int | float | None]:
    """The last whole record of a run directory's metrics.jsonl, read from the file's end alone;
    empty without one."""
    return next(newest_records(folder), {})


def newest_records(folder: Path) -> Iterator[dict[str, int | float | None]]:
    """The whole records in the end of a run directory's metrics.jsonl, the newest first."""
    try:
        with open_regular(folder / METRICS) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return
    for line in reversed(lines):
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                yield checked_values(parse_json(line))


def cut_back(path: str | Path, step: int) -> int:
    """Remove from a file of JSON lines, in one move, those after `step` and every unreadable line;
    return how many.

    Lines that stay are not changed by a byte. A missing file stays missing.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    remaining = []
    for line in lines:
        with contextlib.suppress(ValueError):
            line_step = checked_values(parse_json(line))["step"] or 0
            # Without its line break a record may be cut off.
            if line.endswith(b"\n") and line_step <= step:
                remaining.append(line)
    # In one move: a crash leaves the old file or the new one.
    if len(remaining) < len(lines):
        write_atomically(path, b"".join(remaining))
    return len(lines) - len(remaining)

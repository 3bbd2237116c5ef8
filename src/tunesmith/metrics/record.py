"""Step records, and the file `metrics.jsonl` that contains one record per step.

All other views of a run are derived from this file.

A record is one line of strict JSON. Floats are written with `repr`, so they are read back bit for
bit. NaN and infinities do not exist in JSON and are written as the strings "NaN", "Infinity" and
"-Infinity". A killed process leaves at most one incomplete last line.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from tunesmith.errors import RunError
from tunesmith.host.files import write_atomically
from tunesmith.run_dir import METRICS, open_regular, parse_json, read_bytes

Values = dict[str, int | float | None]  # values of a record. The keys are the names of the fields
VALIDATION = "val_"  # prefix of the names of validation metrics
TAIL_BYTES = 1 << 16  # bytes to read from the end of metrics.jsonl: a few hundred records


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The record of one optimizer step. Counts are sums over the global batch of all ranks.

    Attributes:
        step: number of optimizer steps so far, including this one. The first step is 1, and 0 is
            the validation before it.
        epoch: passes over the training rows, such as 1.25.
        loss: mean over the supervised tokens, computed before the update of this step.
        learning_rate: learning rate of this step's update.
        grad_norm: L2 norm over all trained parameters before clipping. Tied parameters are counted
            once.
        tokens: number of input tokens without padding.
        supervised_tokens: number of positions whose label enters the loss.
        step_seconds: time since the end of the previous step, measured by the device's clock.
        data_seconds: time that the host waited for data.
        tokens_per_second: `tokens / step_seconds`.
        mfu: model FLOPs per second divided by the peak, from 0 to 1. None if there is no valid
            peak.
        memory_gib: peak memory so far: allocated on the GPU, or resident in RAM without a GPU.
        mfu_peak_tflops: the peak TFLOP/s with which `mfu` was computed.
        gpu_utilization: utilization in percent. All values whose name begins with `gpu_` exist only
            on GPUs.
        host_memory_percent: percentage of this rank's host memory that is in use and cannot be
            freed.
        network_bytes_per_second: bytes per second that this rank's host sends and receives.
            Measured only with several ranks, like the next value.
        nvlink_bytes_per_second: bytes per second that this rank's GPU sends and receives by NVLink.
        idle_share: fraction of the time in which data ranks wait for a slower rank, estimated from
            the cost of their micro batches. Only with several data ranks.
        val_loss: validation loss, if a validation followed this step.
        extra: other metrics of the method. Their names must differ from the names of the fields. In
            the file they come after the fields.
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
    # This field and all fields below it (`_OPTIONAL`) are omitted from a record if they were not
    # measured.
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
        clashes = ", ".join(name for name in self.extra if name in self.__dataclass_fields__)
        if clashes:
            raise ValueError(
                f"{clashes} must not be in `extra`, because the record has a field of this name"
            )

    def values(self) -> Values:
        """Return the values by name in the order of the fields, followed by `extra`.

        An optional value that was not measured is omitted.
        """
        if not self.step:
            return {"step": 0, "val_loss": self.val_loss, **self.extra}
        values = {name: value for name, value in vars(self).items() if name != "extra"}
        for name in _OPTIONAL:
            if values[name] is None:
                del values[name]
        return values | dict(self.extra)

    def tagged(self) -> dict[str, float]:
        """Return the measured values with the names that trackers use, such as `train/loss`."""
        tagged = {}
        for name, value in self.values().items():
            if value is not None and name != "step":
                group = "validation" if name.startswith(VALIDATION) else "train"
                tagged[f"{group}/{name.removeprefix(VALIDATION)}"] = value
        return tagged

    def to_plain(self) -> dict[str, int | float | str | None]:
        """Return `values()` with non-finite floats as strings, for strict JSON."""
        return {
            name: value if value is None or math.isfinite(value) else json.dumps(value)
            for name, value in self.values().items()
        }

    def to_json(self) -> str:
        """Return one line of strict JSON without the newline."""
        return json.dumps(self.to_plain(), allow_nan=False)

    @classmethod
    def before_training(cls, val_loss: float, extra: Mapping[str, float]) -> Self:
        """Return the record of a validation before the first step. It has no other values."""
        zeros: dict[str, Any] = dict.fromkeys(_REQUIRED, 0)
        return cls(**zeros, val_loss=val_loss, extra=extra)

    @classmethod
    def from_plain(cls, values: object) -> Self:
        """Build a record from the result of `to_plain`.

        A value with an unknown name is added to `extra` if it is a number, else it is skipped.

        Raise ValueError if a name is missing, a value has another type, or `values` is not a dict.
        """
        numbers = checked_values(values)
        missing = [name for name in _REQUIRED if name not in numbers]
        if missing:
            raise ValueError(f"the record has no value for {', '.join(missing)}")
        fields: dict[str, Any] = {name: numbers.pop(name, None) for name in _FIELD_NAMES}

        # The record may be from a later version with more fields. Keep their numbers in `extra`.
        extra = {name: number for name, number in numbers.items() if number is not None}
        return cls(**fields, extra=extra)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Parse a line that `to_json` returned. Raise ValueError for any other text."""
        return cls.from_plain(parse_json(line))


_FIELD_NAMES = tuple(field.name for field in fields(StepRecord) if field.name != "extra")
_FIRST_OPTIONAL = _FIELD_NAMES.index("mfu_peak_tflops")
_REQUIRED = _FIELD_NAMES[:_FIRST_OPTIONAL]
_OPTIONAL = frozenset(_FIELD_NAMES[_FIRST_OPTIONAL:])
_MAY_BE_NULL = _OPTIONAL | {"mfu"}
_INTEGER_FIELDS = frozenset({"step", "tokens", "supervised_tokens", "examples"})
_NON_FINITE = ("NaN", "Infinity", "-Infinity")  # spelling of json.dumps, which float() can read


def read_records(path: str | Path) -> list[StepRecord]:
    """Return the records of all steps of a metrics.jsonl, except an incomplete last line.

    The last line is incomplete if the run is still writing or was killed. The values of step 0 are
    no record of a step, see `read_start_values`.

    Raise RunError with file:line if an earlier line cannot be read.
    """
    path = Path(path)
    records = []
    lines = read_bytes(path).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            values = parse_json(line)
            if not (isinstance(values, dict) and values.get("step") == 0):
                records.append(StepRecord.from_plain(values))
        except ValueError as error:
            if number < len(lines):
                raise RunError(
                    "a line of the metrics cannot be read",
                    where=f"{path}:{number}",
                    why=str(error),
                    fix="remove this line",
                ) from None
    return records


def read_start_values(path: Path) -> Values:
    """Return the values before the first step, which have the step 0 in metrics.jsonl, or an empty
    dict if there are none.
    """
    with contextlib.suppress(OSError, ValueError):
        with open_regular(path) as file:
            values = checked_values(parse_json(file.readline()))
        return values if values["step"] == 0 else {}
    return {}


def checked_values(row: object) -> Values:
    """Return the values of one parsed line. The run may have been made by any version.

    A name that is not a field may have any value. If the value is not a number, it is replaced by
    None. Fields other than `step` may be missing. Raise ValueError if the line is not a record.
    """
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError("a record must be a JSON object with the key `step`")
    values: Values = {}
    for name, value in row.items():
        # In the file, NaN and infinities are strings, because JSON has no such numbers.
        number = float(value) if value in _NON_FINITE else value
        # The JSON parser reads a float that is too large as infinity, and an int of any size.
        is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        is_wrong = not is_number and value not in _NON_FINITE
        if name in _INTEGER_FIELDS:
            is_wrong = not is_number or type(value) is not int or value < 0

        is_null = value is None and name in _MAY_BE_NULL
        if is_wrong and name in _FIELD_NAMES and not is_null:
            raise ValueError(f"{name} is {value!r:.40}, which is not a valid value of this field")
        values[name] = None if is_wrong else number
    return values


def newest_record(folder: Path) -> Values:
    """Return the last complete record of a run directory, or an empty dict if there is none.

    Only the end of metrics.jsonl is read.
    """
    return next(newest_records(folder), {})


def newest_records(folder: Path) -> Iterator[Values]:
    """Yield the complete records at the end of a run directory's metrics.jsonl, newest first."""
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
    """Remove all lines after `step` and all unreadable lines from a file of JSON lines, before a
    resumed run appends to it.

    Return the number of removed lines. The remaining lines are unchanged byte for byte. If the file
    does not exist, it is not created.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    remaining = []
    for line in lines:
        with contextlib.suppress(ValueError):
            line_step = checked_values(parse_json(line))["step"]
            assert line_step is not None  # `checked_values` refuses a line without a step
            # A line without a line break may be incomplete.
            if line.endswith(b"\n") and line_step <= step:
                remaining.append(line)
    # Replace the file atomically, so that a crash leaves either the old or the new file.
    if len(remaining) < len(lines):
        write_atomically(path, b"".join(remaining))
    return len(lines) - len(remaining)

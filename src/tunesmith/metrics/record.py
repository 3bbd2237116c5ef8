"""One record per step, and `metrics.jsonl`, the file of them: every other view of a run is made from it.

A record is one line of strict JSON. Floats are written by `repr`, so they read back bit for bit; NaN and the
infinities, which JSON lacks, become the strings "NaN", "Infinity" and "-Infinity". A killed process leaves at most a
partial last line.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Self

from tunesmith.errors import RunError
from tunesmith.host.files import write_atomically
from tunesmith.run_dir import (
    LARGEST,
    LARGEST_COUNT,
    METRICS,
    is_count,
    is_number,
    open_regular,
    parse_json,
    read_bytes,
)

TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last line


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimizer step did. Counts are those of the global batch, over all ranks."""

    step: int  # optimizer steps taken, this one included; the first step is 1
    epoch: float  # passes over the training rows, such as 1.25
    loss: float  # mean over the supervised tokens, measured before the step's update
    learning_rate: float  # of this step's update
    grad_norm: float  # L2 norm over all trained parameters before clipping, tied ones once
    tokens: int  # non-padding input tokens
    supervised_tokens: int  # positions whose label enters the loss
    examples: int
    step_seconds: float  # wall time of the whole step
    data_seconds: float  # the part of it spent waiting for data
    tokens_per_second: float  # `tokens / step_seconds`
    # Model FLOPs per second over the peak, from 0 to 1; None where no peak is known
    mfu: float | None
    memory_gib: float  # peak memory so far: allocated on the GPU, else resident in RAM
    mfu_peak_tflops: float | None = None  # the peak that `mfu` was taken against
    gpu_utilization: float | None = None  # percent, GPU only
    gpu_power_watts: float | None = None  # GPU only
    gpu_clock_mhz: float | None = None  # GPU only
    gpu_temperature_celsius: float | None = None  # GPU only
    host_memory_percent: float | None = None  # of this rank's host: 100 less the available share
    network_bytes_per_second: float | None = (
        None  # several ranks: sent and received by this rank's host
    )
    nvlink_bytes_per_second: float | None = (
        None  # several ranks: sent and received by this rank's GPU
    )
    product_tflops: float | None = (
        None  # of a short product on this rank's chip, where it was timed after this step
    )
    idle_share: float | None = (
        None  # several data ranks: share of their time without work, by micro batches' cost
    )
    val_loss: float | None = (
        None  # loss on the held-out rows, where it was measured after this step
    )
    # Further metrics of the method, by names that no field has. On disk they follow the other values.
    extra: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := [name for name in self.extra if name in self.__dataclass_fields__]:
            raise ValueError(f"{', '.join(taken)} in `extra`: the record has a field of that name")

    def values(self) -> dict[str, int | float | None]:
        """Name -> value in the order of the fields, then `extra`; an optional value that was not measured is left out."""
        named = {name: self.__dict__[name] for name in _NAMES}
        return {
            name: v for name, v in named.items() if v is not None or name not in _OPTIONAL
        } | dict(self.extra)

    def to_plain(self) -> dict[str, int | float | str | None]:
        """`values()` as strict JSON can hold them: non-finite floats are strings."""
        values = self.values().items()
        return {name: v if v is None or math.isfinite(v) else json.dumps(v) for name, v in values}

    def to_json(self) -> str:
        """One line of strict JSON, without the newline."""
        return json.dumps(self.to_plain(), allow_nan=False)

    @classmethod
    def from_plain(cls, values: Any) -> Self:
        """The record that `to_plain` made. Unknown names go to `extra` if their value is a number, else they are skipped.

        ValueError for a missing name; TypeError for what is no dict, or a value of another type.
        """
        if not isinstance(values, dict):
            raise TypeError("not a JSON object")
        if missing := [name for name in _NAMES if name not in values and name not in _OPTIONAL]:
            raise ValueError(f"no value for {', '.join(missing)}")
        known: dict[str, Any] = {}
        extra: dict[str, float] = {}
        for name, given in values.items():
            whole = name in _WHOLE
            value = float(given) if given in _NON_FINITE and not whole else given
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if right and not whole and isinstance(value, int) and not is_number(value):
                raise TypeError(f"{name} is a number that no float holds")
            if name not in cls.__dataclass_fields__:
                extra |= {name: value} if right else {}
            elif right or (value is None and name in _MAY_BE_NULL):
                known[name] = value if whole or value is None else float(value)
            else:
                raise TypeError(
                    f"{name} is {value!r}, which is no {'whole number' if whole else 'number'}"
                )
        return cls(**known, extra=extra)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read what `to_json` wrote; raises as `from_plain`, and ValueError for what is not JSON."""
        try:
            values = json.loads(line)
        except RecursionError:
            raise ValueError("it is too deeply nested") from None
        return cls.from_plain(values)


_NAMES = tuple(field.name for field in fields(StepRecord) if field.name != "extra")
_OPTIONAL = frozenset(_NAMES[_NAMES.index("memory_gib") + 1 :])
_MAY_BE_NULL = _OPTIONAL | {"mfu"}
_WHOLE = frozenset({"step", "tokens", "supervised_tokens", "examples"})
_NON_FINITE = ("NaN", "Infinity", "-Infinity")  # as both json.dumps and float() spell them


def read_records(path: str | Path) -> list[StepRecord]:
    """All records of a metrics.jsonl, without a partial last line (of a run that still writes, or was killed).

    RunError names an unreadable line before the last by file:line.
    """
    path, records = Path(path), []
    lines = read_bytes(path).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(StepRecord.from_json(line))
        except (ValueError, TypeError) as error:  # JSON and UTF-8 both raise ValueError
            if number < len(lines):
                what, where = "a line of the metrics cannot be read", f"{path}:{number}"
                raise RunError(what, where=where, why=str(error), fix="remove that line") from None
    return records


def checked_values(row: Any) -> dict[str, int | float | None]:
    """The numbers of one parsed line, for readers of a run of any version; ValueError for what is no record.

    A name that no field has may hold anything: what is no number becomes None. Fields other than `step` may be absent.
    """
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError("it is no JSON object with a step")
    values: dict[str, int | float | None] = {}
    for name, value in row.items():
        number = float(value) if isinstance(value, str) and value in _NON_FINITE else value
        if name in _WHOLE:
            fits = is_count(value)
        elif name in _NAMES:
            fits = _is_measured(number) or (value is None and name in _MAY_BE_NULL)
        else:
            fits = True
            number = number if _is_measured(number) else None
        if not fits:
            raise ValueError(
                f"{name} is {_brief(value)}, which is no {'count' if name in _WHOLE else 'number'}"
            )
        values[name] = number
    return values


def _is_measured(value: Any) -> bool:
    """A number of a record: NaN and the infinities too, which a diverged run has."""
    return is_number(value) or (isinstance(value, float) and not math.isfinite(value))


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def is_column(name: str, values: Sequence[Any]) -> bool:
    """Whether all values of one name are plain numbers in range, seen without looking at each in Python."""
    kinds = set(map(type, values))
    if name in _WHOLE:
        return kinds == {int} and min(values) >= 0 and max(values) <= LARGEST_COUNT
    if NoneType in kinds and (name in _MAY_BE_NULL or name not in _NAMES):
        kinds.remove(NoneType)
        values = [value for value in values if value is not None] or [0]
    return kinds <= {int, float} and min(values) >= -LARGEST and max(values) <= LARGEST


def newest_record(folder: Path) -> dict[str, int | float | None]:
    """The last whole record of a run directory's metrics.jsonl, read from the file's end alone; empty without one."""
    try:
        with open_regular(folder / METRICS) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                return checked_values(parse_json(line))
    return {}


def _step_of(line: bytes) -> int:
    return StepRecord.from_json(line).step


def cut_back(path: str | Path, step: int, step_of: Callable[[bytes], int] = _step_of) -> int:
    """Remove from a metrics.jsonl, in one move, the records after `step` and every unreadable line; return how many.

    Lines that stay are not changed by a byte. A missing file stays missing. `step_of` reads the step of a line.
    """
    path, kept = Path(path), []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if line.endswith(b"\n") and 0 <= step_of(line) <= step:
                kept.append(line)
    if len(kept) < len(lines):
        write_atomically(path, b"".join(kept))
    return len(lines) - len(kept)

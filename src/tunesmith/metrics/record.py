"""One record a step, and `metrics.jsonl`, the file of them: the truth that every other view of a run is made from.

A record is one line of strict JSON. Floats are written by `repr`, so they come back bit for bit; NaN and the
infinities, which JSON lacks, are written as the strings "NaN", "Infinity" and "-Infinity". A line is one `write`,
so a process that is killed can tear the last line only: `read` passes over it, `cut_back` removes it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimizer step did. Counts are those of the global batch, over all ranks.

    Attributes:
        step: optimizer steps taken, this one included; the first step is 1.
        epoch: passes over the training rows, such as 1.25.
        loss: mean over the supervised tokens, measured before the step's update.
        learning_rate: rate of this step's update.
        grad_norm: L2 norm over all trained parameters before clipping, tied ones once.
        tokens: non-padding input tokens.
        supervised_tokens: positions whose label enters the loss.
        examples: examples.
        step_seconds: wall time of the whole step.
        data_seconds: the part of it that was spent waiting for data.
        tokens_per_second: `tokens / step_seconds`.
        mfu: model FLOPs per second over the peak, from 0 to 1; None where no peak is known.
        memory_gib: peak memory so far: allocated on the GPU, else resident in RAM.
        mfu_peak_tflops: the peak that `mfu` was taken against.
        gpu_utilization: percent, GPU only.
        gpu_power_watts: GPU only.
        val_loss: loss on the held-out rows, where it was measured after this step.
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
    mfu_peak_tflops: float | None = None
    gpu_utilization: float | None = None
    gpu_power_watts: float | None = None
    val_loss: float | None = None

    def values(self) -> dict[str, int | float | None]:
        """Name -> value in the order of the fields; what is optional and was not measured is left out."""
        named = {name: self.__dict__[name] for name in _NAMES}
        return {name: value for name, value in named.items() if value is not None or name not in _OPTIONAL}

    def to_json(self) -> str:
        """One line of strict JSON, without the line's end."""
        return json.dumps({name: _plain(value) for name, value in self.values().items()}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        """Read what `to_json` wrote; names of later versions are passed over.

        Raises:
            ValueError: not JSON, or a name is missing.
            TypeError: not an object, or a value of another type.
        """
        values = json.loads(line)
        if not isinstance(values, dict):
            raise TypeError("not a JSON object")
        missing = [name for name in _NAMES if name not in values and name not in _OPTIONAL]
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}")
        return cls(**{name: _typed(name, values[name]) for name in _NAMES if name in values})


_NAMES = tuple(field.name for field in fields(StepRecord))
_OPTIONAL = frozenset(_NAMES[_NAMES.index("memory_gib") + 1 :])
_WHOLE = frozenset({"step", "tokens", "supervised_tokens", "examples"})
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: float | None) -> int | float | str | None:
    """A value as strict JSON can hold it."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _typed(name: str, value: Any) -> Any:
    """The value of a JSON field in its own type; ValueError where it has another."""
    if value is None and (name in _OPTIONAL or name == "mfu"):
        return None
    if isinstance(value, str) and value in _NON_FINITE and name not in _WHOLE:
        return _NON_FINITE[value]
    wanted = (int,) if name in _WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise TypeError(f"{name} is {value!r}, which is no {'whole number' if name in _WHOLE else 'number'}")
    return value if name in _WHOLE else float(value)


def read(path: str | Path) -> list[StepRecord]:
    """All whole records of a metrics.jsonl; a torn last line, of a run that still writes or was killed, is left out.

    Raises:
        RunError: an unreadable line before the last, named by file:line.
    """
    path, records = Path(path), []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(StepRecord.from_json(line.decode()))
        except (ValueError, TypeError) as error:  # ValueError is of JSON and of UTF-8 alike
            if number == len(lines):
                break
            raise RunError(
                "a line of the metrics cannot be read",
                where=f"{path}:{number}",
                why=str(error),
                fix="remove that line",
            ) from None
    return records


def cut_back(path: str | Path, step: int) -> int:
    """Cut a metrics.jsonl back to a checkpoint's step, for a run that goes on from there.

    Lines up to and including `step` stay byte for byte; later ones and unreadable ones go. The file is replaced in
    one move, so that a kill in between leaves the old or the new one. A missing file stays missing.

    Returns:
        How many lines were removed.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and 0 < _step_of(line) <= step]
    if len(kept) < len(lines):
        part = path.with_name(path.name + ".part")
        with part.open("wb") as out:
            out.writelines(kept)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    return len(lines) - len(kept)


def _step_of(line: bytes) -> int:
    """The step that a line records, or 0 where it cannot be read."""
    try:
        return StepRecord.from_json(line.decode()).step
    except (ValueError, TypeError):
        return 0

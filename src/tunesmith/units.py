"""Amounts with units, as recipes write them: lengths, sizes and shares.

A length is `200 steps`, `2 epochs`, `10 min` or `3 %`. A size is `64 examples`. A share is `5 %`.
Each of them is parsed from a text, and is converted back to a text with the same meaning. `Cadence`
checks whether an interval has passed. `format_seconds` formats a duration for a person.
"""

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any, ClassVar, Self

SECONDS_PER_UNIT = {"s": 1.0, "min": 60.0, "h": 3600.0}
# Minimum completed fraction of a run that is needed to estimate its end.
MIN_FRACTION = 1e-12
# Maximum amount in any unit. No run has so many steps, seconds or tokens per batch.
MAX_AMOUNT = 10**9

_ALIASES = {
    "step": "steps",
    "epoch": "epochs",
    "sec": "s",
    "second": "s",
    "seconds": "s",
    "minute": "min",
    "minutes": "min",
    "hour": "h",
    "hours": "h",
    "percent": "%",
    "example": "examples",
    "rows": "examples",
    "token": "tokens",
}
_NUMBER_PATTERN = r"[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_FORM = re.compile(rf"^\s*({_NUMBER_PATTERN})\s*([A-Za-z%]+)\s*$")


def ratio(amount: float, divisor: float) -> float:
    """Return `amount / divisor`, or 0 if the divisor is 0.

    For example, the time between two readings of a clock can be 0.
    """
    return amount / divisor if divisor else 0.0


def ceil_div(amount: int, divisor: int) -> int:
    """Return `amount / divisor`, rounded up."""
    return -(-amount // divisor)


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun: `1 row`, `2 rows`, `1,000 rows`. The plural gets an "s"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_seconds(seconds: float) -> str:
    """Format seconds for a person: `42 s`, `3:07 min`, `2:05 h`.

    The pages of `watch` and `report` use this format too.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600:,}:{whole % 3600 // 60:02d} h"


@dataclass(frozen=True)
class _Amount:
    units: ClassVar[tuple[str, ...]]
    example: ClassVar[str]
    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an amount and a unit. Raise ValueError, with the allowed units, if this fails."""
        match = _FORM.match(text)
        unit = ""
        if match is not None:
            unit = match[2].lower()
            unit = _ALIASES.get(unit, unit)
        if match is None or unit not in cls.units:
            listed = f"write a number and one of {', '.join(cls.units)}, such as '{cls.example}'"
            raise ValueError(f"{reprlib.repr(text)} is not a {cls.__name__.lower()}: {listed}")
        amount = float(match[1].replace("_", ""))
        if amount > MAX_AMOUNT:
            raise ValueError(f"{reprlib.repr(text)} is too large: at most {MAX_AMOUNT:,} {unit}")
        if unit in Size.units:
            if amount != int(amount) or amount < 1:
                raise ValueError(f"{text!r}: the number of {unit} must be a whole number above 0")
            return cls(int(amount), unit)
        if unit == "steps" and amount != int(amount):
            raise ValueError(f"{text!r}: the number of {unit} must be a whole number")
        return cls(amount, unit)

    def __str__(self) -> str:
        amount = int(self.amount)
        if amount == self.amount:
            return f"{amount} {self.unit}"
        return f"{self.amount!r} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Return the schema of a field of this type for pydantic. The field is a text that `parse`
        reads and `str` writes.
        """
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(
            cls.parse,
            core_schema.str_schema(),
            serialization=core_schema.to_string_ser_schema(),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """Return the JSON Schema for editors: a text that matches the pattern of an amount."""
        words = [*cls.units, *(alias for alias, unit in _ALIASES.items() if unit in cls.units)]
        return {"type": "string", "pattern": rf"^\s*{_NUMBER_PATTERN}\s*({'|'.join(words)})\s*$"}


@dataclass(frozen=True)
class Length(_Amount):
    """A duration or an interval of training.

    >>> Length.parse("3 %"), str(Length.parse("2h"))
    (Length(amount=3.0, unit='%'), '2 h')
    """

    units = ("steps", "epochs", "s", "min", "h", "%")
    example = "200 steps"

    @property
    def seconds(self) -> float | None:
        """The length in seconds, or None if its unit is not a unit of time."""
        if self.unit not in SECONDS_PER_UNIT:
            return None
        return self.amount * SECONDS_PER_UNIT[self.unit]

    def share(self, *, steps: float, epochs: float, seconds: float = 0.0) -> float | None:
        """Return which fraction of this length is completed, from 0 to 1.

        Return None if the fraction is too small to estimate the end, or if the unit is %.
        """
        whole = self.amount if self.seconds is None else self.seconds
        passed = {"steps": steps, "epochs": epochs, "%": 0.0}.get(self.unit, seconds)
        share = min(1.0, passed / whole) if whole > 0 else 0.0
        return share if share > MIN_FRACTION else None


@dataclass(frozen=True)
class Size(_Amount):
    """The size of one batch.

    >>> Size.parse("64 examples")
    Size(amount=64, unit='examples')
    """

    units = ("examples", "tokens")
    example = "64 examples"
    amount: int


@dataclass(frozen=True)
class Share(_Amount):
    """A part of the rows, in percent or as a number of examples.

    >>> Share.parse("5 %")
    Share(amount=5.0, unit='%')
    """

    units = ("%", "examples")
    example = "5 %"

    def of(self, rows: int) -> int:
        """Return this share of `rows` as a number of rows. A percentage is rounded up."""
        if self.unit != "%":
            return int(self.amount)
        # Subtract a small number, because a rounding error could make the quotient slightly larger
        # than an integer.
        return math.ceil(rows * self.amount / 100 - 1e-9)


class Cadence:
    """A check whether a repeated action, such as a validation, is due. `every` is the interval."""

    def __init__(
        self, every: Length | None, *, total: int | None, steps_per_epoch: int, seconds: float
    ) -> None:
        self.interval = 0  # steps
        self.period = None  # seconds
        self.last = seconds
        if every is None:
            return
        self.period = every.seconds
        if self.period is None:
            steps = {
                "steps": 1.0,
                "epochs": float(steps_per_epoch),
                "%": (total or steps_per_epoch) / 100,
            }
            self.interval = max(1, round(every.amount * steps[every.unit]))

    def due(self, step: int, seconds: float) -> bool:
        """Return whether the action is due after step `step`, when `seconds` of training are over.

        If the interval is a time and the action is due, the next interval starts at `seconds`.
        """
        if self.period is None:
            return self.interval > 0 and step % self.interval == 0
        if seconds - self.last < self.period:
            return False
        self.last = seconds
        return True

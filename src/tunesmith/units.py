"""The two grammars of a recipe: lengths (`200 steps`, `2 epochs`, `10 min`, `3 %`) and sizes (`64 examples`, `32768 tokens`).

Both are an amount and a unit, read from text and printed back in the same form. `Cadence` says when an interval of the
first kind has passed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LENGTH_UNITS = ("steps", "epochs", "s", "min", "h", "%")
SIZE_UNITS = ("examples", "tokens")
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}

_ALIASES = {
    "step": "steps", "epoch": "epochs", "sec": "s", "second": "s", "seconds": "s", "minute": "min", "minutes": "min",
    "hour": "h", "hours": "h", "percent": "%", "example": "examples", "rows": "examples", "token": "tokens",
}  # fmt: skip
_FORM = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]+)\s*$")


def _read(text: str, units: tuple[str, ...], kind: str, example: str) -> tuple[float, str]:
    found = _FORM.match(text)
    unit = _ALIASES.get(found[2].lower(), found[2].lower()) if found else ""
    if not found or unit not in units:
        raise ValueError(f"{text!r} is not a {kind}: write a number and one of {', '.join(units)}, such as {example}")
    amount = float(found[1].replace("_", ""))
    if not math.isfinite(amount):
        raise ValueError(f"{text!r} is not finite")
    return amount, unit


def _number(amount: float) -> str:
    return str(int(amount)) if amount == int(amount) else repr(amount)


@dataclass(frozen=True)
class Length:
    """How long something lasts or how often it comes.

    >>> Length.parse("3 %"), str(Length.parse("2h"))
    (Length(amount=3.0, unit='%'), '2 h')
    """

    amount: float
    unit: str  # one of LENGTH_UNITS

    @classmethod
    def parse(cls, text: str) -> Length:
        """Read `200 steps`, `1.5 epochs`, `10 min`, `3 %`; raise ValueError with the allowed units otherwise."""
        amount, unit = _read(text, LENGTH_UNITS, "length", "'200 steps'")
        if unit == "steps" and amount != int(amount):
            raise ValueError(f"{text!r}: steps are whole")
        return cls(amount, unit)

    def __str__(self) -> str:
        return f"{_number(self.amount)} {self.unit}"

    @property
    def seconds(self) -> float | None:
        """The length in seconds, or None where it is counted in steps, epochs or percent."""
        return self.amount * SECONDS[self.unit] if self.unit in SECONDS else None


@dataclass(frozen=True)
class Size:
    """How much one batch holds.

    >>> Size.parse("64 examples")
    Size(amount=64, unit='examples')
    """

    amount: int
    unit: str  # one of SIZE_UNITS

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `64 examples` or `32768 tokens`; raise ValueError with the allowed units otherwise."""
        amount, unit = _read(text, SIZE_UNITS, "size", "'64 examples'")
        if amount != int(amount) or amount < 1:
            raise ValueError(f"{text!r}: {unit} are whole and at least 1")
        return cls(int(amount), unit)

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"


class Cadence:
    """When something that comes `every` so often is due."""

    def __init__(self, every: Length | None, *, total: int | None, steps_per_epoch: int, seconds: float) -> None:
        self.interval, self.period, self.last = 0, None, seconds
        if every is None:
            return
        whole = {"steps": 1.0, "epochs": float(steps_per_epoch), "%": (total or steps_per_epoch) / 100}
        self.period = every.seconds
        if self.period is None:
            self.interval = max(1, round(every.amount * whole[every.unit]))

    def due(self, step: int, seconds: float) -> bool:
        """Whether it is due after `step`, `seconds` into the training; by the clock, counted from the last time."""
        if self.period is not None:
            due = seconds - self.last >= self.period
            self.last = seconds if due else self.last
            return due
        return self.interval > 0 and step % self.interval == 0

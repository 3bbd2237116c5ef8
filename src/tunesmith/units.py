"""The grammars of a recipe: lengths, sizes and shares.

`200 steps`, `2 epochs`, `10 min`, `3 %`; `64 examples`; `5 %`. Each is an amount and a unit, read
from text and printed back in the same form. `Cadence` tells when an interval has passed, and
`format_seconds` writes a duration for a person.
"""

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any, ClassVar, Self

SECONDS_PER_UNIT = {"s": 1.0, "min": 60.0, "h": 3600.0}
# A smaller share of a run says nothing about when it ends.
SMALLEST_SHARE = 1e-12
MOST = 10**9  # of any unit: more steps, tokens of a batch or seconds than anybody trains

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
    """`amount / divisor`; 0 where the divisor is 0.

    A clock that stood still between two looks measures no rate.
    """
    return amount / divisor if divisor else 0.0


def ceil_div(amount: int, divisor: int) -> int:
    """`amount / divisor`, rounded up."""
    return -(-amount // divisor)


def count_of(count: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,000 rows`: a count with its noun, whose plural ends with an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_seconds(seconds: float) -> str:
    """Seconds for a person: `42 s`, `3:07 min`, `2:05 h`.

    The pages of `watch` and `report` write them alike.
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
        """Read an amount and a unit; raise ValueError with the allowed units otherwise."""
        match = _FORM.match(text)
        unit = ""
        if match is not None:
            unit = match[2].lower()
            unit = _ALIASES.get(unit, unit)
        if match is None or unit not in cls.units:
            listed = f"write a number and one of {', '.join(cls.units)}, such as '{cls.example}'"
            raise ValueError(f"{reprlib.repr(text)} is not a {cls.__name__.lower()}: {listed}")
        amount = float(match[1].replace("_", ""))
        if amount > MOST:
            raise ValueError(f"{reprlib.repr(text)} is too large: at most {MOST:,} {unit}")
        if unit in Size.units:
            if amount != int(amount) or amount < 1:
                raise ValueError(f"{text!r}: {unit} must be a whole number of at least 1")
            return cls(int(amount), unit)
        if unit == "steps" and amount != int(amount):
            raise ValueError(f"{text!r}: {unit} must be a whole number")
        return cls(amount, unit)

    def __str__(self) -> str:
        amount = int(self.amount)
        if amount == self.amount:
            return f"{amount} {self.unit}"
        return f"{self.amount!r} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """In a recipe it is text."""
        from pydantic_core.core_schema import no_info_after_validator_function, str_schema

        return no_info_after_validator_function(cls.parse, str_schema())

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """Its grammar, for editors."""
        words = [*cls.units, *(alias for alias, unit in _ALIASES.items() if unit in cls.units)]
        return {"type": "string", "pattern": rf"^\s*{_NUMBER_PATTERN}\s*({'|'.join(words)})\s*$"}


@dataclass(frozen=True)
class Length(_Amount):
    """A length of training: how long something lasts or how often it comes.

    >>> Length.parse("3 %"), str(Length.parse("2h"))
    (Length(amount=3.0, unit='%'), '2 h')
    """

    units = ("steps", "epochs", "s", "min", "h", "%")
    example = "200 steps"

    @property
    def seconds(self) -> float | None:
        """The length in seconds, or None where it is counted in steps, epochs or percent."""
        if self.unit not in SECONDS_PER_UNIT:
            return None
        return self.amount * SECONDS_PER_UNIT[self.unit]

    def share(self, *, steps: float, epochs: float, seconds: float = 0.0) -> float | None:
        """The part of this length that has passed, from 0 to 1.

        None where it is too small to go by, and for a length in %.
        """
        whole = self.amount if self.seconds is None else self.seconds
        passed = {"steps": steps, "epochs": epochs, "%": 0.0}.get(self.unit, seconds)
        share = min(1.0, passed / whole) if whole > 0 else 0.0
        return share if share > SMALLEST_SHARE else None

    def in_words(self) -> str:
        """`1 epoch`, where a recipe has `1 epochs`."""
        is_one = self.amount == 1 and self.unit in ("steps", "epochs")
        return str(self).removesuffix("s") if is_one else str(self)


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
    """A part of the rows.

    >>> Share.parse("5 %")
    Share(amount=5.0, unit='%')
    """

    units = ("%", "examples")
    example = "5 %"

    def of(self, rows: int) -> int:
        """Count the rows of this share of `rows`; a percentage is rounded up."""
        if self.unit != "%":
            return int(self.amount)
        # A tiny bit is subtracted, as the division of floats may err upwards.
        return math.ceil(rows * self.amount / 100 - 1e-9)


class Cadence:
    """Tells when something that comes `every` so often is due."""

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
        """Tell whether it is due after `step`, `seconds` into the training.

        By the clock, counted from the last time.
        """
        if self.period is None:
            return self.interval > 0 and step % self.interval == 0
        if seconds - self.last < self.period:
            return False
        self.last = seconds
        return True

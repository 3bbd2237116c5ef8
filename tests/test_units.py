"""Lengths, sizes, and when an interval is due."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import refuses
from tunesmith.units import Cadence, Length, Share, Size, format_seconds


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("200 steps", 200, "steps"), ("1 epoch", 1, "epochs"), ("1.5 epochs", 1.5, "epochs"), ("10 min", 10, "min"),
        ("2h", 2, "h"), ("3 %", 3, "%"), ("3%", 3, "%"), ("90 seconds", 90, "s"), ("1_000 steps", 1000, "steps"),
    ],
)  # fmt: skip
def test_lengths(text: str, amount: float, unit: str) -> None:
    assert Length.parse(text) == Length(amount, unit)


NO_LENGTHS = ("", "steps", "200", "-3 steps", "2 weeks", "1.5 steps", "1e300 epochs", "nan h")
NO_SIZES = ("0 examples", "1.5 tokens", "64", "64 rowz", "1_000_000_001 tokens")


@pytest.mark.parametrize(
    ("kind", "text"),
    [*((Length, text) for text in NO_LENGTHS), *((Size, text) for text in NO_SIZES)],
)
def test_what_is_no_length_or_size(kind: type[Length] | type[Size], text: str) -> None:
    with refuses(ValueError, names=[repr(text)]):
        kind.parse(text)


@pytest.mark.parametrize(
    ("text", "rows", "count"),
    [("5 %", 312, 16), ("0.1 %", 10, 1), ("33.3 %", 1000, 333), ("50 examples", 312, 50)],
)
def test_shares(text: str, rows: int, count: int) -> None:
    assert Share.parse(text).of(rows) == count
    assert Share.parse(str(Share.parse(text))) == Share.parse(text)
    for wrong in ("5", "5 steps", "1.5 examples", "0 examples"):
        with pytest.raises(ValueError, match=r"share|whole"):
            Share.parse(wrong)


@given(st.floats(0.001, 1e9), st.sampled_from([u for u in Length.units if u != "steps"]))
def test_a_length_reads_back_what_it_prints(amount: float, unit: str) -> None:
    assert Length.parse(str(Length(amount, unit))) == Length(amount, unit)


@pytest.mark.parametrize(
    ("every", "total", "due"),
    [
        (Length(3, "steps"), 10, [3, 6, 9]), (Length(0.5, "epochs"), 10, [2, 4, 6, 8, 10]),
        (Length(50, "%"), 10, [5, 10]), (Length(1, "%"), 10, list(range(1, 11))), (None, 10, []),
    ],
)  # fmt: skip
def test_cadence_in_steps(every: Length | None, total: int | None, due: list[int]) -> None:
    cadence = Cadence(every, total=total, steps_per_epoch=4, seconds=0.0)
    assert [step for step in range(1, 11) if cadence.due(step, 0.0)] == due


def test_cadence_by_the_clock_counts_from_the_last_time() -> None:
    cadence = Cadence(Length(1, "min"), total=None, steps_per_epoch=4, seconds=100.0)
    due = [cadence.due(step, at) for step, at in enumerate([130.0, 161.0, 200.0, 221.0, 222.0])]
    assert due == [False, True, False, True, False]


def test_a_duration_for_a_person() -> None:
    for seconds, text in ((42.4, "42 s"), (59.6, "1:00 min"), (187, "3:07 min"), (7530, "2:05 h")):
        assert format_seconds(seconds) == text

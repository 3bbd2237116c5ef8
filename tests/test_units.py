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


@pytest.mark.parametrize(
    ("text", "share"),
    [("10 steps", 0.5), ("4 epochs", 0.25), ("1 min", 0.75), ("5 steps", 1.0), ("3 steps", 1.0)],
)
def test_the_share_of_a_length_that_has_passed(text: str, share: float) -> None:
    assert Length.parse(text).share(steps=5, epochs=1, seconds=45) == share
    assert Length.parse(text).share(steps=0, epochs=0) is None, "too small to go by"
    assert Length.parse("3 %").share(steps=5, epochs=1, seconds=45) is None


NO_LENGTHS = (
    "",
    "steps",
    "200",
    "-3 steps",
    "2 weeks",
    "1.5 steps",
    "1e999 steps",
    "1e300 epochs",
    "3 % %",
    "nan h",
)
NO_SIZES = (
    "0 examples",
    "1.5 tokens",
    "64",
    "64 rowz",
    "-1 tokens",
    "1e300 examples",
    "1_000_000_001 tokens",
)


@pytest.mark.parametrize(
    ("kind", "text"),
    [*((Length, text) for text in NO_LENGTHS), *((Size, text) for text in NO_SIZES)],
)
def test_what_is_no_length_or_size(kind: type[Length] | type[Size], text: str) -> None:
    with refuses(ValueError, names=[repr(text)]):
        kind.parse(text)


@pytest.mark.parametrize(
    ("text", "rows", "count"),
    [
        ("5 %", 312, 16),
        ("5%", 20, 1),
        ("0.1 %", 10, 1),
        ("33.3 %", 1000, 333),
        ("50 examples", 312, 50),
    ],
)
def test_shares(text: str, rows: int, count: int) -> None:
    assert Share.parse(text).of(rows) == count
    assert Share.parse(str(Share.parse(text))) == Share.parse(text)


@pytest.mark.parametrize("text", ["5", "5 steps", "1.5 examples", "0 examples"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match=r"share|whole"):
        Share.parse(text)


@given(st.floats(0.001, 1e9), st.sampled_from([u for u in Length.units if u != "steps"]))
def test_a_length_reads_back_what_it_prints(amount: float, unit: str) -> None:
    assert Length.parse(str(Length(amount, unit))) == Length(amount, unit)


@pytest.mark.parametrize(
    ("every", "total", "due"),
    [
        (Length(3, "steps"), 10, [3, 6, 9]),
        (Length(0.5, "epochs"), 10, [2, 4, 6, 8, 10]),
        (Length(50, "%"), 10, [5, 10]),
        (Length(50, "%"), None, [2, 4, 6, 8, 10]),
        (Length(1, "%"), 10, list(range(1, 11))),
        (None, 10, []),
    ],
)
def test_cadence_in_steps(every: Length | None, total: int | None, due: list[int]) -> None:
    cadence = Cadence(every, total=total, steps_per_epoch=4, seconds=0.0)
    assert [step for step in range(1, 11) if cadence.due(step, 0.0)] == due


def test_cadence_by_the_clock_counts_from_the_last_time() -> None:
    cadence = Cadence(Length(1, "min"), total=None, steps_per_epoch=4, seconds=100.0)
    assert [cadence.due(step, at) for step, at in enumerate([130.0, 161.0, 200.0, 221.0, 222.0])] == [
        False, True, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"), (42.4, "42 s"), (59.6, "1:00 min"), (187, "3:07 min"),
        (3599.6, "1:00 h"), (7530, "2:05 h"), (3_600_000, "1,000:00 h"),
    ],
)  # fmt: skip
def test_a_duration_for_a_person(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text

"""Progress without a terminal: one line at the end of each count, on stderr."""

from __future__ import annotations

import pytest

from errors import holds
from tunesmith.cli import options
from tunesmith.cli.options import ProgressCounter


def test_answers_say_tokens_a_second_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock: 20 rows and 3,000 tokens in 40 s, of a job that began with 10 rows done."""
    now = [100.0]
    monkeypatch.setattr(options.time, "monotonic", lambda: now[0])
    with ProgressCounter() as progress:
        progress("answers of tuned", 10, 90, 0)
        now[0] += 40
        progress("answers of tuned", 30, 90, 3000)
        now[0] += 1
        progress("answers of tuned", 90, 90, 4100)
    first, last = capsys.readouterr().err.splitlines()
    assert holds(first, "30/90", "0.5/s", "75 tokens/s", "2:00 min")
    assert holds(last, "90/90", "2.0/s", "100 tokens/s")
    assert "min" not in last

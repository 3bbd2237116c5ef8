"""Progress without a terminal: one line at the end of each count, on stderr, and none where nothing
was done.
"""

from __future__ import annotations

import re

import pytest

from tunesmith.cli.options import ProgressCounter


def test_each_count_ends_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressCounter() as progress:
        for done in range(4):
            progress("rows scored", done, 3)
        for done in range(2, 5):  # a resumed job starts at 2
            progress("answers", done, 9)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"rows scored: 3/3  [\d.]+/s\nanswers: 4/9  [\d.]+/s\n", err)


def test_nothing_done_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressCounter() as progress:
        progress("answers", 5, 9)
    assert capsys.readouterr().err == ""


def test_work_that_fails_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with ProgressCounter() as progress:
            progress("answers", 0, 9)
            progress("answers", 1, 9)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capsys.readouterr().err == ""

"""The fault that ends all ranks, as one of them keeps and reports it."""

from __future__ import annotations

from functools import partial

import pytest

from tunesmith.distributed.failure_report import FailureReport
from tunesmith.errors import EXIT_OK, EXIT_STOPPED, StoppedEarlyError

KILLED = {"what": "rank 1 on a was killed", "cause": "killed"}


def test_the_first_fault_stands_and_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    report = FailureReport()
    calls: list[tuple[str, int]] = []
    report.on_fault = lambda fault, step: calls.append((fault.what, step))
    report.decide(dict(KILLED), 3, reports=True, is_raised=False)
    report.decide({"what": "another"}, 4, reports=True, is_raised=False)
    assert calls == [(KILLED["what"], 3)]
    assert report.fault_event.is_set()
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_fault_that_is_raised_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    FailureReport().decide(dict(KILLED), 3, reports=True, is_raised=True)
    assert capsys.readouterr().err == ""


def test_a_stop_of_another_rank_ends_with_the_code_of_this_start() -> None:
    for code in (EXIT_STOPPED, EXIT_OK):
        report = FailureReport()
        report.stopped_code = partial(int, code)
        report.decide(KILLED | {"stopped": True}, 0, reports=False, is_raised=False)
        assert isinstance(report.fault, StoppedEarlyError)
        assert report.fault.exit_code == code

"""Reasons that are found in the output of a child process."""

from __future__ import annotations

import signal

from tunesmith.errors import RunError
from tunesmith.host.child_output import exit_text, last_line, reason_in


def test_the_last_line_that_says_something_is_found() -> None:
    assert last_line("first\n  full \n\n") == "full"
    assert last_line(" \n") == ""
    assert "hf_" not in last_line("token hf_" + "a" * 34)


def test_an_error_of_tunesmith_is_the_reason_wherever_it_is() -> None:
    block = RunError("no rows", where="rows.jsonl:1", fix="add rows").text()
    output = f"torchrun starts\n{block}\nW1128 torchrun: closing signal SIGTERM\n"
    assert reason_in(output) == block.removeprefix("error: ")
    assert reason_in("a\nKeyError: 'x'\n") == "KeyError: 'x'"


def test_the_end_of_a_process_is_named() -> None:
    assert exit_text(3).endswith("code 3")
    assert exit_text(-signal.SIGABRT).endswith("SIGABRT")
    assert "memory" in exit_text(-signal.SIGKILL)

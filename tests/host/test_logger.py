"""The package's lines on stderr: their text, who shows them, and that nothing of it stays."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator

import pytest

from tunesmith.cli.options import leave_lines_to_rank_0
from tunesmith.host.logger import (
    PACKAGE,
    default_level,
    lines_by_default,
    lines_on_stderr,
    logged_if_slow,
    stderr_only_from,
)

log = logging.getLogger("tunesmith.training.run")
data_log = logging.getLogger("tunesmith.data.tokens.cache")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _as_imported() -> Iterator[None]:
    """Importing the package sets nothing up, and no block leaves anything behind."""
    unset = ([], logging.NOTSET, True)
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == unset
    yield
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == unset


def test_a_line_is_shown_as_it_is(capsys: Capture) -> None:
    with lines_on_stderr():
        log.info("50% of 3 %s\n  and more")
        log.warning("the disk %s is %d %% full", "/a", 97)
        log.debug("never")
    log.info("after the block")
    assert capsys.readouterr() == (
        "",
        "50% of 3 %s\n  and more\nwarning: the disk /a is 97 % full\n",
    )


def test_stderr_is_the_one_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `survive_write_errors`, a progress bar or a notebook replaces it while a command runs."""
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", first)
    with lines_on_stderr():
        log.info("one")
        monkeypatch.setattr(sys, "stderr", second)
        log.info("two")
    assert (first.getvalue(), second.getvalue()) == ("one\n", "two\n")


def test_some_loggers_alone(capsys: Capture) -> None:
    with lines_on_stderr():
        with stderr_only_from("tunesmith.data"):
            log.info("hidden")
            data_log.warning("shown")
            logging.getLogger("tunesmith.database").info("hidden")
            with stderr_only_from("tunesmith.training"):
                log.info("hidden by the outer block")
                data_log.info("hidden by the inner block")
        log.info("shown again")
    assert capsys.readouterr().err == "warning: shown\nshown again\n"


def test_another_rank_leaves_lines_to_rank_0(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if name.endswith("SIZE") else "1")
    with lines_on_stderr():
        leave_lines_to_rank_0()
        log.info("of all ranks")
        data_log.warning("of this one")
    assert capsys.readouterr().err == "warning: of this one\n"


def test_a_function_within_a_command_shows_nothing_twice(capsys: Capture) -> None:
    with lines_on_stderr(), lines_by_default():
        log.info("one")
    with lines_by_default(), lines_by_default():
        log.info("two")
    assert capsys.readouterr().err == "one\ntwo\n"


def test_a_root_logger_at_warning_gets_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with default_level(logging.INFO):
        log.info("one")
    assert caplog.messages == []
    with caplog.at_level(logging.INFO), default_level(logging.INFO):
        log.info("two")
    assert caplog.messages == ["two"]


def test_a_block_says_what_it_does_only_if_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tunesmith.data")
    with caplog.at_level(logging.INFO, "tunesmith.data"):
        with logged_if_slow(log, "quick", 60.0):
            pass
        # The line comes within the block: it would wait here for ever.
        with logged_if_slow(log, "slow", 0.01):
            while not caplog.messages:
                time.sleep(0.01)
    assert caplog.messages == ["slow"]


def test_what_a_package_logs_cannot_control_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = logging.getLogger("transformers_of_a_test")
    handler = logging.StreamHandler(sys.stderr)
    package.addHandler(handler)
    try:
        with lines_on_stderr():
            package.warning("key %s\nand %d", "\x1b[31m\x07", 1)
            logging.getLogger("transformers_of_a_test.below").warning("\x9b")
        package.warning("\x1b")
    finally:
        package.removeHandler(handler)
    assert capsys.readouterr().err == "key \\x1b[31m\\x07\nand 1\n\\x9b\n\x1b\n"

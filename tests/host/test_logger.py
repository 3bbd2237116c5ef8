"""The package's lines on stderr: their text, who shows them, and that nothing of it stays."""

from __future__ import annotations

import logging
import sys

import pytest

from tunesmith.host.logger import PACKAGE, lines_on_stderr

log = logging.getLogger("tunesmith.training.run")
Capture = pytest.CaptureFixture[str]


def test_a_line_is_shown_as_it_is(capsys: Capture) -> None:
    with lines_on_stderr():
        log.info("50% of 3 %s\n  and more")
        log.warning("the disk %s is %d %% full", "/a", 97)
        log.debug("never")
    log.info("after the block")
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == ([], logging.NOTSET, True)
    assert capsys.readouterr() == (
        "",
        "50% of 3 %s\n  and more\nwarning: the disk /a is 97 % full\n",
    )


def test_what_a_package_logs_cannot_control_the_terminal(capsys):
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

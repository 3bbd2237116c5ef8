"""What reaches the standard streams: all bytes, lines as they are logged, and no control codes."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time

from tunesmith.cli.main import run_command
from tunesmith.errors import UsageError
from tunesmith.host.logger import PACKAGE, lines_on_stderr
from tunesmith.host.streams import LastingOutput
from tunesmith.metrics.log_file import LogFile

log = logging.getLogger("tunesmith.start.run")


def test_nothing_is_lost_where_a_non_blocking_reader_is_behind() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got: list[bytes] = []

    def read() -> None:
        time.sleep(0.2)
        while piece := os.read(reader, 65536):
            got.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    data = bytes(range(256)) * 4096
    with io.BufferedWriter(LastingOutput(writer, "w")) as file:
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])
    thread.join(10)
    os.close(reader)
    assert b"".join(got) == data


# A title of the window, a cleared screen, C1's form of the same, a line overwritten, text turned.
CONTROLS = "\x1b]0;title\x07 \x1b[2J \x9b2J \r \x00 \x7f \u202e \u2066"


def test_no_control_of_a_row_or_name_reaches_terminal_or_log(capsys, tmp_path):
    log_file = LogFile(tmp_path / "log.txt")
    log_file.open()

    def command() -> int:
        with log_file:
            logging.getLogger("tunesmith.rows").warning("a row: %s", CONTROLS)
            raise UsageError(CONTROLS, where=CONTROLS, why=CONTROLS, fix=CONTROLS)

    assert run_command(command, process=False) == 2
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_bytes().decode()):
        assert text.count("\\x1b]0;title\\x07") == 5
        assert not {*text} & {*CONTROLS} - {*" ]0;title[2J"}


def test_a_line_is_shown_as_it_is(capsys):
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

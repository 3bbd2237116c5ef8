"""Standard streams of other kinds than a terminal's: unbuffered, and non-blocking."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.cli.main import run_command
from tunesmith.errors import UsageError
from tunesmith.host.streams import (
    DEFAULT_COLUMNS,
    LastingOutput,
    folded,
    is_terminal,
    visible,
    width_of,
)
from tunesmith.metrics.log_file import LogFile


def test_python_u_stays_unbuffered() -> None:
    made = "import sys, time; from tunesmith.host.streams import survive_write_errors; s = survive_write_errors(sys.stdout)"
    code = f"{made}; print('now', file=s); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    reader = threading.Timer(30, process.kill)
    reader.start()
    try:
        assert process.stdout.readline() == b"now\n"
        assert process.poll() is None
    finally:
        reader.cancel()
        process.kill()
        process.wait()


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


def test_lines_are_folded_between_words_and_what_is_copied_is_not() -> None:
    path = "/data/" + "a-folder/" * 12
    command = "tunesmith train runs/a/config.yaml train.seed=43 output_dir=runs/a-seed-43"
    settings = "train.duration=\"4 epochs\" train.global_batch='1 examples'"
    text = (
        f"written to {path}; to see more of it: {command}; or with {settings} on {'a word ' * 20}"
    )
    first, *lines = folded(f"short\n  {text}", 60).splitlines()
    assert first == "short"
    assert {line[:4] for line in lines[1:]} == {"    "}
    assert " ".join(" ".join(lines).split()) == text.strip()
    for piece in (path, command, settings):
        assert sum(piece in line for line in lines) == 1
    assert max(len(line) for line in lines if not (path in line or command in line)) <= 64
    comment = "# or --to vllm, gguf"
    assert folded(f"  {command}   {comment}", 80).splitlines() == [f"  {command}", f"    {comment}"]


def test_a_fix_is_folded_only_between_its_clauses() -> None:
    command = "iconv -f latin1 -t utf-8 'the rows of my data set.csv' > fixed.csv"
    clauses = [f"  fix: {command};", "or use another file, which is already UTF-8 text"]
    lines = folded(" ".join(clauses), 60, indent=4, between_clauses=True).splitlines()
    assert lines == [clauses[0], f"    {clauses[1]}"]


def test_the_width_is_that_of_a_pipe_or_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    assert width_of(io.StringIO()) == DEFAULT_COLUMNS
    monkeypatch.setenv("COLUMNS", "80")
    assert width_of(io.StringIO()) == 80
    assert not is_terminal(io.StringIO())


# A title of the window, a cleared screen, C1's form of the same, a line overwritten, text turned.
CONTROLS = "\x1b]0;title\x07 \x1b[2J \x9b2J \r \x00 \x7f \u202e \u2066"


def test_only_controls_are_shown_as_escapes() -> None:
    shown = visible(f"a\tb\n{CONTROLS} é 東京 \U0001f600")
    assert shown.startswith("a\tb\n\\x1b]0;title\\x07 \\x1b[2J \\x9b2J \\r")
    assert shown.endswith("\\u202e \\u2066 é 東京 \U0001f600")


def test_no_control_of_a_row_or_name_reaches_terminal_or_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By what is logged, and by each part of an error."""
    log_file = LogFile(tmp_path / "log.txt")
    log_file.open()

    def command() -> int:
        with log_file:
            logging.getLogger("tunesmith.data").warning("a row: %s", CONTROLS)
            raise UsageError(CONTROLS, where=CONTROLS, why=CONTROLS, fix=CONTROLS)

    assert run_command(command, process=False) == 2
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_bytes().decode()):
        assert text.count("\\x1b]0;title\\x07") == 5
        assert not {*text} & {*CONTROLS} - {*" ]0;title[2J"}

"""Standard streams that are closed, full or unread, and signals before there is anything to save."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cli.bad_world import World, steps_of
from errors import check_shown, holds, is_internal
from tunesmith.cli.main import main
from tunesmith.errors import EXIT_STOPPED
from waiting import TIME
from warm import CLOSED, Warm, take_terminal

pytestmark = pytest.mark.slow

SHORT = ["--max-new-tokens", "4", "--device", "cpu"]


# Words and redirections -> the exit code, and whether an error names standard output
STREAMS = {
    "recipes <&- >&-": (0, False),
    "recipes > /dev/full": (2, True),
    "recipes list --json | true": (141, False),
    "train nothing.yaml 2>&-": (2, False),
}


@pytest.mark.parametrize("text", STREAMS)
def test_streams_of_a_shell(text: str) -> None:
    code, says = STREAMS[text]
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -m tunesmith {text}', sys.executable],
        capture_output=True, text=True, check=False, timeout=TIME,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert not is_internal(done.stderr)
    assert "Exception ignored" not in done.stderr
    assert says == bool(done.stderr)
    if says:
        check_shown(done.stderr, where="standard output", cause="disk")


@pytest.mark.parametrize("name", ["no reader", "full", "closed"])
def test_a_run_does_not_need_its_readers(name: str, world: World) -> None:
    """It trains to its end, and its files hold what was shown."""
    words = world.train("train.duration=3 steps")
    out = CLOSED
    if name == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    elif name == "no reader":
        reader, out = os.pipe()
        os.close(reader)
    process = Warm(words, streams=[None, out, out])
    if out != CLOSED:
        os.close(out)
    assert process.wait() == 0
    assert steps_of(world.out) == [1, 2, 3]
    assert holds((world.out / "log.txt").read_text(), "step 3/3")


def test_a_run_whose_terminal_goes_away_ends_with_all_saved(world: World) -> None:
    words = world.train("train.duration=60 steps", checkpoint={"every": "30 steps"})
    terminal, own = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    process = Warm(words, env=env, streams=[own] * 3, prepare=take_terminal)
    os.close(own)
    seen = b""
    while b"/60" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait() == EXIT_STOPPED
    assert 0 < len(steps_of(world.out)) < 60
    assert not (world.out / "failure.json").exists()


# Rows on stdin for `generate` and `chat` -> the exit code and the place that is told
STDIN: dict[str, tuple[str, bytes | None, int, str]] = {
    "a torn row": ("generate", b'{"prompt": "a"}\n[1]\n', 2, "stdin:2"),
    "bytes that are no text, in a chat": ("chat", b"a\ncaf\xe9\n", 2, "stdin:2"),
    "closed": ("generate", None, 2, "stdin"),
}


@pytest.mark.parametrize("name", STDIN)
def test_bad_rows_on_stdin(
    name: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, rows, code, where = STDIN[name]
    # None is what Python makes of `<&-`.
    stdin = None
    if rows is not None:
        stdin = io.TextIOWrapper(io.BytesIO(rows), errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    words = [] if verb == "chat" else ["--input", "-", "--output", "-"]
    assert main([verb, str(trained), *words, *SHORT]) == code
    out, err = capsys.readouterr()
    assert verb == "chat" or out == ""
    if code:
        check_shown(err, where=where)

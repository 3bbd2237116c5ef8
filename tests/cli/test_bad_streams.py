"""Standard streams that are closed, full or unread, and signals before there is anything to save."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.bad_world import World, steps_of
from errors import check_shown, holds, is_internal
from recipes import write_rows
from tunesmith.cli.main import main
from tunesmith.errors import EXIT_STOPPED
from waiting import TIME
from warm import CLOSED, Warm, run_warm, take_terminal

pytestmark = pytest.mark.slow

SHORT = ["--max-new-tokens", "4", "--device", "cpu"]


def assert_quiet(err: str) -> None:
    assert not is_internal(err)
    assert "Exception ignored" not in err


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
    assert_quiet(done.stderr)
    assert says == bool(done.stderr)
    if says:
        check_shown(done.stderr, where="standard output", cause="disk")


def test_a_reader_that_is_gone_ends_a_command_that_computes(world: World) -> None:
    config = str(world.begun() / "config.yaml")
    reader, writer = os.pipe()
    os.close(reader)
    process = Warm(["data", config], streams=[None, writer, None])
    os.close(writer)
    _, err = process.communicate()
    assert process.wait() == 141, err
    assert_quiet(err)


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


def under_nohup() -> None:
    take_terminal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("ignored", [pytest.param(True, marks=pytest.mark.nightly), False])
def test_a_terminal_that_goes_away(ignored: bool, world: World) -> None:
    """A closed pane ends the run with all saved; under nohup it trains on, bar and all."""
    words = world.train("train.duration=60 steps", checkpoint={"every": "30 steps"})
    terminal, own = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    prepare = under_nohup if ignored else take_terminal
    process = Warm(words, env=env, streams=[own] * 3, prepare=prepare)
    os.close(own)
    seen = b""
    while b"/60" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait() == (0 if ignored else EXIT_STOPPED)
    steps = len(steps_of(world.out))
    assert steps == 60 if ignored else 0 < steps < 60
    assert not (world.out / "failure.json").exists()


class SignalAtImport:
    """A finder that sends this process SIGTERM when the last of the libraries is looked for."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == LAST_IMPORT:
            os.kill(os.getpid(), signal.SIGTERM)


LAST_IMPORT = "tunesmith.training.run"


def signal_at_import() -> None:
    sys.modules.pop(LAST_IMPORT, None)
    sys.meta_path.insert(0, SignalAtImport())  # type: ignore[arg-type]


def test_a_stop_while_libraries_are_loaded(world: World) -> None:
    done = run_warm(world.train(), prepare=signal_at_import)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert holds(done.stderr.splitlines()[0], "SIGTERM"), "nothing is printed before it"
    assert not world.out.exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("seconds", "number"),
    [(0.5, signal.SIGINT), (1.0, signal.SIGTERM), (3.0, signal.SIGTERM), (5.0, signal.SIGINT)],
)
def test_a_signal_before_the_first_step_ends_at_once(
    seconds: float, number: signal.Signals, smollm2: Path, tmp_path: Path
) -> None:
    """Whatever is done then: imports, rows, weights, the first step."""
    write_rows(tmp_path / "rows.jsonl", 40)
    words = ["train", "--model", str(smollm2), "--data", "rows.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *words], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(number)
    out, _ = process.communicate(timeout=TIME)
    # Before the command has begun the signal itself is its end.
    assert process.returncode in (EXIT_STOPPED, 130, -number), out
    assert "Traceback" not in out
    assert not [*tmp_path.glob("runs/*/checkpoint-*")]


@pytest.mark.nightly
def test_a_library_that_holds_the_main_thread_does_not_hold_the_end() -> None:
    """The main thread takes a minute that no exception ends; the test waits for half of it."""
    program = """
import time
from tunesmith.host.signals import STOP_PATIENCE_SECONDS, StopRequest
stop = StopRequest()
stop.patience = STOP_PATIENCE_SECONDS
with stop:
    for _ in range(2):
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED
    assert "SIGTERM" in err
    assert "Traceback" not in err


# Rows on stdin for `generate` and `chat` -> the exit code and the place that is told
STDIN: dict[str, tuple[str, bytes | None, int, str]] = {
    "a torn row": ("generate", b'{"prompt": "a"}\n[1]\n', 2, "stdin:2"),
    "bytes that are no text": ("generate", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', 2, "stdin:2"),
    "bytes that are no text, in a chat": ("chat", b"a\ncaf\xe9\n", 2, "stdin:2"),
    "closed": ("generate", None, 2, "stdin"),
    "closed, in a chat": ("chat", None, 0, ""),
}  # fmt: skip


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


def test_answers_on_a_terminal_control_nothing(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1's 0x9b begins a command as escape and bracket do, and JSON holds it as it is."""
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a \x9b2J \u202e é"}\n'))
    terminal, own = pty.openpty()
    with open(own, "w", encoding="utf-8") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(["generate", str(trained), "--input", "-", "--output", "-", *SHORT]) == 0
    seen = os.read(terminal, 4096).decode()
    os.close(terminal)
    assert seen.startswith('{"prompt": "a \\x9b2J \\u202e é"')
    assert not {*seen} & {"\x9b", "\u202e"}

"""Standard streams that are closed, full or unread, and interrupts before there is anything to
save.
"""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.bad_world import World, records, snapshot, told
from errors import holds, is_internal, lines_with
from recipes import write_rows
from tunesmith.cli.main import main
from tunesmith.host.signals import SIGNAL_NAMES
from waiting import TIME
from warm import CLOSED, Warm, run_warm, take_terminal

pytestmark = [pytest.mark.slow, pytest.mark.long]

SHORT = ["--max-new-tokens", "4", "--device", "cpu"]


def shell(text: str, world: World) -> subprocess.CompletedProcess[str]:
    """A command line of `tunesmith` with a shell's redirections."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -m tunesmith {text}', sys.executable],
        env=os.environ | world.env, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def assert_quiet(err: str) -> None:
    assert not is_internal(err)
    assert "Exception ignored" not in err


# command, redirections, exit code, a part of stderr
STREAMS: dict[str, tuple[str, str, int, str]] = {
    "stdin and stdout closed": ("recipes", "<&- >&-", 0, ""),
    "stdout full": ("recipes", "> /dev/full", 2, "the disk is full\n  where: standard output\n"),
    "no reader": ("recipes list --json", "| true", 141, ""),
    "an error, stderr closed": ("train nothing.yaml", "2>&-", 2, ""),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name: str, world: World) -> None:
    """Of a shell, as Python itself starts with them."""
    text, redirected, code, said = STREAMS[name]
    before = snapshot(world.folder)
    done = shell(f"{text} {redirected}", world)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert_quiet(done.stderr)
    assert done.stdout == ""
    assert snapshot(world.folder) == before


@pytest.mark.parametrize("name", ["train of a finished run, stdin closed", "data, no reader"])
def test_streams_of_what_computes(name: str, world: World) -> None:
    config = str(world.begun() / "config.yaml")
    before = snapshot(world.folder)
    if name == "data, no reader":
        reader, writer = os.pipe()
        os.close(reader)
        process = Warm(["data", config], streams=[None, writer, None])
        os.close(writer)
    else:
        process = Warm(["train", config, "train.duration=4 steps"], streams=[CLOSED, CLOSED, None])
    _, err = process.communicate()
    assert process.wait() == (141 if name == "data, no reader" else 0), err
    assert_quiet(err)
    assert snapshot(world.folder) == before


@pytest.mark.parametrize("name", ["both to head", "both full", "both closed"])
def test_a_run_does_not_need_its_readers(name: str, world: World) -> None:
    """It trains to its end, and its files hold what was shown."""
    words = world.train("train.duration=12 steps", checkpoint={"every": "10 steps"})
    if name == "both closed":
        assert Warm(words, streams=[None, CLOSED, CLOSED]).wait() == 0
    else:
        reader, full = (
            os.pipe() if name == "both to head" else (None, os.open("/dev/full", os.O_WRONLY))
        )
        process = Warm(words, streams=[None, full, full])
        os.close(full)
        if reader is not None:  # it reads a line and ends
            os.read(reader, 10)
            os.close(reader)
        assert process.wait() == 0
    assert [r["step"] for r in records(world.out)] == list(range(1, 13))
    assert "step 12/12" in (world.out / "log.txt").read_text()


def under_nohup() -> None:
    take_terminal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("ignored", [True, False])
def test_a_terminal_that_goes_away(ignored: bool, world: World) -> None:
    """A closed pane ends the run with all saved; under nohup it trains on, bar and all."""
    words = world.train("train.duration=60 steps", checkpoint={"every": "30 steps"})
    terminal, own = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    process = Warm(
        words, env=env, streams=[own] * 3, prepare=under_nohup if ignored else take_terminal
    )
    os.close(own)
    seen = b""
    while b"/60" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait() == (0 if ignored else 75)
    steps = len(list(records(world.out)))
    assert steps == 60 if ignored else 0 < steps < 60
    assert not (world.out / "failure.json").exists()


def assert_stopped(code: int | None, err: str, name: str, world: World) -> None:
    assert code == 75, err
    assert holds(err.splitlines()[0], name), "nothing is printed before it, such as a traceback"
    assert not world.out.exists()


def test_an_interrupt_while_torch_is_imported(world: World) -> None:
    """Python has a handler of its own for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *world.train()],
        env=os.environ | world.env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIME)
    assert "Traceback" not in err
    assert_stopped(process.returncode, err[err.index("stopped by") :], "SIGINT", world)


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
    assert_stopped(done.returncode, done.stderr, "SIGTERM", world)


def test_a_signal_while_the_interpreter_ends_changes_no_exit_code() -> None:
    slow_end = "import atexit, sys, time; atexit.register(lambda: (print('end', flush=True), time.sleep(2)))"
    code = f"{slow_end}; from tunesmith.cli.main import main; sys.argv[1:] = ['--version']; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "end" not in process.stdout.readline():
        pass
    for name in SIGNAL_NAMES:
        process.send_signal(signal.Signals[name])
    assert process.wait(TIME) == 0


@pytest.mark.parametrize(
    ("rows", "where"), [("{'a': 1}\n", "stdin:1"), ('{"prompt": "a"}\n[1]\n', "stdin:2")]
)
def test_bad_rows_on_stdin(
    rows: str,
    where: str,
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(rows))
    run = world.begun()
    capsys.readouterr()
    assert main(["generate", str(run), "--input", "-", "--output", "-", *SHORT]) == 2
    out, err = capsys.readouterr()
    assert (out, told(err)["where"]) == ("", where)
    assert told(err)["fix"]


def test_answers_on_a_terminal_control_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1's 0x9b begins a command as escape and bracket do, and JSON holds it as it is."""
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a \x9b2J \u202e é"}\n'))
    run = world.begun()
    terminal, own = pty.openpty()
    with open(own, "w", encoding="utf-8") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(["generate", str(run), "--input", "-", "--output", "-", *SHORT]) == 0
    seen = os.read(terminal, 4096).decode()
    os.close(terminal)
    assert seen.startswith('{"prompt": "a \\x9b2J \\u202e é"')
    assert not {*seen} & {"\x9b", "\u202e"}


@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_bytes_that_are_no_text_on_stdin(
    verb: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows before are no reason to stay silent; chat has answered the first line by then."""
    junk = io.TextIOWrapper(
        io.BytesIO(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n'), errors="surrogateescape"
    )
    monkeypatch.setattr(sys, "stdin", junk)
    run = str(world.begun())
    assert (
        main([verb, run, *([] if verb == "chat" else ["--input", "-", "--output", "-"]), *SHORT])
        == 2
    )
    parts = told(capsys.readouterr().err)
    assert "UTF-8" in parts["error"]
    assert parts["where"] == "stdin:2"
    assert "iconv" in parts["fix"]


@pytest.mark.parametrize(("verb", "code"), [("chat", 0), ("generate", 2)])
def test_a_closed_stdin_holds_no_lines(
    verb: str,
    code: int,
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of `<&-`
    run = str(world.begun())
    assert (
        main([verb, run, *([] if verb == "chat" else ["--input", "-", "--output", "-"]), *SHORT])
        == code
    )
    assert code == 0 or holds(told(capsys.readouterr().err)["error"], "stdin")


def test_an_interrupt_while_rows_become_tokens(world: World) -> None:
    """Nothing is learnt yet: exit 75, no run directory, no half of a cache."""
    cache = world.folder / "cache"
    write_rows(world.folder / "train.jsonl", 9_000)
    words = world.train()
    before = snapshot(world.folder)
    process = Warm(words, env=os.environ | {"TUNESMITH_CACHE": str(cache)})
    try:
        deadline = time.monotonic() + TIME
        while (
            not list(cache.glob("tokens/.*/entry/ids.bin"))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIME)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert lines_with(err, "SIGINT")
    assert "Traceback" not in err
    small = {"tokenizers", "configs"}  # of the model; they are whole too
    files = [p for p in cache.rglob("*") if p.is_file() and not small & set(p.parts)]
    # Comparing the rows had ended: what it found is there, and whole.
    assert [p.parent.name for p in files] == ["row-checks"]
    assert json.loads(files[0].read_text())
    assert {k: v for k, v in snapshot(world.folder).items() if not k.startswith("cache")} == before

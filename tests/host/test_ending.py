"""The end of a process: modules stay in place once torch is loaded, and a parent names the reason."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tunesmith.errors import RunError
from tunesmith.host.child_output import exit_text, last_line, reason_in

PROGRAM = """
import atexit, sys, threading, time, types
from tunesmith.host.ending import run_and_exit

class Kept:
    def __del__(self):
        print("module")

sys.modules["torch"] = types.ModuleType("torch")
kept = Kept()

def command():
    atexit.register(print, "handler")
    def write():
        time.sleep(0.2)
        print("thread")
    threading.Thread(target=write).start()
    print("command", end=" ")
    return 75

run_and_exit(command)
"""


@pytest.mark.parametrize(
    ("change", "code", "shown", "error"),
    [
        (("", ""), 75, "command thread handler", ""),
        (('sys.modules["torch"] =', "unused ="), 75, "command thread handler module", ""),
        (("return 75", "raise ValueError('why')"), 1, "command thread handler module", "ValueError: why"),
    ],
    ids=["modules stay", "without torch", "a command that raises"],
)  # fmt: skip
def test_threads_and_handlers_end_first(change, code, shown, error):
    words = [sys.executable, "-c", PROGRAM.replace(*change, 1)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (code, shown.split())
    assert "".join(done.stderr.splitlines()[-1:]) == error


def test_the_reason_is_found_in_the_output_of_a_process() -> None:
    assert last_line("first\n  full \n\n") == "full"
    assert last_line(" \n") == ""
    assert "hf_" not in last_line("token hf_" + "a" * 34)
    block = RunError("no rows", where="rows.jsonl:1", fix="add rows").text()
    output = f"torchrun starts\n{block}\nW1128 torchrun: closing signal SIGTERM\n"
    assert reason_in(output) == block.removeprefix("error: ")
    assert reason_in("a\nKeyError: 'x'\n") == "KeyError: 'x'"
    assert exit_text(3).endswith("code 3")
    assert exit_text(-signal.SIGABRT).endswith("SIGABRT")
    assert "memory" in exit_text(-signal.SIGKILL)

"""The end of a command's process, which leaves modules in place once torch is loaded."""

import subprocess
import sys

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


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_threads_and_handlers_end_first_and_modules_stay():
    done = run(PROGRAM)
    assert done.stdout.split() == ["command", "thread", "handler"]
    assert (done.returncode, done.stderr) == (75, "")


def test_without_torch_python_ends_as_ever():
    done = run(PROGRAM.replace('sys.modules["torch"] =', "unused ="))
    assert done.stdout.split() == ["command", "thread", "handler", "module"]
    assert done.returncode == 75


def test_a_command_that_raises_ends_as_ever():
    done = run(PROGRAM.replace("return 75", "raise ValueError('why')"))
    assert done.stdout.endswith("module\n")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: why\n")

"""A process that is forked from a warm one gives what one of its own gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from warm import Warm, run_warm

pytestmark = pytest.mark.slow
PROGRAM = """
import os, sys
print(sys.argv[1:], os.environ["TUNE"], sorted(os.environ)[:2], os.getcwd(), sys.stdin.read())
print("on stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
WAITING = "import time; print('begun', flush=True); time.sleep(100)"
COMPARE = """
import sys
sys.path[:0] = {paths!r}
from warm import run_warm
if __name__ == "__main__":
    done = run_warm({words!r}, env={env!r}, cwd={cwd!r}, program={program!r})
    print(repr((done.returncode, done.stdout, done.stderr)))
"""


def test_words_environment_folder_streams_and_exit_code(tmp_path: Path) -> None:
    # Without a locale Python sets LC_CTYPE as it starts.
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TUNE": "a b"}
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    own = subprocess.run(
        [sys.executable, script, "3", "x"],
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    warm = run_warm(["3", "x"], env=env, cwd=tmp_path, program=script)
    assert (warm.returncode, warm.stdout, warm.stderr) == (own.returncode, own.stdout, own.stderr)
    assert own.returncode == 3


def test_a_signal_ends_it_as_it_ends_any_process() -> None:
    process = Warm([], program=WAITING)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_the_switch_starts_an_interpreter_for_each(tmp_path: Path) -> None:
    """Only there is torch not loaded before the program asks for it."""
    program = "import sys; print('torch' in sys.modules)"
    paths = [str(Path(__file__).parent), *sys.path]
    code = COMPARE.format(
        paths=paths, words=[], env=dict(os.environ), cwd=tmp_path.as_posix(), program=program
    )
    script = tmp_path / "compare.py"
    script.write_text(code)
    shown = {}
    for switch in ("0", "1"):
        env = os.environ | {"TUNESMITH_TESTS_FORK": switch}
        shown[switch] = subprocess.check_output([sys.executable, script], env=env, text=True)
    assert shown == {"0": "(0, 'False\\n', '')\n", "1": "(0, 'True\\n', '')\n"}

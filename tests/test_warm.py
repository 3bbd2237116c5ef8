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


def test_words_environment_folder_streams_and_exit_code(tmp_path: Path) -> None:
    # Without a locale Python sets LC_CTYPE as it starts.
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TUNE": "a b"}
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    own = subprocess.run(
        [sys.executable, script, "3", "x"], env=env, cwd=tmp_path, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    warm = run_warm(["3", "x"], env=env, cwd=tmp_path, program=script)
    assert (warm.returncode, warm.stdout, warm.stderr) == (own.returncode, own.stdout, own.stderr)
    assert own.returncode == 3


def test_a_signal_ends_it_as_it_ends_any_process() -> None:
    process = Warm([], program=WAITING)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

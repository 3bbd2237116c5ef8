"""Scripts of this folder, which use Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def output_of(script: str, **variables: str) -> str:
    """What a script prints, in a process of its own: Triton reads its variables once. Skips where Triton is missing."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    command = [sys.executable, Path(__file__).parent / script]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

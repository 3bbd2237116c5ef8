"""Wait for what another process does."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from warm import Warm

TIME = 240  # seconds, for ranks that load torch on a busy machine


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str] | Warm | None = None
) -> None:
    """Return when the condition holds; fail after TIME seconds, or where the process has ended."""
    deadline = time.monotonic() + TIME
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)

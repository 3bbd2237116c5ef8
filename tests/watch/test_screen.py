"""The same in the terminal."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from textual.widgets import TabbedContent

from time_limit import time_limit
from tunesmith.watch.feed import WatchedRun
from tunesmith.watch.screen import WatchScreen
from watching import TIME, add_steps, write_run


def test_curves_samples_recipe_and_log(tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", 80, of=100, ranks=2)
    screen = WatchScreen([WatchedRun(slow), WatchedRun(write_run(tmp_path / "fast", 80, rate=5e-4))])

    async def use() -> None:
        async with screen.run_test(size=(120, 50)) as pilot:
            shown = lambda: screen.export_screenshot().replace("&#160;", " ")  # noqa: E731
            assert "step 80 of 100" in shown()
            assert "Loss" in shown()
            assert "Speed (tokens/s)" in shown()
            await pilot.press("n")
            assert "Speed (tokens/s)" not in shown()
            assert "GPU power (W)" in shown()
            await pilot.press("p", "x", "z")
            assert "tokens" in shown()
            add_steps(slow, 81, 90)
            while "step 90 of 100" not in shown():
                await pilot.pause(0.1)
            texts = {"samples": "the order names two lamps", "recipe": "train.learning_rate", "log": "3 rows were cut"}
            for tab, words in texts.items():
                screen.query_one(TabbedContent).active = tab
                await pilot.pause()
                assert words in shown()
            await pilot.press("q")

    asyncio.run(asyncio.wait_for(use(), TIME))


@pytest.mark.parametrize("end", [b"q", b"\x03", signal.SIGHUP])
def test_it_gives_the_terminal_back(tmp_path: Path, end: bytes | signal.Signals) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    before = termios.tcgetattr(terminal)
    command = [sys.executable, "-m", "tunesmith", "watch", str(write_run(tmp_path / "run", 5)), "--terminal"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True)
    seen, asked = b"", False
    with time_limit(TIME):
        while process.poll() is None or select.select([controller], [], [], 0)[0]:
            if select.select([controller], [], [], 0.1)[0]:
                seen += os.read(controller, 65536)
            if b"Loss" in seen and not asked:
                asked = True
                os.write(controller, end) if isinstance(end, bytes) else process.send_signal(end)
    after = termios.tcgetattr(terminal)
    os.close(controller)
    os.close(terminal)
    assert process.returncode == 0
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h")  # the screen before is back
    assert after == before
    assert b"Traceback" not in seen

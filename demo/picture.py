"""`make picture`: the README's first run in a terminal of 80 columns, and what it shows at the end
as docs/run.svg; a minute and a half on two quiet cores, which also have time for sample answers.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import shutil
import struct
import sys
import tempfile
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 80, 100
ROWS = "demo/faq.csv"
WORDS = ["tunesmith", "train", "--model", "demo", "--data", ROWS]


def screen_of(words: list[str], folder: Path) -> pyte.Screen:
    """Run a command in a terminal of its own, in `folder` -> the screen at its end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
        os.environ.pop("NO_COLOR", None)
        os.execv(sys.executable, [sys.executable, "-m", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux's way of telling that the other side has closed
            break
        if not data:
            break
        stream.feed(data)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print("\n".join(screen.display).rstrip(), file=sys.stderr)
        sys.exit(code)
    return screen


def colour(name: str) -> str | None:
    """A pyte colour in rich's words."""
    name = {"default": "", "brown": "yellow"}.get(name, name)
    name = name.replace("bright", "bright_")
    return (
        f"#{name}"
        if len(name) == 6 and all(c in "0123456789abcdef" for c in name)
        else name or None
    )


def text_of(screen: pyte.Screen) -> Text:
    """The used lines of a screen, with their colours."""
    text = Text(f"$ {' '.join(WORDS)}\n", style="bold")
    used = len("\n".join(screen.display).rstrip().splitlines())
    for y in range(used):
        cells = [screen.buffer[y][x] for x in range(COLUMNS)]
        for (name, bold), same in itertools.groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            text.append("".join(cell.data for cell in same), Style(color=colour(name), bold=bold))
        text.append("\n")
    return text


def main() -> None:
    """The demo's rows into an empty folder -> train -> docs/run.svg."""
    root = Path(__file__).parents[1]
    picture = root / "docs/run.svg"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ROWS).parent.mkdir()
        shutil.copy(root / ROWS, folder / ROWS)
        screen = screen_of(WORDS, folder)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(text_of(screen), end="")
    console.save_svg(str(picture), title="tunesmith")
    print(f"{picture}: {len(screen.display)} lines at most, {COLUMNS} columns")


if __name__ == "__main__":
    main()

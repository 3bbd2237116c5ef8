"""Run the README's first example and draw lines of its output as docs/run.svg (`make picture`).

This takes one and a half minutes on two idle cores.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 104
MAX_LINES = 14
ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/run.svg"
ROWS = "demo/faq.csv"
WORDS = ["tunesmith", "train", "--model", "demo", "--data", ROWS]
# Prefixes of the lines that the picture shows, in the order of the output.
SHOWN = (
    "faq.csv: ",
    "recipe: ",
    "train: ",
    "model: ",
    "val_loss ",
    "prompt ",
    "  before ",
    "  after ",
)


def shown_lines(output: str) -> list[str]:
    """Return the lines of a run's output that begin with a prefix in SHOWN, cut to COLUMNS."""
    lines = [line for line in output.splitlines() if line.startswith(SHOWN)]
    return [line if len(line) <= COLUMNS else f"{line[: COLUMNS - 1]}…" for line in lines]


def check_answers(lines: list[str]) -> None:
    """Raise ValueError if there are fewer than two answers, or if an answer is not in the rows."""
    with (ROOT / ROWS).open(encoding="utf-8") as file:
        expected = [row["answer"] for row in csv.DictReader(file)]
    after = [line.removeprefix("  after ").strip() for line in lines if line.startswith("  after ")]
    if len(after) < 2:
        raise ValueError(
            "the run printed no sample answers: run `make picture` again on an idle machine"
        )
    for answer in after:
        if not any(row.startswith(answer.removesuffix("…")) for row in expected):
            raise ValueError(f"an answer is not in the rows, run `make picture` again: {answer}")


def main() -> None:
    """Train on the demo's rows in an empty folder and write docs/run.svg."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ROWS).parent.mkdir()
        shutil.copy(ROOT / ROWS, folder / ROWS)
        command = [sys.executable, "-m", *WORDS]
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"COLUMNS": "1000"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
        )
    if done.returncode:
        sys.exit(done.stdout)
    lines = shown_lines(done.stdout)
    check_answers(lines)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    text = Text(f"$ {' '.join(WORDS)}\n", style="bold")
    for line in lines:
        style = (
            "green"
            if line.startswith("  after ")
            else "dim"
            if line.startswith("  before ")
            else ""
        )
        text.append(f"{line}\n", style=style)
    console.print(text, end="")
    console.save_svg(str(PICTURE), title="tunesmith")
    print(f"{PICTURE}: {1 + len(lines)} lines")


if __name__ == "__main__":
    main()

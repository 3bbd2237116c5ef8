"""Blocks of a page in docs/ that a benchmark writes, between two comments that name it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

END = "<!-- The end of what it writes. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def write_or_check(usage: str | None, script: str, make: Callable[[], str]) -> int:
    """The command line `--write FILE` or `--check FILE` of `script`, whose block in the page is
    `make()`.

    Returns the exit status: 1 where a checked page differs, 2, with `usage`, for other words.
    """
    if len(sys.argv) != 3 or sys.argv[1] not in ("--write", "--check"):
        print(usage, file=sys.stderr)
        return 2
    page, begin = Path(sys.argv[2]), f"<!-- Written by: python {script} --write {sys.argv[2]} -->\n"
    old = page.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    if not found:
        print(f"{page} has no line {begin}", file=sys.stderr)
        return 1
    new = before + begin + make() + END + rest.partition(END)[2]
    if sys.argv[1] == "--write":
        page.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{page} differs; run: python {script} --write {page}", file=sys.stderr)
        return 1
    return 0

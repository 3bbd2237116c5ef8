"""Generated blocks of Markdown pages. A script writes or checks the text between two comments.

The first comment has the command that writes the block, and the second comment marks its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

END = "<!-- The end of what it writes. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def write_or_check(usage: str | None, script: str, make: Callable[[], str]) -> int:
    """Run the command line `--write FILE` or `--check FILE` of a script.

    Return the exit status. It is 1 if the page has no block of this script, or if --check finds a
    different block. For any other command line, print `usage` and return 2.

    Args:
        usage: the script's help text.
        script: the script's path, which the first comment of the block contains.
        make: returns the text of the block.
    """
    if len(sys.argv) != 3 or sys.argv[1] not in ("--write", "--check"):
        print(usage, file=sys.stderr)
        return 2
    page, begin = Path(sys.argv[2]), f"<!-- Written by: python {script} --write {sys.argv[2]} -->\n"
    old = page.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    if not found:
        print(f"{page} has no block of this script; add this line: {begin}", file=sys.stderr)
        return 1
    new = before + begin + make() + END + rest.partition(END)[2]
    if sys.argv[1] == "--write":
        page.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{page} is out of date; run: python {script} --write {page}", file=sys.stderr)
        return 1
    return 0

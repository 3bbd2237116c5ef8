"""Serve the page of `report` to this machine only, and keep it up to date.

example:
  tunesmith watch runs/my-run  # prints the URL to open; ctrl-C stops it
  tunesmith watch runs/rank-16 runs/rank-64  # side by side
  tunesmith watch runs/rates  # the runs of a sweep

Finished runs can be watched too.
"""

import argparse
import re
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word

# `host:runs/x` as scp reads it; no host begins with a dash, which ssh would take for an option.
_REMOTE_RUN = re.compile(r"((?!-)[\w.@%\[\]-]+):(.+)", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "run directories, folders of them, or jobs of `tunesmith status`"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=what)
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    port = "serve the page there (default: a free port)"
    parser.add_argument("--port", type=_port, default=None, help=port)


def _port(text: str) -> int:
    """Return the port of a number; 0 is any free one. Raise ArgumentTypeError for other text."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: a number of 0 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> None:
    _check_local(args)
    from tunesmith.tools.report.run_watch import watch

    watch(args)


def _check_local(args: argparse.Namespace) -> None:
    """Raise UsageError for a run of another host, with the commands that show it."""
    for word in args.runs:
        match = _REMOTE_RUN.fullmatch(word)
        if match is None or Path(word).exists():
            continue
        host = match[1]
        # A login begins in the home directory, and a quoted ~ would not be expanded there.
        run_there = match[2].removeprefix("~/")
        raise UsageError(
            "the run is on another host",
            where=f"command line: {word}",
            why="the page is served on the run's host; use ssh port forwarding",
            fix=f"ssh {shell_word(host)}, and there: tunesmith watch {shell_path(run_there)}, "
            "which prints an address with a PORT; then here, before opening it: "
            f"ssh -N -L PORT:127.0.0.1:PORT {shell_word(host)}",
        )

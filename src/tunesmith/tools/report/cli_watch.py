"""Serve the page of `report` on this machine and keep it up to date.

example:
  tunesmith watch runs/my-run  # prints the URL to open; ctrl-C stops it
  tunesmith watch runs/rank-16 runs/rank-64  # side by side
  tunesmith watch runs/rates  # the runs of a sweep

The page can only be opened on this machine. Finished runs can be watched too.
For a run on another host, start `watch` on that host: it prints the ssh command
that makes the page reachable from your machine.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directories, folders with runs, or job names from `tunesmith status`",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--port", type=_port, default=None, help="port of the page (default: a free port)"
    )


def _port(text: str) -> int:
    """Convert a text to a port number. 0 means any free port.

    Raise ArgumentTypeError if the text is not a number from 0 to 65535.
    """
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: use a number from 0 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> None:
    from tunesmith.tools.report.run_watch import watch

    watch(args)

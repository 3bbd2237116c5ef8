"""Serve the page of `report` to this machine only, and keep it up to date.

example:
  tunesmith watch runs/my-run  # prints the URL to open; ctrl-C stops it
  tunesmith watch runs/rank-16 runs/rank-64  # side by side
  tunesmith watch runs/rates  # the runs of a sweep

Finished runs can be watched too. For a run on another host start `watch` there:
it prints the ssh command that makes the page reachable from here.
"""

import argparse


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
    from tunesmith.tools.report.run_watch import watch

    watch(args)

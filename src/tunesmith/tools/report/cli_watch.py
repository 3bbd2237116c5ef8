"""Watch runs on a live web page, served to this machine only.

example:
  tunesmith watch runs/my-run  # prints the URL to open; ctrl-C stops it
  tunesmith watch runs/rank-16 runs/rank-64  # side by side
  tunesmith watch runs  # a list of all runs in a folder, or of a sweep

Finished runs can be watched too.
"""

import argparse
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.cli.options import add_json, notify, report_unreadable
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word

# `host:runs/x` as scp reads it; no host begins with a dash, which ssh would take for an option.
_REMOTE_RUN = re.compile(r"((?!-)[\w.@%\[\]-]+):(.+)", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "run directories, folders of them, or jobs of `tunesmith status`"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=what)
    output = parser.add_mutually_exclusive_group()
    add_json(output)
    browser = "open the page in a browser"
    output.add_argument("--open", action="store_true", help=browser)
    port = "serve the page there (default: a free port)"
    parser.add_argument("--port", type=_port, default=None, help=port)


def _port(text: str) -> int:
    """A port by its number; 0 is a free one. ArgumentTypeError for what is none."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: a number of 0 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> None:
    if args.json and args.port is not None:
        what = "--port is of the page, which --json does not serve"
        raise UsageError(what, where="command line: --port", fix="remove one of them")
    _check_local(args)
    from tunesmith.launch.jobs import holds_runs, run_folders
    from tunesmith.reader.run_files import RunFiles, to_json
    from tunesmith.tools.report.run_list import RunList
    from tunesmith.tools.report.waiting import open_run

    folders = [Path(word) for word in args.runs]
    is_list = all(map(holds_runs, folders))
    with suppress(KeyboardInterrupt), _ended_by_signals():
        if is_list and not args.json:
            from tunesmith.tools.report.server import ListPage, serve_page

            show = partial(_print_address, browser=args.open)
            serve_page(ListPage(RunList(folders)), show, port=args.port or 0)
            return
        if is_list:
            paths = [path for folder in folders for path in run_folders(folder)]
            # One after the other: the records of all of them might not fit.
            print(to_json({"runs": [RunFiles(path).status() for path in paths]}))
            return
        runs = []
        unreadable: list[UsageError] = []
        for word in args.runs:
            try:
                runs.append(open_run(word, wait=not args.json))
            except UsageError as error:
                unreadable.append(error)
        report_unreadable(unreadable, shown=len(runs))
        if args.json:
            print(to_json({"runs": [run.status() for run in runs]}))
        else:
            from tunesmith.tools.report.server import Page, serve_page

            serve_page(Page(runs), partial(_print_address, browser=args.open), port=args.port or 0)


def _check_local(args: argparse.Namespace) -> None:
    """UsageError for a run of another host, with the commands that show it."""
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


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A closed terminal and SIGTERM end the command as ctrl-C does: without a traceback, with 0."""
    handlers = {
        signal.SIGTERM: signal.default_int_handler,
        # The server takes SIGTERM for itself, but not SIGHUP.
        signal.SIGHUP: lambda *_: signal.raise_signal(signal.SIGTERM),
    }
    previous: dict[signal.Signals, Any] = {}
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print_address(address: str, *, browser: bool) -> None:
    """Print where the page is, and over ssh how to reach it from the user's own machine."""
    print(f"watching: {address}", flush=True)
    print("reachable from this machine only, with this URL; ctrl-C stops it", flush=True)
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if connection:
        port = address.split(":")[2].partition("/")[0]
        login = f"{os.environ.get('USER', 'root')}@{connection[2]}"
        command = f"ssh -N -L {port}:127.0.0.1:{port} {shell_word(login)}"
        notify(f"on your own machine first: {command}")
    if browser:
        import webbrowser

        webbrowser.open(address)

"""The work of `watch`: the page of runs or a list of them, served until a signal ends it."""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tunesmith.cli.options import notify, report_unreadable
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.launch.jobs import holds_runs, with_runs_of_folders
from tunesmith.reader.run_files import RunFiles, to_json
from tunesmith.tools.report.run_list import RunList
from tunesmith.tools.report.server import ListPage, Page, serve_page
from tunesmith.tools.report.waiting import open_run


def watch(args: argparse.Namespace) -> None:
    """Serve the page of the runs that the options of `watch` name, until it is stopped."""
    folders = [Path(word) for word in args.runs]
    with suppress(KeyboardInterrupt), _ended_by_signals():
        if args.json:
            print(to_json({"runs": [run.status() for run in _opened(args)]}))
            return
        is_list = all(map(holds_runs, folders))
        page = ListPage(RunList(folders)) if is_list else Page([*_opened(args)])
        serve_page(page, partial(_print_address, browser=args.open), port=args.port or 0)


def _opened(args: argparse.Namespace) -> Iterator[RunFiles]:
    """Open the runs one after the other, as the records of all might not fit; then report those
    that cannot be read."""
    unreadable: list[UsageError] = []
    shown = 0
    for word in with_runs_of_folders(args.runs):
        try:
            run = open_run(word, wait=not args.json)
        except UsageError as error:
            unreadable.append(error)
        else:
            shown += 1
            yield run
    report_unreadable(unreadable, shown=shown)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A closed terminal and SIGTERM end the command as ctrl-C does: without a traceback, with 0."""
    hangup = signal.getsignal(signal.SIGHUP)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The server takes SIGTERM for itself, but not SIGHUP, which nohup has ignored.
    if hangup != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGHUP, hangup)


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

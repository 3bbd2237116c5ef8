"""Implementation of the command `watch`: serve the page about runs until a signal ends it."""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tunesmith.cli.options import notify
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.launch.job import holds_run
from tunesmith.launch.jobs import find_job
from tunesmith.tools.report.run_files import RunFiles
from tunesmith.tools.report.run_report import read_runs
from tunesmith.tools.report.server import serve_page


def watch(args: argparse.Namespace) -> None:
    """Serve the page about the runs that the command line names, until the command is stopped."""
    with suppress(KeyboardInterrupt), _ended_by_signals():
        runs = read_runs(args.runs, open_run)
        serve_page(runs, partial(_print_address, browser=args.open), port=args.port or 0)


def open_run(word: str) -> RunFiles:
    """Open a run. `word` is the path of the run directory or the name of a job.

    Raise UsageError if the run of the job has not started yet.
    """
    if holds_run(Path(word)):
        return RunFiles(word)
    job = find_job(word)
    if not holds_run(Path(job.run_dir)):
        raise UsageError(
            f"{job.name} has not started yet",
            where=job.run_dir,
            why=job.state().text,
            fix=f"check the job with tunesmith status {shell_word(job.name)}",
        )
    return RunFiles(job.run_dir)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End the command with exit code 0 on ctrl-C, on SIGTERM, and if the terminal is closed."""
    hangup = signal.getsignal(signal.SIGHUP)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The server does not handle SIGHUP, so convert it to SIGTERM. Keep ignoring SIGHUP if the
    # command was started with `nohup`.
    if hangup != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGHUP, hangup)


def _print_address(address: str, *, browser: bool) -> None:
    """Print the URL of the page, and for an ssh session the command that forwards its port.

    Args:
        browser: also open the page in a browser.
    """
    print(f"watching: {address}")
    print("only a browser on this machine can open this URL; ctrl-C stops the server", flush=True)
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if connection:
        port = address.split(":")[2].partition("/")[0]
        login = f"{os.environ.get('USER', 'root')}@{connection[2]}"
        command = f"ssh -N -L {port}:127.0.0.1:{port} {shell_word(login)}"
        notify(
            "to open the page in a browser on your own machine, first run this command on "
            f"that machine: {command}"
        )
    if browser:
        import webbrowser

        webbrowser.open(address)

"""Watch runs as they go, on a page that only this machine reaches; finished runs too, and several to compare.

examples:
  tunesmith watch runs/my-run                       # prints an address to open in a browser; ctrl-C ends it
  tunesmith watch runs/rank-16 runs/rank-64         # side by side
  tunesmith watch spark-b:runs/my-run               # of another host, over ssh: it needs python3 alone
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from tunesmith.cli.options import tell_left_out
from tunesmith.errors import UsageError
from tunesmith.shell import shell_word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "run directories, jobs of `tunesmith status`, or HOST:RUN"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=what)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print where the runs stand, as one JSON object, and end")
    shown.add_argument("--open", action="store_true", help="open the page in the browser of this desktop")
    parser.add_argument("--terminal", action="store_true", help=argparse.SUPPRESS)  # removed


def run(args: argparse.Namespace) -> None:
    if args.terminal:
        words = shlex.join(args.runs)
        fix = f"the page: tunesmith watch {words}; in the terminal: tunesmith logs -f {shell_word(args.runs[0])}"
        raise UsageError("--terminal was removed", where="command line: tunesmith watch", fix=fix)
    from tunesmith.watch.feed import open_run, to_json

    with suppress(KeyboardInterrupt), _ended_by_signals(), ExitStack() as opened:
        say = None if args.json else partial(print, file=sys.stderr, flush=True)
        runs = []
        left_out: list[UsageError] = []
        for word in args.runs:
            try:
                runs.append(opened.enter_context(open_run(word, say)))
            except UsageError as error:
                left_out.append(error)
        tell_left_out(left_out, shown=len(runs))
        if args.json:
            print(to_json({"runs": [run.status() for run in runs]}))
        else:
            from tunesmith.watch.server import serve_page

            serve_page(runs, lambda address: _tell(address, browser=args.open))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A closed terminal and SIGTERM end the command as ctrl-C does, so that connections and copies are cleared away."""
    handlers = {
        signal.SIGTERM: signal.default_int_handler,
        signal.SIGHUP: lambda *_: signal.raise_signal(signal.SIGTERM),  # which the server takes for itself
    }
    before = {n: signal.signal(n, h) for n, h in handlers.items() if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(address: str, *, browser: bool) -> None:
    """Say where the page is, and over ssh how to reach it from the user's own machine."""
    print(f"watching: {address}\nonly this machine reaches it, with this address; ctrl-C ends it", flush=True)
    if connection := os.environ.get("SSH_CONNECTION", "").split():
        port = address.split(":")[2].partition("/")[0]
        there = f"{os.environ.get('USER', 'root')}@{connection[2]}"
        print(f"on your own machine first: ssh -N -L {port}:127.0.0.1:{port} {there}", file=sys.stderr)
    if browser:
        import webbrowser

        webbrowser.open(address)

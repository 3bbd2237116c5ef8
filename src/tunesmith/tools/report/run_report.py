"""Implementation of the command `report`: write the page and print the state of each run."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tunesmith.cli.options import report_unreadable
from tunesmith.errors import UsageError
from tunesmith.host.streams import show
from tunesmith.launch.jobs import with_runs_of_folders
from tunesmith.tools.report.run_files import RunFiles, eval_command, label_apart


def read_runs(words: Sequence[str], read: Callable[[str], RunFiles] = RunFiles) -> list[RunFiles]:
    """Read the runs that the command line names. Print a message for each unreadable run.

    Raise UsageError if no run can be read.

    Args:
        words: run directories or folders with runs.
        read: the function that reads one run.
    """
    runs = []
    unreadable = []
    for word in with_runs_of_folders(words):
        # If a folder is not a run, print a message and continue with the other folders.
        try:
            runs.append(read(word))
        except UsageError as error:
            unreadable.append(error)
    report_unreadable(unreadable, shown=len(runs))
    label_apart(runs)
    return runs


def write_page(args: argparse.Namespace) -> None:
    """Write the page about the runs that the command line names. Print their states."""
    # Import inside the function: `watch` imports this module but does not need numpy at its start.
    from tunesmith.tools.report.comparison import comparison_values
    from tunesmith.tools.report.page import write_report

    output = Path(args.output or "report.html")
    runs = read_runs(args.runs)
    # With --json, write the page only if --output is given, because scripts usually need only the
    # JSON.
    if args.output or not args.json:
        write_report(runs, output)
    for run in runs:
        for file in run.damaged:
            show(f"damaged: {run.label}: {file}", sys.stderr)
    if args.json:
        print(json.dumps(comparison_values(runs), indent=2))
        return
    for run in runs:
        best = f", {run.best_text}" if run.best_text else ""
        show(f"{run.label}: {run.described_state}{best}", sys.stdout)
    if len(runs) > 1:
        show(f"which run is better: {eval_command(runs)}", sys.stdout)
    print(f"{output}: {output.stat().st_size / 1024:.0f} KiB, open it in a browser")

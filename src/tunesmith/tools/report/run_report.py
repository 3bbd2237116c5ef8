"""The work of `report`: the page, and which run is better."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tunesmith.cli.options import report_unreadable
from tunesmith.errors import UsageError
from tunesmith.host.streams import show
from tunesmith.launch.jobs import with_runs_of_folders
from tunesmith.reader.run_files import RunFiles, label_apart


def read_runs(words: Sequence[str], read: Callable[[str], RunFiles] = RunFiles) -> list[RunFiles]:
    """Read the runs of the command line, and report those that cannot be read.

    Raise UsageError if no run can be read.
    """
    runs = []
    unreadable: list[UsageError] = []
    for word in with_runs_of_folders(words):
        # One folder that is not a run must not hide the others.
        try:
            runs.append(read(word))
        except UsageError as error:
            unreadable.append(error)
    report_unreadable(unreadable, shown=len(runs))
    label_apart(runs)
    return runs


def write_page(args: argparse.Namespace) -> None:
    """Write the page of the runs that the options of `report` name, and print the verdict."""
    # The comparison loads numpy, which `watch` does without until its page is opened.
    from tunesmith.reader.compare import judge
    from tunesmith.reader.page import write_report
    from tunesmith.tools.report.comparison import comparison_values

    output = Path(args.output or "report.html")
    runs = read_runs(args.runs)
    # A script that reads the JSON needs no page, unless it names one.
    if args.output or not args.json:
        write_report(runs, output)
    for run in runs:
        for file in run.damaged:
            show(f"damaged: {run.label}: {file}", sys.stderr)
    verdict = judge(runs)
    if args.json:
        print(json.dumps(comparison_values(runs, verdict), indent=2))
        return
    verdict_lines = [verdict.headline, *(f"  {reason}" for reason in verdict.reasons)]
    show("\n".join(verdict_lines), sys.stdout)
    print(f"{output}: {output.stat().st_size / 1024:.0f} KiB, open it in a browser")

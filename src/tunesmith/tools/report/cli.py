"""Compare runs on one page: which is better and why, curves, speed, answers.

example:
  tunesmith report runs/my-run
  tunesmith report runs/lr-1e-4 runs/lr-1e-3 --output comparison.html
  tunesmith report runs/rates  # a sweep, or all runs of a folder
  tunesmith report runs/* --markdown  # for a pull request or a wiki
  tunesmith report runs/lr-* --json  # figures and verdict, for scripts

The page is one file that opens offline, with the commands to reproduce the
runs. Runs may be running, finished, failed or copied. After `tunesmith eval
RUN RUN` the runs are compared row by row.
"""

import argparse
import json
import sys
from pathlib import Path

from tunesmith.cli.options import add_json, report_unreadable
from tunesmith.errors import UsageError
from tunesmith.host.streams import show
from tunesmith.run_dir import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories, or folders of them"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the page (default: report.html, or report.md)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="write Markdown instead of HTML")
    add_json(form)


def run(args: argparse.Namespace) -> None:
    from tunesmith.launch.jobs import with_runs_of_folders
    from tunesmith.reader.compare import judge
    from tunesmith.reader.page import write_report
    from tunesmith.reader.run_files import RunFiles, label_apart
    from tunesmith.tools.report.comparison import comparison_values

    output = Path(args.output or ("report.md" if args.markdown else "report.html"))
    runs = []
    unreadable: list[UsageError] = []
    for folder in with_runs_of_folders(args.runs):
        # One folder that is no run must not hide the others.
        try:
            runs.append(RunFiles(folder))
        except UsageError as error:
            unreadable.append(error)
    report_unreadable(unreadable, shown=len(runs))
    note = ""
    if unreadable:
        reasons = "; ".join(f"{error.where}: {error.what}" for error in unreadable)
        note = f"Skipped: {reasons}"
    # A script that reads the JSON needs no page, unless it names one.
    if args.output or not args.json:
        write_report(runs, output, markdown=args.markdown, note=shown(note))
    label_apart(runs)
    for run in runs:
        for file in run.damaged:
            show(f"damaged: {run.label}: {file}", sys.stderr)
    verdict = judge(runs)
    if args.json:
        print(json.dumps(comparison_values(runs, verdict), indent=2))
        return
    verdict_lines = [verdict.headline, *(f"  {reason}" for reason in verdict.reasons)]
    show("\n".join(verdict_lines), sys.stdout)
    if args.markdown:
        print(output)
    else:
        print(f"{output}: {output.stat().st_size / 1024:.0f} KiB, open it in a browser")

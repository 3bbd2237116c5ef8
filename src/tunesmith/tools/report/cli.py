"""Write one page about runs: curves, answers and speed.

example:
  tunesmith report runs/my-run
  tunesmith report runs/lr-1e-4 runs/lr-1e-3 --output comparison.html
  tunesmith report runs/rates  # a sweep, or all runs in a folder
  tunesmith report runs/lr-* --json  # figures, for scripts

The page is one file that opens offline. It includes the commands to reproduce
the runs. Runs may be running, finished, failed or copied.
`tunesmith eval RUN RUN` says which run is better, row by row.
"""

import argparse

from tunesmith.cli.options import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories, or folders with runs"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="file to write the report to (default: report.html)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from tunesmith.tools.report.run_report import write_page

    write_page(args)

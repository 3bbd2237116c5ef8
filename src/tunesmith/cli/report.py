"""Compare runs on one page: which is better and why, curves, recipes, speed, memory, answers, how to reproduce.

examples:
  tunesmith report runs/my-run
  tunesmith report runs/lr-1e-4 runs/lr-1e-3 --output comparison.html
  tunesmith report runs/* --markdown            # for a pull request or a wiki

The page is one file that opens offline. It takes running, finished, failed and copied runs.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--output", metavar="FILE", help="the page (default: report.html, or report.md)")
    parser.add_argument("--markdown", action="store_true", help="write Markdown in place of HTML")


def run(args: argparse.Namespace) -> None:
    from tunesmith.report.compare import judge, summaries_of
    from tunesmith.report.page import write_report
    from tunesmith.report.run_files import RunFiles

    output = Path(args.output or ("report.md" if args.markdown else "report.html"))
    runs = [RunFiles(folder) for folder in dict.fromkeys(args.runs)]
    write_report(runs, output, markdown=args.markdown)
    verdict = judge(summaries_of(runs))
    print("\n".join([verdict.headline, *(f"  {reason}" for reason in verdict.reasons)]))
    print(f"{output}: {output.stat().st_size / 1024:.0f} KiB, open it in a browser" if not args.markdown else output)

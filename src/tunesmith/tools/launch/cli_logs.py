"""Show the log of a launched run.

example:
  tunesmith logs slurm-1234
  tunesmith logs -f runs/my-run  # follow; ctrl-C ends this command, not the run
"""

import argparse
import sys

from tunesmith.launch.jobs import find_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job", metavar="JOB|RUN", help="job name from `tunesmith status`, or a run directory"
    )
    parser.add_argument(
        "-f", "--follow", action="store_true", help="follow the log until the run ends"
    )


def run(args: argparse.Namespace) -> None:
    for text in find_job(args.job).read_log(follow=args.follow):
        sys.stdout.write(text)
        sys.stdout.flush()

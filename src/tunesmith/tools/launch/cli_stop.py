"""Make a launched run save and stop. The same launch command resumes it.

example:
  tunesmith stop slurm-1234
  tunesmith stop runs/my-run --wait  # return when the run has ended
"""

import argparse
import time

from tunesmith.launch.job import POLL
from tunesmith.launch.jobs import find_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job", metavar="JOB|RUN", help="job name from `tunesmith status`, or a run directory"
    )
    parser.add_argument("--wait", action="store_true", help="wait until the run has ended")


def run(args: argparse.Namespace) -> None:
    job = find_job(args.job)
    name = job.name or job.run_dir
    message = job.stop()
    print(f"{name}: {message}", flush=True)
    if args.wait:
        state = job.state()
        while state.at_work:
            time.sleep(POLL)
            state = job.state()
        print(f"{state.state}: {state.text}")

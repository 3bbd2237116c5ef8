"""Ask a launched run to save and end; the same launch goes on from there.

examples:
  tunesmith stop slurm-1234
  tunesmith stop runs/my-run --wait       # until it has ended
"""

import argparse
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job", metavar="JOB|RUN", help="a name of `tunesmith status`, or a run directory"
    )
    parser.add_argument("--wait", action="store_true", help="return when it has ended")


def run(args: argparse.Namespace) -> None:
    from tunesmith.launch.jobs import POLL, find_job

    job = find_job(args.job)
    name = job.name or job.run_dir

    def say(text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr, flush=True)

    print(f"{name}: {job.stop(say)}", flush=True)
    if args.wait:
        while (state := job.state()).at_work:
            time.sleep(POLL)
        print(f"{state.phase}: {state.text}")

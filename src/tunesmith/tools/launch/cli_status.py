"""Show the state and newest step of launched runs.

example:
  tunesmith status  # all jobs of this user
  tunesmith status slurm-1234  # one job, by its name
  tunesmith status runs/my-run  # one job, by its run directory
  tunesmith status runs/rates  # all candidates of a sweep
"""

import argparse
import json

from tunesmith.cli.options import add_json
from tunesmith.errors import MachineError
from tunesmith.host.files import relative_to_cwd
from tunesmith.host.streams import visible
from tunesmith.launch.job import Job, JobState, last_step
from tunesmith.launch.jobs import all_jobs, find_job, with_runs_of_folders
from tunesmith.run_dir import RunState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "jobs",
        nargs="*",
        metavar="JOB|RUN",
        help="job names or run directories (default: all jobs)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    jobs = [find_job(word) for word in with_runs_of_folders(args.jobs)] or all_jobs()
    states = [_state_of(job) for job in jobs]
    if args.json:
        rows = [
            {"job": job.name, "run_dir": job.run_dir, "log": job.log, **state._asdict()}
            for job, state in zip(jobs, states, strict=True)
        ]
        print(json.dumps(rows, indent=1))
        return
    for job, state in zip(jobs, states, strict=True):
        # A run that was started without `launch` has no name. Print its directory instead.
        name = job.name or relative_to_cwd(job.run_dir)
        print(visible(f"{name:<24} {state.state:<8} {state.text}"))
        if job.name:
            print(visible(f"{'':<24} {job.run_dir}"))
    if not jobs:
        print("there are no jobs; to start one: tunesmith launch local RECIPE --detach")


def _state_of(job: Job) -> JobState:
    """Return the state of a job. It is unknown if Slurm, Docker or Swarm does not answer."""
    try:
        return job.state()
    except MachineError as error:
        texts = (error.what, error.why or error.where, error.fix, last_step(job.run_dir))
        return JobState(RunState.UNKNOWN, "; ".join(filter(None, texts)))

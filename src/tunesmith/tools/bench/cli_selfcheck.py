"""Check that training on several ranks matches one process.

example:
  tunesmith selfcheck
  tunesmith selfcheck --ranks 4
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \\
    --rdzv-endpoint NODE:29500 -m tunesmith selfcheck

The command trains a small random model for a few steps, in one process and on
every kind of mesh that the ranks can form (replicate, shard, tensor, and
combinations). It takes a minute or two and needs no network. The exit code is 1
if a check fails, otherwise 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import add_json, is_main_process, whole_number
from tunesmith.distributed.ranks import started_as
from tunesmith.errors import EXIT_FAILED, EXIT_OK, RunError, UsageError
from tunesmith.host.child_output import reason_in
from tunesmith.host.cores import available_cores
from tunesmith.host.shell import shell_command
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.tools.bench.selfcheck import CheckRow, Report

LOADS_TORCH = "here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "default: one per GPU, or 2 without GPUs"
    parser.add_argument(
        "--ranks",
        type=whole_number,
        metavar="N",
        help=f"number of ranks to start ({default}); do not use it with torchrun",
    )
    add_json(parser)
    # Hidden option: `check_on_ranks` passes it to the ranks that it starts.
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    env = started_as()
    world = env["WORLD_SIZE"] if env else args.ranks
    if env and args.ranks not in (None, world):
        raise UsageError(
            f"--ranks is {args.ranks}, but torchrun has already started {world} ranks",
            where="--ranks",
            fix="remove --ranks",
        )
    if world is None:
        import torch

        world = torch.cuda.device_count() or 2
    if env is None and world > 1:
        report = check_on_ranks(world, quiet=args.json)
    else:
        from tunesmith.tools.bench.selfcheck import run_checks

        report = run_checks((lambda row: None) if args.json else print_row)
    if args.report is not None:
        if is_main_process():
            args.report.write_text(json.dumps(report), encoding="utf-8")
        # This process is a rank, and its parent reads the result from the report file. Exit with 0
        # even if a check failed, because torchrun prints a traceback for any other exit code.
        return EXIT_OK
    if is_main_process():
        print(json.dumps(report, indent=1) if args.json else verdict(report))
    return EXIT_OK if report["passed"] else EXIT_FAILED


def check_on_ranks(world: int, *, quiet: bool) -> "Report":
    """Run the checks on several ranks of this machine, started with torchrun. Return the report.

    Args:
        world: the number of ranks.
        quiet: do not let the ranks print the table.
    """
    # Set the number of threads per rank, because torchrun would use 1.
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, available_cores() // world))}
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    words += ["-m", "tunesmith", "selfcheck"]
    with tempfile.TemporaryDirectory(prefix="tunesmith-selfcheck-") as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", *words, "--report", str(file)]
        if quiet:
            command.append("--json")
        process = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
        if file.is_file():
            report: Report = json.loads(file.read_text(encoding="utf-8"))
            return report
    raise RunError(
        "the ranks of the self-check exited before all checks were done",
        why=reason_in(process.stderr),
        fix=f"run `{shell_command(['python', '-m', *words])}` to see the full output of all ranks",
    )


def print_row(row: "CheckRow") -> None:
    """Print a row of the table. For a failed check, also print the likely cause."""
    step = f"step {row['step']}" if row["step"] else ""
    figures = f"{step:>6} {row['expected']:>11} {row['found']:>11} {row['tolerance']:>6}"
    print(f"{row['check']:<76} {figures} {'pass' if row['passed'] else 'FAIL'}", flush=True)
    if row["meaning"]:
        print(f"  {row['meaning']}", flush=True)


def verdict(report: "Report") -> str:
    """Return the summary of a report, with a fix if a check failed."""
    passed = [row["passed"] for row in report["checks"]]
    ranks = f"{count_of(report['ranks'], 'rank')} on {', '.join(report['hosts'])}"
    where = f"{ranks} ({report['device']}), {report['seconds']:.0f} s"
    if report["passed"]:
        return f"all {len(passed)} checks passed: {where}"
    return (
        f"{passed.count(False)} of {len(passed)} checks failed: {where}; a run on these ranks "
        "would give wrong results\n  fix: set `parallel` in the recipe to a mesh that passed; "
        "report the output of `tunesmith selfcheck --json`"
    )

"""Check this machine, a pair of nodes or a cluster, and print fixes.

example:
  tunesmith doctor
  tunesmith doctor --pair spark-b
  tunesmith doctor --ranks 2

Nothing is changed. The exit code is 1 if there is a fault, otherwise 0.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from tunesmith.cli.options import add_json, whole_number
from tunesmith.errors import EXIT_FAILED, EXIT_OK
from tunesmith.host.streams import show, visible
from tunesmith.tools.doctor.checks import System, examine
from tunesmith.tools.doctor.findings import FAULT, WARNING, finding
from tunesmith.tools.doctor.pair import check_pair
from tunesmith.tools.doctor.slurm import check_slurm
from tunesmith.units import count_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--pair",
        metavar="HOST",
        help="check this machine and the machine HOST, which needs only ssh and python3",
    )
    where.add_argument(
        "--slurm", action="store_true", help="check the Slurm cluster of this machine"
    )
    where.add_argument(
        "--ranks",
        type=whole_number,
        metavar="N",
        help="train a tiny model on N ranks of this machine, and compare it with one process",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    if args.slurm:
        findings = check_slurm(Path.cwd())
    elif args.ranks:
        # Not at the top, because it imports torch.
        from tunesmith.tools.doctor.ranks import check_ranks

        findings = check_ranks(args.ranks)
    elif args.pair:
        findings = check_pair(args.pair)
    else:
        findings = [finding(key, **values) for key, values in examine(System(), pair=False)]
        # A single machine does not require Docker.
        findings = [
            replace(found, level=WARNING)
            if found.check in ("docker", "toolkit") and found.level == FAULT
            else found
            for found in findings
        ]
    # A finding without a host is about this machine, so set this machine's host name.
    here = os.uname().nodename
    findings = [replace(found, host=found.host or here) for found in findings]
    seconds = round(time.monotonic() - begin, 1)
    levels = [found.level for found in findings]
    faults = levels.count(FAULT)
    if args.json:
        rows = [asdict(found) for found in findings]
        print(json.dumps({"passed": not faults, "seconds": seconds, "findings": rows}, indent=1))
        return EXIT_FAILED if faults else EXIT_OK
    for host, group in itertools.groupby(findings, key=lambda found: found.host):
        print(host)
        for found in group:
            show(f"  {found.level:<9}{found.check:<16}{found.what}", sys.stdout, indent=INDENT)
            if found.why:
                show(f"           why             {found.why}", sys.stdout, indent=INDENT)
            if found.fix:
                print(visible(f"           fix             {found.fix}"))
    counts = f"{count_of(faults, 'fault')}, {count_of(levels.count(WARNING), 'warning')}"
    print(f"{count_of(len(findings), 'check')} in {seconds} s: {counts}")
    return EXIT_FAILED if faults else EXIT_OK


# Number of characters before the text of a finding. Further lines of the text are indented by it.
INDENT = 27

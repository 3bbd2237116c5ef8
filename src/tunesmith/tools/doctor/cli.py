"""Check this machine, a pair of nodes or a cluster, and print fixes.

example:
  tunesmith doctor
  tunesmith doctor --pair spark-b

Nothing is changed. The exit code is 1 if there is a fault, otherwise 0.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from tunesmith.cli.options import add_json
from tunesmith.errors import EXIT_FAILED, EXIT_OK
from tunesmith.host.streams import show, visible
from tunesmith.tools.doctor.checks import examine
from tunesmith.tools.doctor.pair import check_pair
from tunesmith.tools.doctor.slurm import check_slurm
from tunesmith.tools.doctor.system import FAULT, WARNING, System
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
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    if args.slurm:
        findings = check_slurm(Path.cwd())
    elif args.pair:
        findings = check_pair(args.pair)
    else:
        findings = examine(System(), pair=False)
    # A finding without a host is about this machine, so set this machine's host name.
    here = os.uname().nodename
    findings = [replace(finding, host=finding.host or here) for finding in findings]
    seconds = round(time.monotonic() - begin, 1)
    levels = [finding.level for finding in findings]
    faults = levels.count(FAULT)
    if args.json:
        values = {
            "passed": not faults,
            "seconds": seconds,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(values, indent=1))
    else:
        # Group the findings by host.
        host = ""
        for finding in findings:
            if finding.host != host:
                host = finding.host
                print(host)
            show(
                f"  {finding.level:<9}{finding.check:<16}{finding.what}", sys.stdout, indent=FINDING
            )
            if finding.why:
                show(f"{'':<11}{'why':<16}{finding.why}", sys.stdout, indent=FINDING)
            if finding.fix:
                print(visible(f"{'':<11}{'fix':<16}{finding.fix}"))
        counts = f"{count_of(faults, 'fault')}, {count_of(levels.count(WARNING), 'warning')}"
        print(f"{count_of(len(findings), 'check')} in {seconds} s: {counts}")
    return EXIT_FAILED if faults else EXIT_OK


# Number of characters before the text of a finding. Further lines of the text are indented by it.
FINDING = 27

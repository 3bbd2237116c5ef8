"""Say what stands in the way of a run on this machine, a pair of nodes or a Slurm cluster, with the command that mends it.

With a recipe, also whether its model can be had: token, licence, room. `--fix` prints one script for each host, for
review; nothing is changed. Exit code 0: no fault; 1: at least one.

examples:
  tunesmith doctor smollm2-135m-lora
  tunesmith doctor --pair spark-b
  tunesmith doctor --pair spark-b --fix
"""

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tunesmith.errors import EXIT_FAILED, EXIT_OK, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--pair", metavar="HOST", help="this machine and HOST, which needs ssh and python3 alone"
    )
    where.add_argument(
        "--slurm", action="store_true", help="the cluster that sinfo and srun reach from here"
    )
    parser.add_argument(
        "--fix", action="store_true", help="print a script for each host that mends it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="also check its model and its disk"
    )


def run(args: argparse.Namespace) -> int:
    from tunesmith.config.load import load_recipe
    from tunesmith.launch.doctor.access import check_model
    from tunesmith.launch.doctor.checks import examine
    from tunesmith.launch.doctor.fix import fix_scripts
    from tunesmith.launch.doctor.pair import check_pair
    from tunesmith.launch.doctor.slurm import check_slurm
    from tunesmith.launch.doctor.system import FAULT, OK, Finding, System

    if args.slurm and args.fix:
        raise UsageError(
            "a cluster is its administrator's to mend",
            where="--fix",
            fix="tunesmith doctor --slurm",
        )
    begin = time.monotonic()
    recipe = load_recipe(args.recipe, []) if args.recipe else None
    folders = (recipe.output_dir if recipe else ".",)
    nodes: list[dict[str, Any]] = []
    if args.slurm:
        found = check_slurm(Path.cwd())
    elif args.pair:
        found, nodes = check_pair(args.pair, folders)
    else:
        report = examine(System(folders=folders), pair=False)
        found, nodes = [Finding(**row) for row in report["findings"]], [report["properties"]]
    found += check_model(recipe.model) if recipe else []
    found = [replace(f, host=f.host or os.uname().nodename) for f in found]
    faults, seconds = sum(f.level == FAULT for f in found), round(time.monotonic() - begin, 1)
    scripts = fix_scripts(found, nodes, args.pair or "") if args.fix else {}
    if args.json:
        told = {
            "passed": not faults,
            "seconds": seconds,
            "findings": [asdict(f) for f in found],
            "fix": scripts,
        }
        print(json.dumps(told, indent=1))
    elif args.fix:
        print("\n".join(f"# ---- {host} ----\n{script}" for host, script in scripts.items()))
    else:
        for f, host in zip(found, ["", *(f.host for f in found)], strict=False):
            rows = [*([f.host] if f.host != host else []), f"  {f.level:<9}{f.check:<16}{f.what}"]
            rows += [
                f"{'':<11}{word:<16}{text}"
                for word, text in (("why", f.why), ("fix", f.fix))
                if text
            ]
            print("\n".join(rows))
        warnings = sum(f.level not in (FAULT, OK) for f in found)
        print(f"{len(found)} checks in {seconds} s: {faults} faults, {warnings} warnings")
    return EXIT_FAILED if faults else EXIT_OK

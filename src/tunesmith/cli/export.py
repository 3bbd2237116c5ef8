"""Write a checkpoint of several ranks as a model that Transformers loads.

example:
  tunesmith export runs/my-run/checkpoint-200 --output my-model

A model trained in full on several ranks is saved as the part of each rank. Here one process puts
the parts together, one tensor in memory at a time. final/ is such a model already, and so is every
checkpoint of one process.
"""

import argparse
import json
from pathlib import Path

from tunesmith.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN/checkpoint-N", help="of a run on several ranks")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a folder that is new or empty"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run

    location = locate_run(args.checkpoint)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError("--output is not an empty folder", where=str(output), fix="name a new one")
    from tunesmith.checkpoint.manifest import check_sums
    from tunesmith.checkpoint.sharded import export_sharded, is_sharded

    folder = location.folder
    if folder is None or location.run is None or not is_sharded(folder):
        fix = "use the folder as it is"
        if location.kind == "adapter":
            fix = "merge puts an adapter into its base"
        raise UsageError(
            f"{args.checkpoint} needs no export",
            where=str(folder or args.checkpoint),
            why="only a checkpoint of a model trained in full on several ranks is in parts",
            fix=fix,
        )
    check_sums(folder, reads=lambda name: True)
    export_sharded(folder, output, location.run)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if args.json:
        report = {"checkpoint": str(folder), "output": str(output), "bytes": size}
        print(json.dumps(report, indent=2))
    else:
        weights = f"{size / 2**20:.0f} MiB in {location.run.model.dtype}"
        print(f"{output}: {weights}; Transformers loads it as it is")
        print(f"next: tunesmith chat {output}")

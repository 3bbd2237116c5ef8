"""Implementation of the command `bench`: measure the training speed and print a table."""

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from tunesmith.config.dump import to_mapping
from tunesmith.config.schema import Run
from tunesmith.metrics import hardware
from tunesmith.metrics.result_table import ResultTable
from tunesmith.model.arch.shapes import find_shape
from tunesmith.start.request import Weights
from tunesmith.tools.bench.measure import BenchPlan, measure
from tunesmith.tools.bench.shape import shape_recipe, write_shape


def run_bench(args: argparse.Namespace, recipe: Run | None) -> None:
    """Measure the training speed of a recipe and print the results.

    Args:
        args: the options of `bench`.
        recipe: the recipe to measure. If it is None, measure the shape that --shape names.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if recipe is None:
            recipe = recipe_of_shape(args, folder / "model")
        traces = Path(args.profile) if args.profile else None
        weights: Weights = "random" if args.shape else "stored"
        (folder / "run").mkdir()
        plan = BenchPlan(recipe, args.steps, args.warmup, weights, traces)
        measured = measure(plan, folder / "run")
        report = {
            "figures": vars(measured.figures),
            "recipe": plain_recipe(args, recipe),
            "machine": hardware.describe_machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    figures = measured.figures
    base = f"base {figures.quantize}, micro batch {figures.micro_batch}"
    print(f"{figures.device}, {figures.dtype}, {base}, attention {figures.attention}")
    print(ResultTable([*figures.rows()]).text())
    for trace in measured.traces:
        print(f"trace: {trace}")
    if args.profile:
        report["profile"] = {"traces": [*map(str, measured.traces)]}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def recipe_of_shape(args: argparse.Namespace, folder: Path) -> Run:
    """Write config and tokenizer of the shape that --shape names, and return a recipe for it."""
    overrides = [word for word in args.words if "=" in word]
    folder.mkdir()
    rows = args.format or "alpaca"
    # Load the recipe first, so that a wrong key is reported before a tokenizer is downloaded.
    recipe = shape_recipe(folder, data=args.data, rows=rows, overrides=overrides)
    change = write_shape(folder, find_shape(args.shape).config, args.tokenizer)
    if change:
        print(f"warning: {args.shape} has a {change}", file=sys.stderr, flush=True)
    return recipe


def plain_recipe(args: argparse.Namespace, recipe: Run) -> dict[str, object]:
    """Return the recipe as a dict for the JSON report.

    If --shape is given, the dict has the name of the shape instead of the temporary model folder.
    """
    values = to_mapping(recipe)
    if args.shape:
        config = json.loads((Path(recipe.model.name) / "config.json").read_text(encoding="utf-8"))
        values["model"] |= {
            "name": f"shape {args.shape} ({find_shape(args.shape).source})",
            "tokenizer": args.tokenizer,
            "vocab_size": config["vocab_size"],
        }
        del values["output_dir"]
    return values

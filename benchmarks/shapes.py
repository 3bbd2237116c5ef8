"""Several models' true shapes on the same path: the MFU that each reaches, of the peak measured in its run.

    python benchmarks/shapes.py --tokenizer DIR --data rows.json --layers 2 --json out.json [key=value ...]

Widths, heads, vocabulary and windows are the models' own; `--layers` cuts the depth, so that the check runs on a small
machine too. Weights are random. Shapes run in turns, each in a process of its own; the median of `--rounds` counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.bench.measure import BenchPlan, measure
from tunesmith.bench.shape import shape_recipe, write_shape
from tunesmith.model.shapes import SHAPES


def one(a: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "run").mkdir()
        run = shape_recipe(folder / "model", data=a.data, rows="alpaca", overrides=a.keys)
        config = dict(SHAPES[a.one].config)
        if a.layers:
            config |= {"num_hidden_layers": a.layers} | ({"layer_types": None} if "layer_types" in config else {})
        write_shape(folder / "model", config, a.tokenizer)
        return vars(measure(BenchPlan(run, a.steps, a.warmup, weights="random"), folder / "run").figures)


def main() -> None:
    """All shapes in turns."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("keys", nargs="*", metavar="key=value")
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--shapes", nargs="+", default=["llama3-8b", "qwen3-8b", "mistral-7b"], choices=list(SHAPES))
    p.add_argument("--layers", type=int, help="decoder layers of each; default: all")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--warmup", type=int, default=1)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--one", choices=list(SHAPES), help=argparse.SUPPRESS)
    p.add_argument("--json")
    a = p.parse_args()
    if a.one:
        print(json.dumps(one(a)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in a.shapes}
    for _ in range(a.rounds):
        for name in a.shapes:
            command = [sys.executable, *sys.argv, "--one", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    shares = {name: statistics.median(r["mfu_of_measured_peak"] for r in runs) for name, runs in found.items()}
    first = a.shapes[0]
    for name, share in shares.items():
        print(f"{name:12} {share:6.1%} of the measured peak, {share / shares[first]:6.1%} of {first}'s share")
    if a.json:
        Path(a.json).write_text(json.dumps({"command": sys.argv, "shares": shares, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

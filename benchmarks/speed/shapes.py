"""Several models' true shapes on the same path: the MFU that each reaches, of the peak measured in
its run.

    python benchmarks/speed/shapes.py [--layers 2] [--json out.json] --tokenizer DIR --data rows.json [key=value ...]

Widths, heads, vocabulary and windows are the models' own; `--layers` cuts the depth, so that the
check runs on a small machine too. Weights are random. Shapes run in turns, each in a process of its
own; the median of `--rounds` counts. What else is given goes to `tunesmith bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from tunesmith.bench.ablation import run_in_turns
from tunesmith.cli.main import main as tunesmith
from tunesmith.model.shapes import SHAPES


def one(name: str, layers: int | None, words: list[str]) -> int:
    """Measure one shape in this process, of which only so many decoder layers."""
    config = dict(SHAPES[name].config)
    if layers:
        config |= {"num_hidden_layers": layers} | (
            {"layer_types": None} if "layer_types" in config else {}
        )
        SHAPES[name] = replace(SHAPES[name], config=config)
    return tunesmith(["bench", "--shape", name, *words])


def main() -> None:
    """All shapes in turns."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--shapes", nargs="+", default=["llama3-8b", "qwen3-8b", "mistral-7b"], choices=list(SHAPES)
    )
    p.add_argument("--layers", type=int, help="decoder layers of each; default: all")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--one", choices=list(SHAPES), help=argparse.SUPPRESS)
    p.add_argument("--json")
    a, bench = p.parse_known_args()
    if a.one:
        sys.exit(one(a.one, a.layers, [*bench, "--json", a.json]))
    cut = ["--layers", str(a.layers)] if a.layers else []
    commands = {name: [sys.executable, __file__, "--one", name, *cut, *bench] for name in a.shapes}
    found = run_in_turns(commands, rounds=a.rounds)
    shares = {
        name: statistics.median(
            report["figures"]["mfu_of_fp8_peak"] or report["figures"]["mfu_of_measured_peak"]
            for report in reports
        )
        for name, reports in found.items()
        if reports
    }
    for name, share in shares.items():
        beside = (
            f", {share / shares[a.shapes[0]]:6.1%} of {a.shapes[0]}'s share"
            if a.shapes[0] in shares
            else ""
        )
        print(f"{name:12} {share:6.1%} of the measured peak{beside}")
    if a.json:
        Path(a.json).write_text(
            json.dumps({"command": sys.argv, "shares": shares, "runs": found}, indent=1) + "\n"
        )
    sys.exit(len(shares) < len(a.shapes))


if __name__ == "__main__":
    main()

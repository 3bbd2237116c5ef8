"""Training in control groups of less and less memory: which limit is refused, which is warned of,
and which runs through?

    sudo python benchmarks/faults/memory_limits.py --model SMOLLM2.gguf --json
    docs/measurements/memory-limits.json
    python benchmarks/faults/memory_limits.py --write docs/measurements/README.md     # the table, from that file

Each run is an unmodified `tunesmith train` of two steps, alone in a control group (version 1 or 2,
made by root) with a limit of its own. `--model` is a .gguf file or a Transformers folder. Exit code
3: no such group can be made here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tables"))
from generated import table, write_or_check
from memory_guard import group

RECORD = Path("docs/measurements/memory-limits.json")
CASES = {
    "full": {"adapter": {"kind": "none"}},
    "LoRA": {"adapter": {"kind": "lora", "rank": 8, "alpha": 16}},
}
LIMITS = {
    "full": (1200, 2400, 2600, 2800, 3000, 3200, 3600),
    "LoRA": (800, 1000, 1100, 1200, 1300, 1400, 1600, 2000),
}
SENTENCE = "The number {number} is one that can be counted to, and so is the next one. "
TIME = 600.0  # seconds for a run on a busy machine


def write_recipe(folder: Path, model: str, case: str) -> Path:
    """A recipe of two steps on rows of some 170 tokens, each step of several micro batches."""
    rows = []
    for number in range(32):
        answer = SENTENCE.format(number=number) * 8
        rows.append({"prompt": f"Say something about {number}. ", "completion": answer})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = {
        "model": {"name": model, "dtype": "fp32"},
        "data": {
            "train": {"source": str(folder / "rows.jsonl"), "format": "prompt-completion"},
            "seq_len": 256,
        },
        "train": {"duration": "2 steps", "global_batch": "8 examples", "micro_batch": "512 tokens"},
        "log": {"tensorboard": False},
        "output_dir": str(folder / "run"),
    }
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe | CASES[case]), encoding="utf-8")
    return file


def measure(model: str, case: str, mib: int) -> dict[str, Any]:
    """One run in a group of `mib` MiB: how it ended, and what it said of memory before its first
    step.
    """
    command = [sys.executable, "-m", "tunesmith", "train"]
    with tempfile.TemporaryDirectory(prefix="tunesmith-limits-") as name, group(mib) as made:
        folder = Path(name)
        recipe = write_recipe(folder, model, case)
        began = time.monotonic()
        process = made.start(
            [*command, str(recipe)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        _, said = process.communicate(timeout=TIME)
        seconds = time.monotonic() - began
        records = folder / "run" / "metrics.jsonl"
        steps = records.read_bytes().count(b"\n") if records.exists() else 0
        kills = made.kills()
    needed = re.search(r"needs about ([\d.]+) GiB", said)
    peak = re.findall(r"step 2/2 .* ([\d.]+) GiB", said)
    return {
        "limit_mib": mib,
        "exit_code": process.returncode,
        "refused": "error: the run does not fit" in said,
        "warned": "warning: the run may not fit" in said,
        "killed_by_kernel": kills,
        "steps": steps,
        "needed_gib": float(needed[1]) if needed else None,
        "peak_gib": float(peak[-1]) if peak else None,
        "seconds": round(seconds, 1),
    }


def outcome(run: dict[str, Any]) -> str:
    """How a run ended, in words."""
    warned = "warned, " if run["warned"] else ""
    if run["refused"]:
        return "refused before its weights were loaded"
    if run["exit_code"] == 0:
        return f"{warned}ran through"
    if run["exit_code"] == 75:
        return f"{warned}stopped by the guard after {run['steps']} steps"
    if run["killed_by_kernel"]:
        return f"{warned}killed by the kernel after {run['steps']} steps"
    return f"{warned}ended with {run['exit_code']}"


def page() -> str:
    """The table in Markdown."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    head = ("SmolLM2-135M, fp32", "limit, MiB", "exit code", "what happened", "peak, GiB")
    rows = []
    for case, runs in record["cases"].items():
        for run in runs:
            peak = "" if run["peak_gib"] is None else f"{run['peak_gib']:.1f}"
            rows.append((case, f"{run['limit_mib']:,}", str(run["exit_code"]), outcome(run), peak))
    return table(head, rows)


def main() -> None:
    if sys.argv[1:2] in (["--write"], ["--check"]):
        sys.exit(write_or_check(__doc__, "benchmarks/faults/memory_limits.py", page))
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a .gguf file, or a Transformers folder")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    p.add_argument("--limits", nargs="+", type=int, metavar="MIB", help="of the control groups")
    p.add_argument("--json", type=Path, help="write the figures to this file")
    a = p.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    model = str(Path(a.model).resolve())  # the recipe is in another folder
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in a.cases:
        cases[case] = []
        for mib in a.limits or LIMITS[case]:
            run = measure(model, case, mib)
            cases[case].append(run)
            print(case, json.dumps(run), flush=True)
    if a.json:
        text = json.dumps({"cases": cases}, indent=1) + "\n"
        a.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

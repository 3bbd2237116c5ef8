"""Kill a run with SIGKILL, start the same command again, and compare it with a run that nothing
interrupted.

    python benchmarks/faults/kill_and_resume.py RECIPE [key=value ...] [--json FILE]
    python benchmarks/faults/kill_and_resume.py --shape llama3-3b --layers 4 --tokenizer DIR --data rows.json [--json FILE]

Both runs are `tunesmith train` with deterministic algorithms, STEPS steps and a checkpoint every
CHECKPOINT_EVERY of them. The kill comes once the run is a step past its first complete checkpoint.
Losses and gradient norms of all steps and the bytes of the final adapter are compared bit for bit.
Exit status 1: they differ. A shape is a model of that width with random weights and `--layers`
layers, written to disk first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 12
CHECKPOINT_EVERY = 4
COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "examples")
DEADLINE = 600.0  # seconds for a run


def train_command(words: list[str], output_dir: Path) -> list[str]:
    """`tunesmith train` of the recipe and keys in `words`, into `output_dir`."""
    keys = [
        f"train.duration={STEPS} steps",
        f"checkpoint.every={CHECKPOINT_EVERY} steps",
        "train.deterministic=true",
        "validate.every=null",
        "log.tensorboard=false",
        "log.samples=0",
        f"output_dir={output_dir}",
    ]
    return [sys.executable, "-m", "tunesmith", "train", *words, *keys]


def read_records(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run directory; a last line that is still being written is left out."""
    file = output_dir / "metrics.jsonl"
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    complete_lines = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in complete_lines]


def train(words: list[str], output_dir: Path) -> float:
    """Run to the end; returns the seconds. SystemExit where the run fails."""
    began = time.monotonic()
    completed = subprocess.run(train_command(words, output_dir), timeout=DEADLINE, check=False)
    if completed.returncode:
        raise SystemExit(f"the run in {output_dir} ended with {completed.returncode}")
    return time.monotonic() - began


def train_until_killed(words: list[str], output_dir: Path) -> int:
    """Start a run and kill it, with all its processes, a step after its first complete checkpoint;
    returns that step.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        train_command(words, output_dir), start_new_session=True, env=environment
    )
    manifest = output_dir / f"checkpoint-{CHECKPOINT_EVERY}" / "manifest.json"
    deadline = time.monotonic() + DEADLINE
    steps_done = 0
    while not manifest.exists() or steps_done <= CHECKPOINT_EVERY:
        if run.poll() is not None:
            raise SystemExit(
                f"the run ended with {run.returncode} before it could be killed, at step {steps_done}"
            )
        if time.monotonic() > deadline:
            os.killpg(run.pid, signal.SIGKILL)
            raise SystemExit(f"no checkpoint after {DEADLINE:.0f} s")
        time.sleep(0.01)
        steps_done = len(read_records(output_dir))
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return steps_done


def compare(whole: Path, resumed: Path) -> dict[str, Any]:
    """How the two run directories differ: the records of all steps, and the files of the final
    weights.
    """
    records = list(zip(read_records(whole), read_records(resumed), strict=True))
    unequal_steps = [
        left["step"] for left, right in records if any(left[key] != right[key] for key in COMPARED)
    ]
    largest = max(abs(left["loss"] - right["loss"]) / abs(left["loss"]) for left, right in records)
    weights = [file.name for file in sorted((whole / "final").glob("*.safetensors"))]
    unequal_files = [
        name
        for name in weights
        if (whole / "final" / name).read_bytes() != (resumed / "final" / name).read_bytes()
    ]
    return {
        "steps": len(records),
        "unequal_steps": unequal_steps,
        "largest_relative_difference_of_loss": largest,
        "weight_files": len(weights),
        "unequal_weight_files": unequal_files,
    }


def recipe_of_shape(options: argparse.Namespace, folder: Path) -> list[str]:
    """A model of the shape with random weights and a recipe for it, written to `folder`; the words
    that name the recipe.
    """
    from random_model import write_random_model

    write_random_model(folder / "model", options.shape, options.tokenizer, options.layers)
    recipe = {
        "model": {"name": str(folder / "model")},
        "adapter": {"kind": "lora", "rank": 8, "dropout": 0.1},
        "data": {
            "train": {"source": str(Path(options.data).resolve()), "format": "alpaca"},
            "seq_len": 2048,
        },
        "train": {"global_batch": "16384 tokens"},
        "output_dir": "runs/kill-and-resume",
    }
    file = folder / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return [str(file)]


def main() -> None:
    """Three starts in two run directories, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--shape")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokenizer")
    parser.add_argument("--data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args()
    if bool(options.words) == bool(options.shape):
        parser.error("give a recipe, or --shape with --tokenizer and --data")
    with tempfile.TemporaryDirectory(prefix="tunesmith-resume-") as name:
        folder = Path(name)
        words = options.words or recipe_of_shape(options, folder)
        whole_seconds = train(words, folder / "whole")
        killed_at = train_until_killed(words, folder / "resumed")
        resumed_seconds = train(words, folder / "resumed")
        report = {"killed_at_step": killed_at, **compare(folder / "whole", folder / "resumed")}
    report |= {
        "whole_seconds": round(whole_seconds, 1),
        "resumed_seconds": round(resumed_seconds, 1),
    }
    report["equal"] = not report["unequal_steps"] and not report["unequal_weight_files"]
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(not report["equal"])


if __name__ == "__main__":
    main()

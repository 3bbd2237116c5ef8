"""Whether a method learns a rule that its base does not know: demo/pairs.py's, short over long.

    python benchmarks/learning/preferences.py [--methods dpo orpo simpo kto] [--folder runs/pairs]
        [--duration "1 epochs"]

300 pairs, LoRA on SmolLM2 135M. For each method: train by the shipped recipe on the made pairs;
`eval` on 60 held-out ones about other things, base beside tuned; `generate` answers to their
questions, and count words and sentences. Each method takes some minutes on two quiet cores. What is
there already is not done again; the table and FOLDER/learned.json have what is there so far.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "demo"))

import pairs  # noqa: E402
from run import dtype_for_this_machine, find_model  # noqa: E402

METHODS = ("dpo", "orpo", "simpo", "kto")
STOPPED = 75  # the exit code of a run that was stopped and saved
STARTS = 10
# The shipped recipe is for 2,000 pairs; these are 300, and as short as a row of a form.
PAIRS = 8  # a step
SETTINGS = (
    "data.seq_len=128",
    "train.micro_batch=1024 tokens",
    "train.learning_rate=2e-4",
    "validate.every=null",
    "log.samples=0",
)


def tunesmith(*words: str) -> str:
    """Run a command and return what it prints; a failed one ends the benchmark."""
    print(f"$ tunesmith {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", "tunesmith", *words]
    for _ in range(STARTS):
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        # Stopped because memory was short, and saved: the same command goes on.
        if done.returncode != STOPPED:
            break
    done.check_returncode()
    return done.stdout


def train(method: str, model: str, folder: Path, duration: str) -> Path:
    run = folder / method
    if (run / "final").is_dir():
        return run
    is_kto = method == "kto"
    rows = "answers" if is_kto else "pairs"
    row_format = "feedback" if is_kto else "preference"
    batch = 2 * PAIRS if is_kto else PAIRS
    tunesmith(
        "train",
        "smollm2-135m-kto" if is_kto else "smollm2-135m-dpo",
        f"model.name={model}",
        *dtype_for_this_machine(),
        # A name alone: each method's own defaults.
        f"method={method}",
        f"data.train={{source: {folder / rows}.jsonl, format: {row_format}}}",
        f"data.validation={{source: {folder}/held-out-{rows}.jsonl, format: {row_format}}}",
        f"train.global_batch={batch} examples",
        *SETTINGS,
        f"train.duration={duration}",
        f"output_dir={run}",
    )
    return run


def measure(run: Path, folder: Path) -> dict[str, Any]:
    """Pairs in order, base and tuned, with intervals."""
    file = folder / f"{run.name}-eval.json"
    if not file.exists():
        text = tunesmith("eval", str(run), "--data", f"{folder}/held-out-pairs.jsonl", "--json")
        file.write_text(text)
    return json.loads(file.read_text())["scores"]["pairs in order"]


def answers(model: str, name: str, folder: Path) -> dict[str, float]:
    """Words and sentences of its greedy answers to the held-out questions."""
    file = folder / f"{name}-answers.jsonl"
    if not file.exists():
        more = ["--base"] if name == "base" else []
        tunesmith(
            "generate", model, *more, "--input", f"{folder}/questions.jsonl",
            "--output", str(file), "--max-new-tokens", "64", "--batch-size", "60",
        )  # fmt: skip
    texts = [json.loads(line)["output"].strip() for line in file.read_text().splitlines()]
    words = [len(text.split()) for text in texts]
    sentences = [len(re.findall(r"[.!?](?=\s|$)", text)) for text in texts]
    return {
        "answers": len(texts),
        "mean_words": fmean(words),
        "one_sentence": fmean(count <= 1 for count in sentences),
    }


def learned(method: str, model: str, folder: Path, duration: str) -> dict[str, Any]:
    run = train(method, model, folder, duration)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    names = ("reward_accuracy", "reward_margin", "rewards_chosen", "rewards_rejected", "kl")
    return {
        "steps": last["step"],
        "tokens": sum(record["tokens"] for record in records),
        "train_seconds": sum(record["step_seconds"] for record in records),
        "held_out": {name: last[f"val_{name}"] for name in names if f"val_{name}" in last},
        "pairs_in_order": measure(run, folder),
        "answers": answers(str(run), method, folder),
    }


def table(results: dict[str, Any]) -> str:
    base = results["base"]
    rows = [
        "| | pairs in order, of 60 (95 % interval) | mean words of an answer | one sentence |",
        "|---|---|---|---|",
    ]
    lines = {"base": (base["pairs_in_order"], base["answers"])}
    for method, result in results["methods"].items():
        lines[f"`{method}`"] = (result["pairs_in_order"]["tuned"], result["answers"])
    for name, (order, told) in lines.items():
        mean, low, high = (100 * order[key] for key in ("mean", "low", "high"))
        rows.append(
            f"| {name} | {mean:.0f} % ({low:.0f} to {high:.0f}) | {told['mean_words']:.1f} |"
            f" {told['one_sentence']:.0%} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--duration", default="1 epochs", help="such as 12 steps")
    args = parser.parse_args()
    pairs.write(args.folder)
    model = find_model()
    results: dict[str, Any] = {
        "model": Path(model).name,
        "pairs": pairs.TRAIN_PAIRS,
        "held_out_pairs": pairs.HELD_OUT_PAIRS,
        "pairs_a_step": PAIRS,
        "duration": args.duration,
        "settings": SETTINGS,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "methods": {},
    }
    for method in args.methods:
        results["methods"][method] = learned(method, model, args.folder, args.duration)
        order = results["methods"][method]["pairs_in_order"]["base"]
        results["base"] = {"pairs_in_order": order, "answers": answers(model, "base", args.folder)}
        (args.folder / "learned.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{table(results)}\n", flush=True)


if __name__ == "__main__":
    main()

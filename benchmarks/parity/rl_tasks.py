"""Does reinforcement learning work: three tasks on the demo model, exact match on held-out rows.

    python benchmarks/parity/rl_tasks.py --json docs/measurements/rl-tasks.json [--task sum] [key=value ...]

Each task trains with `method: grpo` and then runs `tunesmith eval --score exact` on rows that were
held out, for the base and for the tuned model. The report has the reward of each step. The base
model is hardly ever right. It learns because the rewards in rl_rewards.py give a part of the points
for an answer that is nearly right.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rl_rewards

import tunesmith
from tunesmith.config.load import from_mapping
from tunesmith.host.demo_model import demo_model
from tunesmith.metrics.hardware import describe_machine
from tunesmith.start.run import train

WORDS = (
    "amber birch cedar delta ember fjord grove heron inlet juniper kelp lotus maple nectar olive pine"
).split()
ANIMALS = (
    "bear cat cow deer dog duck fox frog goat horse lion monkey mouse pig rabbit sheep snake tiger whale wolf"
).split()
THINGS = (
    "bell bottle book bridge car chair clock cup door hammer key lamp phone ring shirt shoe spoon table train wheel"
).split()
HELD_OUT = 48


class Task(NamedTuple):
    """A task with one right answer to each prompt.

    Attributes:
        prompts: function that returns pairs of a prompt and its answer.
        reward: function of `rl_rewards`.
        answer_tokens: maximum number of tokens of an answer.
        learning_rate: the learning rate with which the task was tried.
    """

    prompts: Callable[[], list[tuple[str, str]]]
    reward: str
    answer_tokens: int
    learning_rate: float


def sums() -> list[tuple[str, str]]:
    # With an example such as {"sum": 3}, the base model copies the 3, and never finds another sum.
    ask = '{} + {} = ? Reply as JSON: {{"sum": number}}'
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return [(ask.format(a, b), json.dumps({"sum": a + b})) for a, b in pairs]


def reversed_words() -> list[tuple[str, str]]:
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    return [(f"Write these two words in reverse order: {a} {b}", f"{b} {a}") for a, b in pairs]


def odd_words() -> list[tuple[str, str]]:
    draws = random.Random(0)
    ask = "Which of these is a thing and not an animal? Reply with the word only: {}"
    rows = {}
    for thing in THINGS * 10:
        words = [*draws.sample(ANIMALS, 2), thing]
        draws.shuffle(words)
        rows[ask.format(", ".join(words))] = thing
    return list(rows.items())


TASKS = {
    "sum": Task(sums, "total", 16, 3e-4),
    "reversed words": Task(reversed_words, "words", 12, 1e-3),
    "odd word": Task(odd_words, "choice", 12, 1e-3),
}


def rows_of(task: Task) -> list[dict[str, str]]:
    """Return the rows of a task in a fixed random order."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in task.prompts()]
    random.Random(0).shuffle(rows)
    return rows


def write_rows(file: Path, rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Write rows to a file, and return its entry in a recipe."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(file), "format": "prompt-completion"}


def method_of(task: Task) -> dict[str, Any]:
    """Return the section `method` of a recipe."""
    reward = f"{Path(rl_rewards.__file__).resolve()}:{task.reward}"
    return {"name": "grpo", "reward": reward, "group": 8, "answer_tokens": task.answer_tokens}


def run_task(name: str, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    task = TASKS[name]
    rows = rows_of(task)
    recipe = {
        "model": {"name": str(demo_model()), "dtype": "fp32"},
        "adapter": {"rank": 16, "alpha": 32},
        "method": method_of(task),
        "data": {
            "train": write_rows(folder / "train.jsonl", rows[:-HELD_OUT]),
            "validation": write_rows(folder / "held.jsonl", rows[-HELD_OUT:]),
            "seq_len": 128,
        },
        "train": {
            "duration": "60 steps", "global_batch": "8 examples",
            "learning_rate": task.learning_rate, "schedule": "constant", "warmup": "0 steps",
        },
        "validate": {"every": "60 steps"},
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
    scored = tunesmith.evaluate(folder / "run", scorers="exact", max_new_tokens=task.answer_tokens)
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

"""Recipes and rows that tests of whole runs share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run

if TYPE_CHECKING:
    from tunesmith.train_model import TrainModel

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "juniper"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows(count: int) -> list[dict[str, str]]:
    """Short prompt-completion rows, all different, of varied length."""
    found = []
    for i in range(count):
        word, times = WORDS[i % 10], i % 7 + 1
        row = {"prompt": f"Say {word} {times} times: ", "completion": " ".join([word] * times)}
        found.append(row)
    return found


def write_rows(path: Path, count: int) -> Path:
    """`rows(count)` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    """Pairs of a short answer and a longer one, as JSON lines."""
    rows = []
    for i in range(first, first + count):
        word = WORDS[i % 10]
        longer = " ".join([word] * (i % 5 + 2))
        rows.append({"prompt": f"Say {word} {i}: ", "chosen": word, "rejected": longer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_feedback(path: Path, count: int, first: int = 0) -> Path:
    """Both answers of each of `write_pairs`, labeled good and bad."""
    rows = []
    for row in map(json.loads, write_pairs(path, count, first).read_text().splitlines()):
        for answer in ("chosen", "rejected"):
            is_good = answer == "chosen"
            rows.append({"prompt": row["prompt"], "completion": row[answer], "label": is_good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, mapping by mapping."""
    both = dict(base)
    for name, value in changes.items():
        old = both.get(name)
        nested = isinstance(old, dict) and isinstance(value, dict)
        both[name] = merge(old, value) if nested else value
    return both


def recipe(model: Path, folder: Path, /, *, held: bool = True, **changes: Any) -> dict[str, Any]:
    """A small recipe on the rows of `folder`; `changes` are laid over it by section."""
    train, held_out = folder / "train.jsonl", folder / "held.jsonl"
    if not train.exists():
        write_rows(train, 48)
        write_rows(held_out, 8)
    base: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "fp32"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {
            "train": {"source": str(train), "format": "prompt-completion"},
            "validation": {"source": str(held_out), "format": "prompt-completion"}, "seq_len": 128,
        },
        "train": {
            "duration": "8 steps", "global_batch": "8 examples", "learning_rate": 1e-3,
            "warmup": "2 steps",
        },
        "validate": {"every": "4 steps"}, "checkpoint": {"every": "2 steps", "keep": 2},
        "log": {"tensorboard": False, "samples": 0}, "output_dir": str(folder / "run"),
    }  # fmt: skip
    if not held:
        del base["data"]["validation"], base["validate"]
    if changes.get("adapter", {}).get("kind") == "none":
        del base["adapter"]
    return merge(base, changes)


def make_run(model: Path, folder: Path, /, *, held: bool = True, **changes: Any) -> Run:
    """The same as a checked Run."""
    return from_mapping(recipe(model, folder, held=held, **changes), where="test", base=folder)


def built_model(run: Run, folder: Path, **options: Any) -> TrainModel:
    """The model of a recipe on the CPU, its base in `folder`; `options` are those of `build_model`."""
    import torch

    from tunesmith.build_model import build_model
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.methods import make_method
    from tunesmith.planning.resolve import inference_plan

    files = read_model_files(folder, run.model)
    run = replace(run, model=files.model)
    options.setdefault("method", make_method(run.method))
    model, _ = build_model(run, files, inference_plan(run, files, torch.device("cpu")), **options)
    return model

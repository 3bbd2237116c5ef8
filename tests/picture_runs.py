"""Runs of tiny vision-language models on drawn figures: their folders, rows and recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import recipes
from figures import write_figures
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from vision import write_processor

FAMILIES = ("qwen2_5_vl", "gemma3")  # positions with rows and columns; pictures seen both ways
TEXTS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {word} {n} times."},
            {"role": "assistant", "content": " ".join([word] * n)},
        ],
        "images": [],
    }
    for n, word in enumerate(recipes.WORDS, 1)
]


def write_vision_model(folder: Path, family: str) -> Path:
    """A random model of a family whose loss depends on its pictures, with its processor."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_processor(folder, family)
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def write_mixed(folder: Path, count: int, order: str = "PTP", *, seed: int = 0) -> Path:
    """Rows with a picture (P) and texts alone (T), in this order again and again; their file."""
    file = write_figures(folder, count, seed=seed)
    lines = file.read_text().splitlines()
    for n in range(count):
        if order[n % len(order)] == "T":
            lines[n] = json.dumps(TEXTS[n % len(TEXTS)])
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def picture_recipe(model: Path, rows: Path, /, **changes: Any) -> dict[str, Any]:
    """A small LoRA recipe on rows with pictures; `changes` are laid over it by section."""
    base = {
        "model": {"name": str(model), "dtype": "fp32", "vision": True},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {"train": {"source": str(rows), "format": "messages"}, "seq_len": 128},
        "train": {
            "duration": "6 steps", "global_batch": "4 examples", "learning_rate": 1e-2,
            "schedule": "constant", "warmup": "0 steps",
        },
        "checkpoint": {"every": "2 steps"}, "log": {"tensorboard": False, "samples": 0},
        "output_dir": str(rows.parent / "run"),
    }  # fmt: skip
    if changes.get("adapter", {}).get("kind") == "none":
        del base["adapter"]
    return recipes.merge(base, changes)


def picture_run(model: Path, rows: Path, /, **changes: Any) -> Run:
    """The same as a checked Run."""
    return from_mapping(picture_recipe(model, rows, **changes), where="test", base=rows.parent)

"""A text model learns from scratch to say what is drawn, through a frozen vision part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import tunesmith
from figures import COLOURS, COUNTS, SHAPES, write_figures
from tunesmith.config.load import from_mapping
from tunesmith.model.decoder import vision_parameters
from vision import write_processor

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

PATCH = 7  # pixels: a figure covers several


def write_seeing_model(folder: Path) -> None:
    """A random Qwen2.5-VL of 190,000 parameters, with a word for each thing there is to say."""
    write_processor(folder, "qwen2_5_vl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*COLOURS, *SHAPES, *COUNTS])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(tokenizer)
    tower = {"hidden_size": 64, "intermediate_size": 128, "patch_size": PATCH, "window_size": 28}
    config["vision_config"] |= tower
    (folder / "config.json").write_text(json.dumps(config))
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    pixels |= {"patch_size": PATCH, "size": {"shortest_edge": 784, "longest_edge": 3136}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    # As large as a trained one's: features of the usual tiny weights differ by too little.
    with torch.no_grad():
        for _, parameter in vision_parameters(model):
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)


def test_what_is_drawn_is_learned(tmp_path: Path) -> None:
    """Of 36 things to say 95 % on pictures that were held out; without the right ones chance."""
    model = tmp_path / "model"
    write_seeing_model(model)
    train = {
        "duration": "200 steps",
        "global_batch": "32 examples",
        "learning_rate": 4e-3,
        "compile": "off",
    }
    recipe: dict[str, Any] = {
        "model": {"name": str(model), "vision": True, "dtype": "fp32"},
        "adapter": {"kind": "none"},
        "data": {
            "train": {"source": str(write_figures(tmp_path, 2000, seed=1)), "format": "messages"},
            "seq_len": 512,
        },
        "train": train,
        "checkpoint": {"every": None},
        "log": {"samples": 0, "tensorboard": False},
        "output_dir": str(tmp_path / "run"),
    }
    tunesmith.train(from_mapping(recipe, where="test", base=tmp_path))
    loaded = tunesmith.load_run(tmp_path / "run")
    lines = write_figures(tmp_path, 120, seed=2).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["images"] = [str(tmp_path / image) for image in row["images"]]
    assert share_of_right_answers(loaded, rows) >= 0.95
    others = [
        {**row, "images": other["images"]}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    assert share_of_right_answers(loaded, others) < 0.2


def share_of_right_answers(loaded: Any, rows: list[dict[str, Any]]) -> float:
    answered = [*tunesmith.generate(loaded, rows, batch_size=60)]
    return sum(row["output"] == row["reference"] for row in answered) / len(answered)

"""A shape as a recipe: a folder with the config and a tokenizer in the place of a model, and the keys around it.

LoRA, r = 8 on every linear layer, sequences of 2,048 packed, 16,384 tokens a step in as many passes as take the least
time; key=value wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.config.dump import to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Run
from tunesmith.errors import UsageError
from tunesmith.model import spec
from tunesmith.model.tokenizer import load_tokenizer

BATCH = "16384 tokens"


def write_model(folder: Path, config: Mapping[str, Any], tokenizer: str) -> str:
    """Write a model's folder without weights: config.json, whose token ids are the tokenizer's, and the tokenizer.

    A vocabulary that is too small for the tokenizer's ids becomes as large as the tokenizer.

    Args:
        folder: an existing one.
        config: the values of a shape.
        tokenizer: a Hub id or a folder.

    Returns:
        what was changed of the shape, in words; empty if nothing was.

    Raises:
        ModelError: the tokenizer, or the config, cannot be read.
    """
    spec.read_spec(config, where="--shape")
    found: PreTrainedTokenizerBase = load_tokenizer(folder, Model(name=str(folder), tokenizer=tokenizer))
    changed, rows = "", config["vocab_size"]
    if len(found) > rows:
        changed = f"vocabulary of {len(found):,} in place of {rows:,}: the tokenizer's ids must fit"
        config = {**config, "vocab_size": len(found)}
    ids = {f"{kind}_token_id": getattr(found, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    (folder / "config.json").write_text(json.dumps({**config, **ids}, indent=1), encoding="utf-8")
    found.save_pretrained(folder)
    return changed


def recipe(folder: Path, *, data: str, rows: str, overrides: Sequence[str]) -> Run:
    """The checked recipe of a shape whose model's folder is `folder`; its file is written beside that folder.

    Args:
        data: rows: a file, or a Hub id.
        rows: their format.
        overrides: `key.sub=value`.

    Raises:
        UsageError: a key names another model or tokenizer.
        RecipeError, MachineError: as `config.load.load`.
    """
    values = {
        "model": {"name": str(folder)},
        "data": {"train": {"source": str(Path(data).resolve()) if Path(data).exists() else data, "format": rows}},
        "train": {"global_batch": BATCH},
        "output_dir": str(folder.parent / "run"),
    }
    file = folder.parent / "shape.yaml"
    file.write_text(to_yaml(values), encoding="utf-8")
    run = load_recipe(file, overrides)
    if (run.model.name, run.model.tokenizer) != (str(folder), None):
        raise UsageError(
            "a shape's model and tokenizer are not keys",
            where="command line: model.name, model.tokenizer",
            why="the model is the shape with random weights, and its folder holds the tokenizer",
            fix="--shape NAME --tokenizer DIR_OR_ID; or give a recipe in place of --shape",
        )
    return run

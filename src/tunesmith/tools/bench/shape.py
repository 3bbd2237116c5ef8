"""Conversion of a shape (the dimensions of a known model) to a model folder and a recipe.

The model folder contains a config and a tokenizer, but no weights.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.dump import to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Run
from tunesmith.errors import UsageError
from tunesmith.hub.fetch import fetch_without_weights
from tunesmith.model.arch.tokenizer import load_original_tokenizer
from tunesmith.model.measuring.measured_spec import model_spec

GLOBAL_BATCH_SIZE = "16384 tokens"


def write_shape(folder: Path, config: Mapping[str, Any], tokenizer: str) -> str:
    """Write config.json and the tokenizer into an existing folder.

    If the tokenizer has more tokens than the vocabulary of the config, the vocabulary is enlarged.
    Raise ModelError if the tokenizer or the config cannot be read.

    Args:
        config: the config of the shape.
        tokenizer: a Hub id or a folder.

    Returns:
        A description of the change of the vocabulary, or "".
    """
    model_spec(config, where="--shape")
    loaded = load_original_tokenizer(fetch_without_weights(tokenizer), Model(name=str(folder)))
    values = copy.deepcopy(dict(config))
    text = values.get("text_config", values)
    # Use the special tokens of the given tokenizer instead of those of the shape's own tokenizer.
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[token] = getattr(loaded, token)
    change = ""
    size = len(loaded)
    rows = text["vocab_size"]
    if size > rows:
        text["vocab_size"] = size
        change = f"vocabulary of {size:,} instead of {rows:,}, to fit the tokenizer's ids"
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    loaded.save_pretrained(folder)
    return change


def shape_recipe(folder: Path, *, data: str, rows: str, overrides: Sequence[str]) -> Run:
    """Write the recipe of a shape next to its model folder, and load it.

    Raise the errors of `load_recipe`, and UsageError if an override sets another model or
    tokenizer.

    Args:
        folder: the model folder.
        data: the data set: a file or a Hub id.
        rows: the format of the rows.
        overrides: keys of the command line that override the recipe.
    """
    if Path(data).exists():
        data = str(Path(data).resolve())
    values = {
        "model": {"name": str(folder)},
        "data": {"train": {"source": data, "format": rows}},
        "train": {"global_batch": GLOBAL_BATCH_SIZE},
        "output_dir": str(folder.parent / "run"),
    }
    file = folder.parent / "shape.yaml"
    file.write_text(to_yaml(values), encoding="utf-8")
    run = load_recipe(file, overrides)
    # An override on the command line may have set another model or tokenizer.
    if (run.model.name, run.model.tokenizer) != (str(folder), None):
        raise UsageError(
            "the model and tokenizer of a shape cannot be overridden",
            where="command line: model.name, model.tokenizer",
            why="the model is the shape with random weights, and its folder contains the tokenizer",
            fix="use --shape NAME --tokenizer DIR_OR_ID, or give a recipe instead of --shape",
        )
    return run

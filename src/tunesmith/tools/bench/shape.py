"""A shape as a recipe: a model folder with config and tokenizer but no weights, and its recipe."""

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
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.tokenizer import load_tokenizer

GLOBAL_BATCH_SIZE = "16384 tokens"


def write_shape(folder: Path, config: Mapping[str, Any], tokenizer: str) -> str:
    """Write config.json, with the tokenizer's ids, and the tokenizer into an existing folder.

    A vocabulary that is too small for the ids of the tokenizer (a Hub id or a folder) grows to its
    size; the change is returned in words. ModelError if the tokenizer or the config cannot be read.
    """
    model_spec(config, where="--shape")
    loaded = load_tokenizer(fetch_without_weights(tokenizer), Model(name=str(folder)))
    values = copy.deepcopy(dict(config))
    text = values.get("text_config", values)
    # The ids of the shape's own tokenizer mean nothing with another one.
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[token] = getattr(loaded, token)
    change = ""
    size = len(loaded)
    rows = text["vocab_size"]
    if size > rows:
        text["vocab_size"] = size
        change = f"vocabulary of {size:,} instead of {rows:,}: the tokenizer's ids must fit"
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    loaded.save_pretrained(folder)
    return change


def shape_recipe(folder: Path, *, data: str, rows: str, overrides: Sequence[str]) -> Run:
    """The checked recipe of a shape whose model folder is `folder`.

    Its file is written beside that folder. Raises as `load_recipe`, and UsageError if an override
    names another model or tokenizer.

    Args:
        data: the rows, a file or a Hub id.
        rows: their format.
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
    # A key of the command line may have named another model.
    if (run.model.name, run.model.tokenizer) != (str(folder), None):
        what = "the model and tokenizer of a shape cannot be overridden"
        why = "the model is the shape with random weights, and its folder contains the tokenizer"
        fix = "--shape NAME --tokenizer DIR_OR_ID; or give a recipe instead of --shape"
        raise UsageError(what, where="command line: model.name, model.tokenizer", why=why, fix=fix)
    return run

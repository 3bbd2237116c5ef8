"""Smallest configurations of the tools, and what `tunesmith import` makes of one."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunesmith.tools.importers.source_config import read_config, table
from tunesmith.tools.importers.translate import translate
from tunesmith.tools.importers.translation import Note, Translation

BASES: dict[str, dict[str, Any]] = {
    "torchtune": {
        "model": {"_component_": "torchtune.models.llama3.lora_llama3_8b"},
        "checkpointer": {"checkpoint_dir": "/m/Llama-3"},
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"},
        "optimizer": {"lr": 1e-4},
        "batch_size": 1,
    },
    "axolotl": {
        "base_model": "m/m",
        "datasets": [{"path": "d/d", "type": "alpaca"}],
        "learning_rate": 1e-4,
    },
    "llamafactory": {"model_name_or_path": "m/m", "dataset": "d", "template": "qwen"},
    "trl": {"model_name_or_path": "m/m", "dataset_name": "d/d"},
}
ROWS = {"data.train.source": "rows.jsonl"}


def translated(tool: str, values: dict[str, Any], folder: Path) -> Translation:
    """What is made of these keys, with the rows given on the command line."""
    return translated_text(tool, json.dumps(values), folder, **ROWS)


def translated_text(tool: str, text: str, folder: Path, **overrides: Any) -> Translation:
    """What is made of a file with this text, and these recipe keys beside it."""
    path = folder / "file.yaml"
    path.write_text(text)
    overrides = {"train.global_batch": "1 examples", **overrides}
    return translate(read_config(path, tool), overrides, None)


def notes_by_key(recipe: Translation) -> dict[str, Note]:
    return recipe.notes


def knows(tool: str, name: str) -> bool:
    """Return whether the table of a tool has a key."""
    content = table(tool)
    known = {*content["keys"], *content["defaults"]}
    for section in (content, *content["when"]):
        known |= {rule[0] for rule in section.get("rules", [])}
        known |= {*section.get("refused", {}), *section.get("implied", {})}
    patterns = [p for part in ("nothing", "differs") for ps in content[part].values() for p in ps]
    return name in known or any(fnmatchcase(name, pattern) for pattern in patterns)

"""Smallest configurations of the tools, and what `tunesmith import` makes of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunesmith.tools.importers.source_config import read_config, table
from tunesmith.tools.importers.translate import translate
from tunesmith.tools.importers.translation import Translation

# The first word of a name is the tool.
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
    "llamafactory": {"model_name_or_path": "m/m", "template": "qwen", "cutoff_len": 512},
    "trl": {"model_name_or_path": "m/m", "dataset_name": "d/d"},
}
BASES["axolotl documents"] = {"base_model": "m/m", "learning_rate": 1e-4}
BASES["axolotl pairs"] = BASES["axolotl"] | {
    "datasets": [{"path": "d/d", "type": "chat_template.argilla_chat"}],
    "adapter": "lora",
    "lora_dropout": 0.1,
}
BASES["llamafactory pairs"] = BASES["llamafactory"] | {"stage": "dpo", "lora_dropout": 0.1}
BASES["trl pairs"] = BASES["trl"] | {"use_peft": True}


def translated(
    base: str, values: dict[str, Any], folder: Path, given: Mapping[str, str] = {}
) -> Translation:
    """What is made of a file with these keys beside those of the base."""
    text = json.dumps(BASES[base] | values)
    return translated_text(base.partition(" ")[0], text, folder, given)


def translated_text(
    tool: str, text: str, folder: Path, given: Mapping[str, str] = {}
) -> Translation:
    """What is made of a file with this text, and these recipe keys beside it."""
    path = folder / "file.yaml"
    path.write_text(text)
    return translate(read_config(path, tool), {"train.global_batch": "1 examples", **given}, None)


def knows(tool: str, name: str) -> bool:
    """Return whether the table of a tool has a key."""
    content = table(tool)
    known = {*content["keys"], *content["defaults"]}
    for section in (content, *content["when"]):
        known |= {rule[0] for rule in section.get("rules", [])}
        known |= {*section.get("refused", {}), *section.get("implied", {})}
    patterns = [p for part in ("nothing", "differs") for ps in content[part].values() for p in ps]
    return name in known or any(fnmatchcase(name, pattern) for pattern in patterns)

"""Recurrent layers that run by document, and attention in chunks, on several ranks: the numbers of
one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data_parallel import COPY, FULL, LORA, SHARD, assert_those_of_one_process

import vision_models

pytestmark = pytest.mark.slow

# Settings of the text part: with 4 layers the last one of Llama 4 attends to the whole document.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5": {},
    "llama4": {"num_hidden_layers": 4, "floor_scale": 4},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "lora, copies": (LORA, COPY),
    "full, shards": (FULL, SHARD),
}


@pytest.mark.parametrize("model_type", MODELS)
def test_two_ranks_are_one_process(model_type: str, tiny: Path, tmp_path: Path) -> None:
    model = vision_models.build(model_type, tmp_path / "model", tiny, **MODELS[model_type])
    assert_those_of_one_process(2, CASES, model, tmp_path)

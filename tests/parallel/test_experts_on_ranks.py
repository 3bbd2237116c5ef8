"""A mixture with an adapter on its experts, on two ranks: the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data_parallel import LORA, assert_those_of_one_process

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "copies": (LORA, {"replicate": 2}),
    "shards": (LORA, {"shard": 2}),
    "shards, recomputed": ({"train": {"recompute": "full"}}, {"shard": 2}),
}


def test_copies_and_shards_are_as_one_process(mixture: Path, tmp_path: Path) -> None:
    assert_those_of_one_process(2, CASES, mixture, tmp_path)

"""A mixture with an adapter on its experts, on several ranks: the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data_parallel import LORA, assert_those_of_one_process

pytestmark = pytest.mark.slow

# By the number of ranks. What divides experts is counted in the other keys already.
CASES: dict[int, dict[str, tuple[dict[str, Any], dict[str, int]]]] = {
    2: {
        "copies": (LORA, {"replicate": 2}),
        "shards": (LORA, {"shard": 2}),
        "shards, recomputed": ({"train": {"recompute": "full"}}, {"shard": 2}),
        "copies, experts over ranks": (LORA, {"replicate": 2, "experts": 2}),
        "shards, experts over ranks": (
            {"train": {"recompute": "full"}},
            {"shard": 2, "experts": 2},
        ),
    },
    4: {
        "copies of shards": (LORA, {"replicate": 2, "shard": 2}),
        "experts over all": (LORA, {"replicate": 4, "experts": 4}),
        "copies of experts over ranks": (
            {"train": {"clip_norm": 0.05}},
            {"replicate": 2, "shard": 2, "experts": 2},
        ),
    },
}


@pytest.mark.parametrize("world", list(CASES))
def test_copies_shards_and_experts_over_ranks_are_as_one_process(
    world: int, mixture: Path, tmp_path: Path
) -> None:
    assert_those_of_one_process(world, CASES[world], mixture, tmp_path)

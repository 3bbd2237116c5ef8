"""A mixture on several ranks, with an adapter on its experts or trained in full: the numbers of one
process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cut_families import write_model
from test_data_parallel import BITES, FULL, LORA, assert_those_of_one_process

from recipes import merge

pytestmark = pytest.mark.slow

# By the number of ranks.
CASES: dict[int, dict[str, tuple[dict[str, Any], dict[str, int]]]] = {
    2: {
        "shards": (LORA, {"shard": 2}),
        "tensor, recomputed": (
            {"train": {"recompute": "full"}},
            {"tensor": 2},
        ),
        "full, tensor": (merge(FULL, BITES), {"tensor": 2}),
    },
    4: {
        "copies of shards": (
            {"train": {"clip_norm": 0.05, "recompute": "full"}},
            {"replicate": 2, "shard": 2},
        ),
        "shards of a tensor group": (
            {"adapter": {"modules_to_save": ["experts"], "target": ["q_proj"]}},
            {"shard": 2, "tensor": 2},
        ),
    },
}


@pytest.mark.parametrize("world", list(CASES))
def test_every_mesh_trains_a_mixture_as_one_process_does(
    world: int, mixture: Path, tmp_path: Path
) -> None:
    assert_those_of_one_process(world, CASES[world], mixture, tmp_path)


def test_four_ranks_that_cut_attention_are_as_one_process(tiny: Path, tmp_path: Path) -> None:
    """Sinks, biases, and one expert a rank; `make families` cuts every type in two."""
    sizes = {
        "num_key_value_heads": 4, "num_experts_per_tok": 2, "num_local_experts": 4,
        "sliding_window": 16,
    }  # fmt: skip
    model = write_model("gpt_oss", tmp_path / "model", tiny, **sizes)
    case = {"gpt_oss": (merge(FULL, BITES), {"tensor": 4})}
    assert_those_of_one_process(4, case, model, tmp_path)

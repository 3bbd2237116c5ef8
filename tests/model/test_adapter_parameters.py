"""What an adapter trains, from a config alone, against the model on meta; and what tensor-parallel
ranks have of it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.adapter.lora import attach_lora, count_adapter_parameters
from tunesmith.config.schema import Adapter
from tunesmith.model.spec import ModelSpec, adapter_parameters, read_spec

from . import families

ADAPTERS = [
    Adapter(),
    Adapter(rank=3, target=("o_proj", "down_proj"), modules_to_save=("embed_tokens",)),
    Adapter(rank=4, target=("o_proj", "lm_head")),
]


def spec_of(name: str) -> tuple[ModelSpec, AutoConfig]:
    config = families.tiny_config(name)
    return read_spec(config.to_dict(), where=name), config


@pytest.mark.parametrize("name", families.VARIANTS)
def test_counted_as_on_the_model(name: str) -> None:
    spec, config = spec_of(name)
    for adapter in ADAPTERS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        attach_lora(model, adapter, seed=0)
        assert adapter_parameters(spec, adapter) == count_adapter_parameters(model, adapter) > 0


def test_ranks_of_a_tensor_group_cut_b_of_columns_and_a_of_rows() -> None:
    """By hand, for 64 channels of 8 heads and 4 key-value heads, a width of 96, rank 8, 3 layers
    and 2 ranks.
    """
    whole = 64 * 5 + 64 + 64  # A of q, k, v, gate, up; B of o and down
    cut = (64 + 32 + 32 + 96 + 96) + (64 + 96)  # B of q, k, v, gate, up; A of o and down
    spec, _ = spec_of("llama")
    assert adapter_parameters(spec, Adapter(rank=8), 1) == 3 * 8 * (whole + cut)
    assert adapter_parameters(spec, Adapter(rank=8), 2) == 3 * 8 * (whole + cut // 2)

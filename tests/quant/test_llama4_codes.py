"""Llama 4's experts in nf4: a scheme finds their stacks, and a plan counts them as they are computed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.build_model import define_model
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Adapter
from tunesmith.model.experts import find_experts
from tunesmith.model.measured_spec import measure_spec
from tunesmith.model.model_types import TUNED_SUPPORT
from tunesmith.model.text_config import read_configs
from tunesmith.planning.measured_layers import measure_activations

EXPERTS, HIDDEN, WIDTH, LAYERS = 4, 64, 96, 2
TINY = {
    "model_type": "llama4_text", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "intermediate_size_mlp": 96,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "vocab_size": 128, "attention_chunk_size": 64,
}  # fmt: skip


def test_the_stacks_are_quantized_and_have_their_adapter() -> None:
    pytest.importorskip("bitsandbytes")
    run = from_mapping(
        {
            "model": {"name": "m", "dtype": "bf16", "quantize": "nf4"},
            "data": {"train": {"source": "rows.jsonl"}},
            "output_dir": "out",
        },
        where="test",
        base=Path.cwd(),
    )
    config, _ = read_configs(TINY, where="test")
    files = SimpleNamespace(
        config=config,
        model=run.model,
        vocab_rows=128,
        support=TUNED_SUPPORT,
        form=None,
        full_config=None,
    )
    model = define_model(run, files)  # type: ignore[arg-type]
    found = find_experts(model)
    assert len(found) == LAYERS
    for experts in found.values():
        assert all(experts.codes(name) for name in experts.stack_names)
    assert len([*expert_updates(model)]) == 2 * LAYERS


def test_a_plan_counts_the_experts_that_a_token_chose() -> None:
    spec = measure_spec(TINY, where="test")
    of_expert = 3 * HIDDEN * WIDTH
    for layer in spec.layers:
        assert (layer.expert_count, layer.experts_per_token) == (EXPERTS, 1)
        assert layer.active - layer.matmul == of_expert
    assert spec.expert_stacks == LAYERS * EXPERTS * of_expert
    kept = measure_activations(spec, Adapter(kind="lora", rank=2, target=("experts",)), "bf16")
    adapter = 2 * LAYERS * EXPERTS * (HIDDEN + 2 * WIDTH + WIDTH + HIDDEN)
    assert (kept.adapter, kept.active) == (adapter, adapter // EXPERTS)

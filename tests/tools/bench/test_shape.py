"""Each shape of the table, cut down, trains from config and tokenizer to random weights and steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from errors import holds
from recipes import rows
from tunesmith.model.shapes import SHAPES
from tunesmith.tools.bench.measure import BenchPlan, measure
from tunesmith.tools.bench.shape import shape_recipe, write_shape

DELTA = {
    "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25},
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 384,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Of shapes that have other sizes too.
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "gemma-4-31b": {"global_head_dim": 32, "num_global_key_value_heads": 2},
    "gemma-4-12b": {"global_head_dim": 32, "num_global_key_value_heads": 1},
    "mistral-small-4": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 8,
        "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    "nemotron-3-nano": {
        "hybrid_override_pattern": "ME*E", "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 32,
        "n_groups": 2, "ssm_state_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    },
    "qwen3.5-9b": DELTA,
    "qwen3.5-4b": DELTA,
    "qwen3.8-27b": DELTA,
    "qwen3-30b-a3b": EXPERTS,
    "qwen3.6-35b-a3b": DELTA | EXPERTS | {"shared_expert_intermediate_size": 32},
    "gpt-oss-20b": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma-4-26b-a4b": EXPERTS | {"global_head_dim": 32, "num_global_key_value_heads": 2, "top_k_experts": 2},
    "llama-4-scout": {"num_local_experts": 4, "intermediate_size_mlp": 96},
}  # fmt: skip
TIER_1 = ("llama3-8b", "qwen3-8b", "mistral-7b", "qwen3-30b-a3b")
# Linear layers of one family on nf4 are those of any other. Cut down, gpt-oss-120b is gpt-oss-20b.
CASES = [("llama3-8b", "nf4"), *((name, "none") for name in SHAPES if name != "gpt-oss-120b")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantize"),
    [pytest.param(*case, marks=() if case[0] in TIER_1 else pytest.mark.nightly) for case in CASES],
)
def test_every_shape_trains(name: str, quantize: str, tiny: Path, tmp_path: Path) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    folder, out, data = tmp_path / "model", tmp_path / "run", tmp_path / "rows.jsonl"
    folder.mkdir()
    out.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    config = dict(SHAPES[name].config)
    sizes = SIZES | OTHER_SIZES.get(name, {})
    if "text_config" in config:
        config["text_config"] = config["text_config"] | sizes
    else:
        config |= sizes
    write_shape(folder, config, str(tiny))
    assert not list(folder.glob("*.safetensors"))
    keys = ["data.seq_len=128", "train.global_batch=256 tokens", "train.micro_batch=256 tokens"]
    keys.append(f"model.quantize={quantize}")
    run = shape_recipe(folder, data=str(data), rows="prompt-completion", overrides=keys)
    adapter = (run.adapter.kind, run.adapter.rank, run.adapter.alpha, run.adapter.target)
    assert adapter == ("lora", 8, 16, "all-linear")
    found = measure(BenchPlan(run, steps=2, warmup=1, weights="random"), out).figures
    assert found.tokens > 0
    # Untrained: near the entropy of an even guess among the rows of the head, ln 384 = 5.95.
    assert found.first_loss == pytest.approx(5.95, abs=0.3)


def test_a_vocabulary_too_small_for_the_tokenizer_grows_and_that_is_told(
    tiny: Path, tmp_path: Path
) -> None:
    given = {**SHAPES["llama3-8b"].config, **SIZES, "vocab_size": 100}
    changed = write_shape(tmp_path, given, str(tiny))
    config = json.loads((tmp_path / "config.json").read_text())
    size = len(AutoTokenizer.from_pretrained(tiny))
    assert config["vocab_size"] == size > 100
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == size
    assert holds(changed, size, 100)

"""A config.json that is damaged: an error with its place and a fix, within a second or two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model.load import build_on_meta, load_configs
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.support import find_support
from vision_models import FAMILIES, TEXT

from .families import SMALL

EXPERTS = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = ["sliding_attention", "full_attention", "full_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "gpt_oss": {**EXPERTS, "head_dim": 16, "layer_types": KINDS},
    "llama4_text": {
        **EXPERTS,
        "head_dim": 16,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
    },
    "gemma4_text": {**SMALL, "head_dim": 16, "layer_types": KINDS, "num_kv_shared_layers": 0},
    "deepseek_v3": {
        **SMALL,
        "num_key_value_heads": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
    },
    "nemotron_h": {
        **SMALL,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "qwen3_5_text": {**SMALL, "head_dim": 16, "layer_types": ["linear_attention"] * 3},
    "falcon": SMALL,
    "llama": SMALL,
    "gemma3": {
        "text_config": {**TEXT, **FAMILIES["gemma3"][0], "model_type": "gemma3_text"},
        "vision_config": FAMILIES["gemma3"][1],
    },
}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"model_type": "mixtrol"}, "mixtrol"),
    ("mixtral", {"model_type": ["mixtral"]}, "model_type"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ("mixtral", {"attention_dropout": 1e300}, "attention_dropout is 1e+300"),
    ("mixtral", {"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
    ("mixtral", {"hidden_size": "64"}, "hidden_size is '64'"),
    ("mixtral", {"hidden_size": -64}, "hidden_size is -64"),
    ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("mixtral", {"num_hidden_layers": float("nan")}, "num_hidden_layers is nan"),
    ("mixtral", {"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000"),
    ("mixtral", {"num_local_experts": 10**9}, "num_local_experts is 1000000000"),
    ("mixtral", {"num_attention_heads": [4, "4"]}, "num_attention_heads is '4'"),
    (
        "gemma3",
        {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10**9}},
        "text_config.num_hidden_layers is 1000000000",
    ),
    ("mixtral", {"num_hidden_layers": 0}, "0 layers"),
    ("mixtral", {"num_attention_heads": 3, "num_key_value_heads": 2}, "RuntimeError"),
    ("mixtral", {"pad_token_id": 10**6}, "Padding_idx"),
    ("mixtral", {"hidden_act": "spline"}, "spline"),
    ("mixtral", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ("mixtral", {"rope_parameters": [1, 2]}, "rope_parameters"),
    ("mixtral", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("inf")}},
        "infinity",
    ),
    ("mixtral", {"quantization_config": "int4"}, "quantization_config is 'int4'"),
    ("mixtral", {"auto_map": {"AutoConfig": "x.X"}, "model_type": "mine"}, "trust"),
    ("gpt_oss", {"layer_types": ["odd_attention", *KINDS[1:]]}, "layer_types"),
    ("gemma4_text", {"per_layer_config": {"first": {"head_dim": 32}}}, "'first'"),
    ("gemma4_text", {"per_layer_config": [1]}, "'list' object"),
    ("deepseek_v3", {"kv_lora_rank": -1}, "RuntimeError"),
    ("nemotron_h", {"layers_block_type": ["mamba", "magic"]}, "magic"),
    ("qwen3_5_text", {"layer_types": "linear_attention"}, "layer_types"),
    ("falcon", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("llama", {"head_dim": float("inf")}, "head_dim is inf"),
    ("gemma3", {"text_config": None}, "no text_config"),
    ("gemma3", {"text_config": [1]}, "text_config is [1]"),
    ("gemma3", {"text_config": {"model_type": "gemma3_text", "quantization_config": "x"}}, "'x'"),
]


def write(folder: Path, model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    """A folder with a tiny config.json of a type, over which `values` are laid."""
    stated = {"model_type": model_type, **CONFIGS[model_type], **values}
    (folder / "config.json").write_text(json.dumps(stated))
    return stated


def read(folder: Path) -> None:
    """What a run reads of a config before its weights."""
    model = Model(name=str(folder), dtype="fp32")
    config, _ = load_configs(folder, model)
    model_spec(config.to_dict(), where=str(folder))
    find_support(config, model, where=str(folder))
    build_on_meta(config, model)


def failure_of(call: Callable[..., object], *args: object, **options: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        call(*args, **options)
    return caught.value


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("model_type", "values", "fact"), CASES)
def test_a_damaged_config_is_refused(
    model_type: str, values: dict[str, Any], fact: str, tmp_path: Path
):
    write(tmp_path, model_type, values)
    error = failure_of(read, tmp_path)
    assert fact in f"{error.what} {error.why} {error.fix}"
    assert str(tmp_path) in error.where
    assert error.fix


def test_a_plan_refuses_what_it_cannot_count(tmp_path: Path):
    """It has config.json as it stands, before Transformers fills in anything."""
    refused = 0
    for model_type, values, _ in CASES:
        # What only shows where the model is built with a recipe's tokens.
        if "pad_token_id" in values:
            continue
        stated = write(tmp_path, model_type, values)
        error = failure_of(model_spec, stated, where="here")
        assert (error.where, bool(error.fix)) == ("here", True), values
        refused += 1
    assert refused == len(CASES) - 1

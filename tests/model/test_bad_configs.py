"""A config.json that is damaged: an error with its place and a fix, within a second or two."""

from __future__ import annotations

import json
from typing import Any

import pytest

from errors import refuses
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model.arch.load import build_on_meta, load_configs
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.model.measuring.support import find_support
from vision_models import FAMILIES, TEXT

from .families import SMALL

EXPERTS = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA3_TEXT = {**TEXT, **FAMILIES["gemma3"][0], "model_type": "gemma3_text"}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "falcon": SMALL,
    "llama": SMALL,
    "gemma3": {"text_config": GEMMA3_TEXT, "vision_config": FAMILIES["gemma3"][1]},
}  # fmt: skip
EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
# Type, what config.json says, and a value of the error.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"model_type": "mixtrol"}, "mixtrol"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    ("mixtral", {"hidden_size": "64"}, "hidden_size is '64'"),
    ("mixtral", {"num_hidden_layers": float("nan")}, "num_hidden_layers is nan"),
    ("mixtral", {"num_attention_heads": [4, "4"]}, "num_attention_heads is '4'"),
    ("mixtral", {"hidden_act": "spline"}, "spline"),
    ("mixtral", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    ("mixtral", {"quantization_config": "int4"}, "quantization_config is 'int4'"),
    ("mixtral", {"auto_map": {"AutoConfig": "x.X"}, "model_type": "mine"}, "trust"),
    ("falcon", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("llama", {"model_type": "bert"}, "encoder"),
    ("llama", {"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    ("llama", {"model_type": "gemma3_text", "use_bidirectional_attention": True}, "encoder"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ("llama", {"quantization_config": EIGHT_BIT}, "8-bit"),
    ("llama", {"quantization_config": FP4}, "fp4"),
    ("llama", {"num_key_value_heads": 3}, "share"),
    ("gemma3", {"text_config": None}, "text_config"),
    ("gemma3", {"text_config": {"model_type": "gemma3_text", "quantization_config": "x"}}, "'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "values", "fact"), CASES)
def test_a_damaged_config_is_refused(model_type, values, fact, tmp_path, monkeypatch):
    """By a run, and by a plan, which has config.json before Transformers fills in anything."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    stated = {"model_type": model_type, **CONFIGS[model_type], **values}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    model = Model(name=str(tmp_path), dtype="fp32")
    with refuses(ModelError) as caught:
        config, _ = load_configs(tmp_path, model)
        model_spec(config.to_dict(), where=str(tmp_path))
        find_support(config, model, where=str(tmp_path))
        build_on_meta(config, model)
    error = caught.value
    assert fact in f"{error.what} {error.why} {error.fix}"
    assert str(tmp_path) in error.where
    assert error.fix
    with refuses(ModelError, where="here") as caught:
        model_spec(stated, where="here")
    assert caught.value.fix

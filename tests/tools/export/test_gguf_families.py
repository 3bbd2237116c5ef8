"""The header and the rows of each family; what llama.cpp computes otherwise is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from errors import holds, refuses
from export.tiny_gguf import (
    LINEAR,
    LLAMA3,
    YARN,
    byte_level,
    header_of,
    plan_of,
    random_model,
    rows_of,
    structure_of,
    tensor_rows,
)
from tunesmith.errors import ModelError, RecipeError
from tunesmith.tools.export.gguf.families import read_family
from tunesmith.tools.export.gguf.plan import plan_gguf


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(structure_of("gpt-2"))


HEADERS = {
    "gemma3_text": {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 16, "attention.key_length": 16},
    "granite": {"logit_scale": 4.0, "embedding_scale": 3.0, "residual_scale": 0.5, "attention.scale": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("variant", HEADERS)
def test_the_header_has_the_config(variant: str, tokenizer, tmp_path: Path) -> None:
    header = header_of(plan_of(random_model(variant), tokenizer), tmp_path)
    arch = header["general.architecture"]
    assert variant.startswith(arch)
    for key, value in HEADERS[variant].items():
        assert header[f"{arch}.{key}"] == pytest.approx(value), key
    assert "granite.attention.key_length" not in header


def test_windows_and_long_factors_that_llama_cpp_lacks_are_noted(tokenizer) -> None:
    assert plan_of(random_model("mistral"), tokenizer).notes == ()
    (note,) = plan_of(random_model("mistral", sliding_window=16), tokenizer).notes
    assert holds(note, 16)
    (note,) = plan_of(random_model("phi3-long"), tokenizer).notes
    assert "-c 64" in note


@cache
def config_of(variant: str) -> dict:
    return random_model(variant).config.to_dict()


REFUSED = {
    "another family": ("llama", {"model_type": "qwen3_moe"}, "qwen3_moe"),
    "dynamic rope": ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_type = dynamic"),
    "llama3 rope of qwen2": ("qwen2", {"rope_parameters": LLAMA3}, "rope_type = llama3"),
    "llama3 rope of smollm3": ("smollm3", {"rope_parameters": LLAMA3}, "rope_type = llama3"),
    "yarn of gemma": ("gemma2", {"rope_parameters": YARN}, "rope_type = yarn"),
    "a factor of yarn": ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor = 2.0"),
    "mscale of yarn": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0}}, "mscale = 1.0"),
    "a part of the head rotated": ("llama", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    "other activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu"),
    "other layers without rope": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "no_rope_layers"),
    "other windows": ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    "other scale": ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
    "no soft cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = None"),
    "no cap of logits": ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping = None"),
    "a soft cap": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
}  # fmt: skip


@pytest.mark.parametrize(("variant", "change", "what"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(variant, change, what: str) -> None:
    config = config_of(variant)
    read_family(config)
    with pytest.raises(ModelError, match=what) as error:
        read_family({**config, **change})
    assert error.value.fix


def test_the_first_gemma_is_taken_as_it_was_meant() -> None:
    assert read_family({**config_of("gemma"), "hidden_act": "gelu"}).arch == "gemma"


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("olmo2", "model.layers.0.self_attn.q_proj.bias"),
        ("gemma2", "lm_head.weight"),
        ("llama", "model.layers.0.extra.weight"),
    ],
)
def test_a_weight_without_a_place_is_refused(variant: str, name: str, tokenizer) -> None:
    model = random_model(variant)
    weights = {**rows_of(model), name: tensor_rows(torch.zeros(128))}
    with refuses(ModelError, names=[name], fix=["tunesmith merge RUN"]):
        plan_gguf(model.config.to_dict(), weights, tokenizer, quant="f16", name="tiny")


def test_an_unknown_quantization_is_refused(tokenizer) -> None:
    with pytest.raises(RecipeError, match="'q3_k'"):
        plan_of(random_model("llama"), tokenizer, "q3_k")

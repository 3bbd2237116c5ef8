"""A LoRA as GGUF, by tunesmith's own code and by llama.cpp's script; what it cannot say is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig

from errors import refuses
from export.tiny_gguf import random_model, tensor_rows
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf import converted_adapter as module
from tunesmith.tools.export.gguf.adapter import AdapterTarget, plan_adapter
from tunesmith.tools.export.gguf.converted_adapter import plan_converted_adapter
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.plan import GgufPlan
from tunesmith.tools.export.gguf.write import write_gguf


def adapter_of(variant: str, **settings: object) -> tuple[dict, dict, dict[str, torch.Tensor]]:
    """The base's config, PEFT's settings and PEFT's tensors of a random adapter."""
    model = random_model(variant)
    config = LoraConfig(r=4, lora_alpha=6, **{"target_modules": "all-linear", **settings})
    tuned = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    tensors = {name: t.contiguous() for name, t in get_peft_model_state_dict(tuned).items()}
    return model.config.to_dict(), config.to_dict(), tensors


def plan_of_adapter(config: dict, settings: dict, tensors: dict, **more: int) -> GgufPlan:
    rows = {name: tensor_rows(tensor) for name, tensor in tensors.items()}
    adapter = Adapter(
        rank=settings["r"], alpha=settings["lora_alpha"], rslora=settings["use_rslora"]
    )
    return plan_adapter(config, rows, AdapterTarget("tiny", adapter, **more))


BIAS = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"


@pytest.mark.parametrize(
    ("variant", "settings", "name"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ("llama-3", {"bias": "lora_only", "target_modules": ["q_proj"]}, "bias"),
        ("llama", {"use_dora": True, "target_modules": ["q_proj"]}, "lora_magnitude_vector"),
        ("llama-tied", {"target_modules": ["lm_head"]}, "tied"),
        ("llama", {"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_what_was_trained_beside_matrices_is_refused(variant, settings, name) -> None:
    config, peft_settings, tensors = adapter_of(variant, **settings)
    if "bias" in settings:  # which PEFT saves from 0.21 on
        tensors[BIAS] = torch.ones(128)
    with pytest.raises(ModelError, match=name) as error:
        plan_of_adapter(config, peft_settings, tensors)
    assert "without --adapter" in error.value.fix


def test_an_untied_head_and_a_model_without_a_bias_can_be_adapted() -> None:
    config, settings, tensors = adapter_of("llama", target_modules=["lm_head"], bias="all")
    names = [tensor.name for tensor in plan_of_adapter(config, settings, tensors).tensors]
    assert sorted(names) == ["output.weight.lora_a", "output.weight.lora_b"]
    with refuses(ModelError, names=["2 added"]):
        plan_of_adapter(config, settings, tensors, added_tokens=2)


TARGET = AdapterTarget("tiny", Adapter(rank=4, alpha=6.0, rslora=True))
SMALL_MOE: dict[str, Any] = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "num_experts": 4,
    "moe_intermediate_size": 32, "architectures": ["Qwen3MoeForCausalLM"],
}  # fmt: skip


def plan_of_moe(
    tensors: Mapping[str, torch.Tensor],
    converter: Converter,
    model_type: str = "qwen3_moe",
    **more: Any,
) -> Any:
    config = AutoConfig.for_model(model_type, **SMALL_MOE)
    rows = {name: tensor_rows(tensor) for name, tensor in tensors.items()}
    target = replace(TARGET, **more)
    return plan_converted_adapter(config.to_dict(), config, rows, target, converter)


def matrices(layer: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    prefix = f"base_model.model.{layer}"
    return {
        f"{prefix}.lora_A.weight": torch.randn(4, columns),
        f"{prefix}.lora_B.weight": torch.randn(rows, 4),
    }


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.nightly
def test_alpha_is_that_of_rslora_and_values_are_those_of_the_run(converter, tmp_path):
    """llama.cpp divides alpha by the rank, and rsLoRA by its root: 6 * sqrt(4) = 12."""
    tensors = matrices(QUERY, 128, 64)
    plan = plan_of_moe(tensors, converter)
    write_gguf(plan, tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 12.0
    assert reader.fields["general.architecture"].contents() == "qwen3moe"
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert stored.keys() == {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"}
    low, high = tensors.values()
    assert torch.equal(stored["blk.0.attn_q.weight.lora_a"], low.half())
    assert torch.equal(stored["blk.0.attn_q.weight.lora_b"], high.half())


NOT_APPLIED: list[tuple[str, dict[str, int], str]] = [
    ("model.layers.0.mlp.experts", {}, "experts"),
    ("model.layers.0.mlp.experts.base_layer", {}, "experts"),
    ("model.layers.0.mlp.experts.1.up_proj", {}, "experts"),
    ("model.embed_tokens", {}, "embedding"),
    ("model.per_layer_model_projection", {}, "per_layer_model_projection"),
    (QUERY, {"added_tokens": 2}, "2 added tokens"),
]


@pytest.mark.parametrize(("layer", "more", "what"), NOT_APPLIED)
def test_what_llama_cpp_does_not_apply_is_refused(layer, more, what, tmp_path):
    unused = Converter(tmp_path, tmp_path, "")
    with refuses(ModelError, where="--adapter", names=[what], fix=["without --adapter"]):
        plan_of_moe(matrices(layer, 8, 64), unused, **more)


def test_a_family_or_a_converter_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    """llama.cpp multiplies by some weights of DeepSeek without their adapters."""
    unused = Converter(tmp_path, tmp_path, "")
    with refuses(ModelError, names=["deepseek_v3"], fix=["without --adapter"]):
        plan_of_moe(matrices(QUERY, 128, 64), unused, "deepseek_v3")
    with refuses(ModelError, where=str(tmp_path), names=[module.SCRIPT], fix=["--converter"]):
        plan_of_moe(matrices(QUERY, 128, 64), unused)

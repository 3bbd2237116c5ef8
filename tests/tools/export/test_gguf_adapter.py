"""A LoRA as GGUF: names, scaling, rows in their places, and what cannot be said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from errors import refuses
from export.tiny_gguf import header_of, random_model, tensor_rows
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf.adapter import AdapterTarget, plan_adapter
from tunesmith.tools.export.gguf.families import pair_neighbors
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


def test_rows_of_b_change_places_and_a_stays(tmp_path: Path) -> None:
    import gguf

    config, settings, tensors = adapter_of("llama")
    plan = plan_of_adapter(config, settings, tensors)
    write_gguf(plan, tmp_path / "x.gguf")
    stored = {}
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        stored[tensor.name] = torch.from_numpy(tensor.data.copy())
    assert len(stored) == len(tensors) == 2 * 7 * 2
    prefix = "base_model.model.model.layers.1"
    low = tensors[f"{prefix}.self_attn.k_proj.lora_A.weight"]
    high = tensors[f"{prefix}.self_attn.k_proj.lora_B.weight"]
    assert torch.equal(stored["blk.1.attn_k.weight.lora_a"], low.half())
    assert torch.equal(stored["blk.1.attn_k.weight.lora_b"], pair_neighbors(high, 32).half())
    up = tensors[f"{prefix}.mlp.up_proj.lora_B.weight"]
    assert torch.equal(stored["blk.1.ffn_up.weight.lora_b"], up.half())


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 6.0), (True, 12.0)])
def test_alpha_is_that_of_llama_cpps_division_by_rank(rslora, alpha, tmp_path: Path) -> None:
    plan = plan_of_adapter(*adapter_of("qwen2", use_rslora=rslora))
    header = header_of(plan, tmp_path)
    assert header["adapter.lora.alpha"] == alpha
    assert header["general.type"] == "adapter"
    assert header["adapter.type"] == "lora"
    assert header["general.architecture"] == "qwen2"


@pytest.mark.parametrize(
    ("variant", "settings", "what"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight, which is not a LoRA matrix"),
        ("llama", {"bias": "all", "target_modules": ["q_proj"]}, None),
        ("llama-3", {"bias": "lora_only", "target_modules": ["q_proj"]}, "bias, which is not"),
        ("llama", {"use_dora": True, "target_modules": ["q_proj"]}, "lora_magnitude_vector"),
        ("llama-tied", {"target_modules": ["lm_head"]}, "tied to the embedding"),
        ("llama", {"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_what_was_trained_beside_matrices_is_refused(variant, settings, what) -> None:
    config, peft_settings, tensors = adapter_of(variant, **settings)
    if what is None:  # this model has no bias
        plan_of_adapter(config, peft_settings, tensors)
        return
    if settings.get("bias") == "lora_only":  # which PEFT saves from 0.21 on
        tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = torch.ones(
            128
        )
    with pytest.raises(ModelError, match=what) as error:
        plan_of_adapter(config, peft_settings, tensors)
    assert "without --adapter" in error.value.fix


def test_an_untied_head_can_be_adapted() -> None:
    config, settings, tensors = adapter_of("llama", target_modules=["lm_head"])
    names = [tensor.name for tensor in plan_of_adapter(config, settings, tensors).tensors]
    assert sorted(names) == ["output.weight.lora_a", "output.weight.lora_b"]


def test_added_tokens_are_refused() -> None:
    with refuses(ModelError, names=["2 added"]):
        plan_of_adapter(*adapter_of("llama"), added_tokens=2)

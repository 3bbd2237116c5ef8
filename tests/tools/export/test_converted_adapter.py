"""A LoRA through llama.cpp's script for adapters, and the same by tunesmith's own code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from errors import refuses
from export.test_gguf_adapter import adapter_of, plan_of_adapter
from export.tiny_gguf import tensor_rows
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.tools.export.gguf import converted_adapter as module
from tunesmith.tools.export.gguf.adapter import AdapterTarget
from tunesmith.tools.export.gguf.converted_adapter import plan_converted_adapter
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.write import write_gguf

TARGET = AdapterTarget("tiny", Adapter(rank=4, alpha=6.0, rslora=True))
SMALL_MOE: dict[str, Any] = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "num_experts": 4,
    "moe_intermediate_size": 32, "architectures": ["Qwen3MoeForCausalLM"],
}  # fmt: skip


def tensors_of(file: Path) -> dict[str, tuple[str, bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(file).tensors
    }


@pytest.mark.slow
def test_the_families_of_our_own_are_equal_to_the_script(
    converter: Converter, tmp_path: Path
) -> None:
    """One process for all of them: the script's imports take seconds."""
    families = [name for name, row in ARCHITECTURES.items() if row.gguf]
    assert len(families) == 11
    calls = []
    for family in families:
        config, settings, tensors = adapter_of(family)
        write_gguf(plan_of_adapter(config, settings, tensors), tmp_path / f"{family}.own.gguf")
        folder = tmp_path / family
        folder.mkdir()
        config["architectures"] = [
            AutoModelForCausalLM._model_mapping[
                type(AutoConfig.for_model(config["model_type"]))
            ].__name__
        ]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": 4}))
        save_file(tensors, folder / "adapter_model.safetensors")
        call = ["", str(converter.folder / module.SCRIPT), "--outtype", "f16", "--base"]
        calls.append([*call, str(folder), "--outfile", str(folder / "x.gguf"), str(folder)])
    code = (
        f"import sys\nfor call in {calls!r}:\n    sys.argv = call\n    exec({module._RUN_SCRIPT!r})"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=converter.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for family in families:
        own = tensors_of(tmp_path / f"{family}.own.gguf")
        assert own == tensors_of(tmp_path / family / "x.gguf"), family
        assert len(own) >= 16


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


@pytest.mark.slow
def test_alpha_is_that_of_rslora_and_values_are_those_of_the_run(
    converter: Converter, tmp_path: Path
) -> None:
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


@pytest.mark.slow
def test_the_reason_of_the_script_is_shown(converter: Converter) -> None:
    with refuses(ModelError, fix=["without --adapter"]) as caught:
        plan_of_moe(matrices("model.layers.0.self_attn.no_proj", 128, 64), converter)
    assert "no_proj" in caught.value.why


@pytest.mark.parametrize(
    ("layer", "more", "what"),
    [
        ("model.layers.0.mlp.experts", {}, "experts"),
        ("model.layers.0.mlp.experts.base_layer", {}, "experts"),
        ("model.layers.0.mlp.experts.1.up_proj", {}, "experts"),
        ("model.embed_tokens", {}, "embedding"),
        ("model.per_layer_model_projection", {}, "per_layer_model_projection"),
        (QUERY, {"added_tokens": 2}, "2 added tokens"),
    ],
)
def test_what_llama_cpp_does_not_apply_is_refused(
    layer: str, more: dict[str, int], what: str, tmp_path: Path
) -> None:
    unused = Converter(tmp_path, tmp_path, "")
    with refuses(ModelError, where="--adapter", names=[what], fix=["without --adapter"]):
        plan_of_moe(matrices(layer, 8, 64), unused, **more)


def test_an_architecture_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    """llama.cpp multiplies by some weights of DeepSeek without their adapters."""
    unused = Converter(tmp_path, tmp_path, "")
    with refuses(ModelError, names=["deepseek_v3"], fix=["without --adapter"]):
        plan_of_moe(matrices(QUERY, 128, 64), unused, "deepseek_v3")


def test_a_converter_without_the_script_is_refused(tmp_path: Path) -> None:
    unused = Converter(tmp_path, tmp_path, "")
    with refuses(ModelError, where=str(tmp_path), fix=["--converter"]) as caught:
        plan_of_moe(matrices(QUERY, 128, 64), unused)
    assert module.SCRIPT in caught.value.why

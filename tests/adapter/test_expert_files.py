"""Adapters of experts: opened by PEFT, and PEFT's opened here, in its stacked form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from errors import refuses
from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.model.tiny_model import build_tiny_model

# Stacks [experts, out, in] and [experts, in, out], with biases, and without a gate.
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "granitemoe", "llama4_text")


@pytest.fixture(
    params=[
        pytest.param(
            name,
            marks=pytest.mark.slow if name in ("qwen3_moe", "gpt_oss") else pytest.mark.nightly,
        )
        for name in FAMILIES
    ]
)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build_tiny_model(AutoConfig.for_model(request.param)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 60, (2, 11))).logits


def randomise(model: nn.Module) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def attached(base: Path, adapter: Adapter) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    lora.attach_lora(model, adapter, seed=0)
    return model.eval()


def test_peft_opens_ours_and_we_open_theirs(base: Path, tmp_path: Path) -> None:
    adapter = Adapter(rank=3, alpha=6, target=("q_proj", "experts"), rslora=True)
    model = attached(base, adapter)
    randomise(model)
    _, config = files = peft_files.adapter_files(model, adapter, "x", None)
    peft_files.write_adapter(tmp_path, *files)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    before = logits(plain)
    opened = logits(PeftModel.from_pretrained(plain, tmp_path).eval())
    ours = logits(model)
    assert (opened - ours).abs().max() < 2e-6 * ours.abs().max()
    assert (before - ours).abs().max() > 0.05 * ours.abs().max()

    settings = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=config["target_parameters"], task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = attached(base, peft_files.read_adapter(tmp_path / "theirs"))
    peft_files.load_adapter(model, tmp_path / "theirs")
    expected = logits(theirs)
    assert (logits(model) - expected).abs().max() < 2e-6 * expected.abs().max()


def test_one_stack_alone_is_refused(tmp_path: Path) -> None:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": []}
    settings["target_parameters"] = ["experts.down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with refuses(ModelError, names=["target_parameters"]):
        peft_files.read_adapter(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [("embed_tokens", "lm_head"), ("experts",)])
def test_modules_trained_in_full_beside_experts(saved: tuple[str, ...], tmp_path: Path) -> None:
    """Experts with an adapter beside an embedding in full, and experts in full beside an adapter."""
    base = tmp_path / "base"
    build_tiny_model(AutoConfig.for_model("qwen3_moe")).save_pretrained(base)
    target = ("q_proj",) if "experts" in saved else ("q_proj", "experts")
    adapter = Adapter(rank=3, alpha=6, target=target, modules_to_save=saved)
    model = attached(base, adapter)
    randomise(model)
    torch.manual_seed(4)
    for _, module, key in lora.saved_parameters(model):
        parameter = module.get_parameter(key)
        parameter.data += 0.05 * torch.randn_like(parameter)
    peft_files.write_adapter(tmp_path, *peft_files.adapter_files(model, adapter, "x", None))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    theirs = logits(PeftModel.from_pretrained(plain, tmp_path).eval())
    ours = logits(model)
    assert (theirs - ours).abs().max() < 2e-6 * ours.abs().max()
    again = attached(base, peft_files.read_adapter(tmp_path))
    peft_files.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), ours)

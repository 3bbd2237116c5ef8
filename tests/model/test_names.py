"""Experts that are stored one by one, and what a checkpoint holds beside its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tunesmith.checkpoint.contents import weights_of
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model import load
from tunesmith.model.save_tensors import save_sharded
from tunesmith.model.stored_form import in_stored_form
from tunesmith.model.weights import load_weights

from .families import SMALL

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "moe_intermediate_size": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "glm4_moe": {**ROUTED, "n_group": 1, "topk_group": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # renamed alone
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
}
NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


def build(model_type: str, folder: Path) -> Path:
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type]})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def read(folder: Path, dtype: str = "fp32") -> PreTrainedModel:
    spec = Model(name=str(folder), dtype=dtype)
    model = load.build_on_meta(AutoConfig.from_pretrained(folder), spec)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    return model


def change(folder: Path, *, without: str = "", **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rewrite the weights of a folder, and return them."""
    tensors = load_file(folder / "model.safetensors") | more
    tensors.pop(without, None)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_are_read_as_by_transformers_and_written_as_they_were(
    model_type: str, tmp_path: Path
) -> None:
    base = build(model_type, tmp_path / "base")
    model = read(base)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    state = model.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())

    before = load_file(base / "model.safetensors")
    assert before.keys() - state.keys(), "the base has other names than the model"
    written = tmp_path / "written"
    written.mkdir()
    save_sharded(written, in_stored_form(model, weights_of(model)))
    after = load_file(written / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_experts_are_converted_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path)
    for name, tensor in read(base).state_dict().items():
        assert torch.equal(read(base, "bf16").state_dict()[name], tensor.bfloat16()), name


def test_draft_heads_are_copied(tmp_path: Path) -> None:
    base = build("glm4_moe", tmp_path / "base")
    draft = torch.arange(6, dtype=torch.float64)
    change(base, **{"model.layers.46.eh_proj.weight": draft})
    model = read(base)
    save_sharded(tmp_path, in_stored_form(model, weights_of(model)))
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["model.layers.46.eh_proj.weight"], draft)


def test_a_base_that_is_gone_leaves_the_names_of_the_model(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path)
    model = read(base)
    (base / "model.safetensors").unlink()
    tensors = weights_of(model)
    assert in_stored_form(model, tensors).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("without", "more", "words"),
    [
        (NAME, {}, "cannot be combined"),
        (NAME.replace("up", "down"), {}, "with a different shape"),
        (NAME.replace("2.up", "3.down"), {}, "with a different shape"),
        ("", {NAME.replace("up", "down"): torch.zeros(24, 64)}, "cannot be combined"),
        ("", {"model.layers.1.mlp.extra.weight": torch.zeros(1)}, "not part of this model"),
    ],
    ids=["an expert's half", "an expert", "the last", "a turned expert", "a tensor too much"],
)
def test_what_does_not_fit_is_named(
    without: str, more: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    base = build("qwen3_moe", tmp_path)
    change(base, without=without, **more)
    with pytest.raises(ModelError, match=words):
        read(base)

"""Models and experts as we load and store them, beside those of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pairwise import name_of, pairwise
from tunesmith.checkpoint.contents import weights_of
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model.arch import load
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.weights.save_tensors import save_sharded
from tunesmith.model.weights.stored_form import in_stored_form
from tunesmith.model.weights.weights import load_weights

from . import families
from .families import SMALL, marked

pytestmark = pytest.mark.slow


def read(folder: Path, dtype: str = "fp32") -> PreTrainedModel:
    spec = Model(name=str(folder), dtype=dtype)
    model = load.build_on_meta(load.load_configs(folder, spec)[0], spec)
    assert all(p.is_meta for p in model.parameters())
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    return model.eval()


COVERED_LOADS = pairwise(
    {"family": [*families.VARIANTS], "dtype": ["fp32", "bf16"]},
    tier_1={"family": ["llama", "llama-3", "gemma3_text"], "dtype": ["fp32", "bf16"]},
)


@pytest.mark.parametrize("case", marked(COVERED_LOADS), ids=name_of)
def test_every_tensor_is_from_pretraineds(case: dict[str, str], tmp_path: Path) -> None:
    family, dtype = families.build(case["family"], tmp_path), case["dtype"]
    theirs = AutoModelForCausalLM.from_pretrained(family, dtype=DTYPES[dtype]).eval()
    mine = read(family, dtype)
    for kind in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(mine, kind)()), dict(getattr(theirs, kind)())
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert left[name].dtype == tensor.dtype, name
            assert torch.equal(left[name], tensor), name
            assert left[name].requires_grad == tensor.requires_grad
    tied = mine.get_input_embeddings().weight is mine.get_output_embeddings().weight
    assert tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)


SIZES: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**ROUTED, "n_group": 1, "topk_group": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # renamed alone
}
NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


def build(model_type: str, folder: Path) -> Path:
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type]})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def change(folder: Path, *, without: str = "", **more: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | more
    tensors.pop(without, None)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


LANES = [
    pytest.param(name, marks=[] if name in ("qwen3_moe", "glm4_moe") else [pytest.mark.nightly])
    for name in FAMILIES
]


@pytest.mark.parametrize("model_type", LANES)
def test_experts_are_read_as_by_transformers_and_written_as_they_were(
    model_type: str, tmp_path: Path
) -> None:
    base = build(model_type, tmp_path / "base")
    if model_type == "glm4_moe":  # a draft head, which is not read, is copied
        change(base, **{"model.layers.46.eh_proj.weight": torch.ones(6, dtype=torch.float64)})
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


def test_a_base_that_is_gone_leaves_the_names_of_the_model(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path)
    model = read(base)
    (base / "model.safetensors").unlink()
    tensors = weights_of(model)
    assert in_stored_form(model, tensors).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("without", "more", "fact"),
    [
        (NAME, {}, "combined"),  # half of an expert is left
        (NAME.replace("2.up", "3.down"), {}, "shape"),
        ("", {"model.layers.1.mlp.extra.weight": torch.zeros(1)}, "mlp.extra.weight"),
    ],
)
def test_what_does_not_fit_is_named(
    without: str, more: dict[str, torch.Tensor], fact: str, tmp_path: Path
) -> None:
    base = build("qwen3_moe", tmp_path)
    change(base, without=without, **more)
    with pytest.raises(ModelError, match=fact):
        read(base)

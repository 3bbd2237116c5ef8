"""Layers of other families than Llama's, cut over ranks by Transformers' own plan: the numbers of
one rank, and files of the same tensors. What the plan does not know is refused with the reason.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import default_config
from tensor_cuts import ADAPTER, STEPS, TOLERANCE, build, on_ranks
from test_data_parallel import (
    BITES,
    CUT_SHARDS,
    FULL,
    LORA,
    TENSOR,
    assert_those_of_one_process,
    nightly_but,
    run_alone,
    tensors_in,
)
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import vision_models
from errors import holds, refuses
from ranks import run_ranks
from recipes import make_run, merge
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.decoder import find_decoder
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.model_types import read_model_types
from tunesmith.parallel.cuts import EXPERTS_STYLE, find_blocks
from tunesmith.parallel.mesh import check_mesh
from tunesmith.parallel.mesh_shape import MeshShape

pytestmark = pytest.mark.slow

TABLE = read_model_types()
# Those with most kinds of layers; `make families` takes every type in full and with an adapter.
KINDS: dict[str, Adapter | None] = {
    "gemma4_text": ADAPTER,  # keys that are values, heads of two widths; experts beside the MLP
    "llama4_text": None,  # experts with code of their own; chunks
}
REFUSED = {
    "dbrx": [],  # a type without a plan
    "flint": ["layers.0.self_attn.sinks [4]"],
    "glm4": ["colwise_gather_output", "layers.0.mlp.gate_up_proj"],
    "youtu": ["layers.0.self_attn.q_a_proj.weight [16 x 64]"],
}


@pytest.mark.parametrize("model_type", nightly_but(KINDS, "gemma4_text"))
def test_two_ranks_have_the_losses_and_gradients_of_one(model_type: str) -> None:
    assert TABLE[model_type].tensor is not None
    assert STEPS == 5
    assert max(run_ranks(2, on_ranks, TABLE[model_type], KINDS[model_type])) <= TOLERANCE


@pytest.mark.nightly
def test_a_mixture_counts_as_cut_only_if_its_small_model_has_experts() -> None:
    mixtures, without = [], []
    for entry in TABLE.values():
        # A type of a newer release than this one has no configuration here.
        if entry.tensor is None or entry.model_type not in CONFIG_MAPPING:
            continue
        # It is cut as its text model, which has a row of its own.
        if entry.text and not entry.entire:
            continue
        plan = default_config(entry.model_type).get_text_config().base_model_tp_plan or {}
        if EXPERTS_STYLE not in plan.values():
            continue
        mixtures.append(entry.model_type)
        names = [name for name, _ in find_decoder(build(entry, None).model).named_modules()]
        if not any(name.endswith("experts") for name in names):
            without.append(entry.model_type)
    assert {"mixtral", "gemma4_text"} <= set(mixtures)
    assert without == []


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_the_plan_does_not_know_is_refused_with_the_reason(model_type: str) -> None:
    assert TABLE[model_type].tensor is None
    with refuses(ModelError, names=REFUSED[model_type], fix=["parallel.shard"]):
        find_blocks(build(TABLE[model_type], None).model)


def test_code_of_a_repository_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TABLE["llama"], None).model
    find_blocks(model)
    monkeypatch.setattr(type(model.model), "__module__", "transformers_modules.modeling_llama")
    with refuses(ModelError, where="parallel.tensor", names=["llama", "Transformers"]):
        find_blocks(model)


def test_a_norm_of_each_head_is_refused() -> None:
    """Cohere's: its weight is of all heads, which ranks share, and its plan does not say so."""
    from transformers import CohereConfig

    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    }  # fmt: skip
    with_norms = AutoModelForCausalLM.from_config(CohereConfig(**sizes, use_qk_norm=True))
    with pytest.raises(ModelError) as refused:
        find_blocks(with_norms)
    assert holds(refused.value.why, "layers.0.self_attn.q_norm.weight [4 x 16]")
    find_blocks(AutoModelForCausalLM.from_config(CohereConfig(**sizes, use_qk_norm=False)))


def write_model(model_type: str, folder: Path, tokenizer: Path, **sizes: Any) -> Path:
    """A random model of the type with the tokenizer of another; norms and biases are drawn too."""
    torch.manual_seed(3)
    settings = {**vision_models.TEXT, "num_hidden_layers": 2, **sizes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


OF_TWO = {"full, tensor": (FULL, TENSOR), "lora, tensor": (LORA, TENSOR)}
OF_FOUR = {"full, shards of a tensor group": (FULL, CUT_SHARDS)}


def assert_saved_alike(
    cases: dict[str, Any], model: Path, folder: Path, tolerance: tuple[float, float]
) -> None:
    """The numbers of one process, and final/ with tensors of the same names and shapes."""
    assert_those_of_one_process(cases, model, folder, tolerance)
    for name, (what, _) in cases.items():
        saved = tensors_in(folder / f"{name}, ranks" / "final")
        assert len(saved) > 10
        assert saved == run_alone(model, json.dumps(what))[1]


@pytest.fixture(scope="module")
def gemma3(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.build("gemma3", tmp_path_factory.mktemp("gemma3") / "model", tiny)


@pytest.mark.nightly
@pytest.mark.parametrize("cases", [OF_TWO, OF_FOUR], ids=["2", "4"])
def test_a_vision_language_model_trains_and_is_saved_as_by_one_process(cases, gemma3, tmp_path):
    assert_saved_alike(cases, gemma3, tmp_path, (1e-6, 1e-4))


# Rows of the parts are whole blocks of 64 weights.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
LATENT = {
    "num_key_value_heads": 8, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Sinks, biases, and one expert a rank.
SINKS = {
    "num_key_value_heads": 4, "num_experts_per_tok": 2, "num_local_experts": 4,
    "sliding_window": 16,
}  # fmt: skip
ON_NF4 = {"lora on nf4, tensor": ({"model": {"quantize": "nf4"}}, TENSOR)}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a bias behind a sum": ("starcoder2", WIDE, ON_NF4),
    "layers that stay whole": ("minicpm3", WIDE | LATENT, ON_NF4 | {"full": (FULL, TENSOR)}),
    "whole experts in codes": ("qwen3_moe", WIDE | MIXTURE, ON_NF4),
    "four ranks": ("gpt_oss", SINKS, {"full": (merge(FULL, BITES), {"tensor": 4})}),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", RUNS)
def test_runs_of_other_layers_are_those_of_one_process(name, tiny, tmp_path):
    """Latent attention has more products one after another: its norm moves by 1.1e-6 in fp32."""
    pytest.importorskip("bitsandbytes")
    model_type, sizes, cases = RUNS[name]
    model = write_model(model_type, tmp_path / "model", tiny, **sizes)
    assert_saved_alike(cases, model, tmp_path, (5e-6, 1e-4))


def test_a_mesh_that_cuts_an_unknown_layer_is_refused_with_one_that_works(tiny, tmp_path):
    model = write_model("flint", tmp_path / "model", tiny)
    config = AutoConfig.from_pretrained(model)
    spec = model_spec(config.to_dict(), where="config.json")
    run = make_run(model, tmp_path)
    with pytest.raises(RecipeError) as refused:
        check_mesh(run, spec, MeshShape(replicate=1, shard=2, tensor=2), per_node=4)
    assert holds(refused.value.what, "flint", "2 ranks")
    assert "parallel.shard=4" in refused.value.fix
    check_mesh(run, spec, MeshShape(replicate=1, shard=4, tensor=1), per_node=4)

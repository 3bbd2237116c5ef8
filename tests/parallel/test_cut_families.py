"""Layers of other families than Llama's, cut over ranks: the numbers of one rank, or a refusal."""

from __future__ import annotations

import json

import pytest
from tensor_cuts import ADAPTER, STEPS, TOLERANCE, build, on_ranks
from test_data_parallel import (
    FULL,
    LORA,
    TENSOR,
    assert_those_of_one_process,
    nightly_but,
    run_alone,
    tensors_in,
)
from transformers import AutoConfig, AutoModelForCausalLM

import vision_models
from errors import holds, refuses
from ranks import run_ranks
from recipes import make_run
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.known.model_types import read_model_types
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.parallel.cuts import find_blocks
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
    "glm4": ["colwise_gather_output", "layers.0.mlp.gate_up_proj"],
    "youtu": ["layers.0.self_attn.q_a_proj.weight [16 x 64]"],
}


@pytest.mark.parametrize("model_type", nightly_but(KINDS, "gemma4_text"))
def test_two_ranks_have_the_losses_and_gradients_of_one(model_type: str) -> None:
    assert TABLE[model_type].tensor is not None
    assert STEPS == 5
    assert max(run_ranks(2, on_ranks, TABLE[model_type], KINDS[model_type])) <= TOLERANCE


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


OF_TWO = {"full, tensor": (FULL, TENSOR), "lora, tensor": (LORA, TENSOR)}


@pytest.mark.nightly
def test_a_vision_language_model_trains_and_is_saved_as_by_one_process(tiny, tmp_path):
    model = vision_models.build("gemma3", tmp_path / "model", tiny)
    assert_those_of_one_process(OF_TWO, model, tmp_path)
    for name, (what, _) in OF_TWO.items():
        saved = tensors_in(tmp_path / f"{name}, ranks" / "final")
        assert len(saved) > 10
        assert saved == run_alone(model, json.dumps(what))[1]


def test_a_mesh_that_cuts_an_unknown_layer_is_refused_with_one_that_works(tiny, tmp_path):
    config = AutoConfig.for_model("flint", **vision_models.TEXT)
    spec = model_spec(config.to_dict(), where="config.json")
    run = make_run(tiny, tmp_path)
    with pytest.raises(RecipeError) as refused:
        check_mesh(run, spec, MeshShape(replicate=1, shard=2, tensor=2), per_node=4)
    assert holds(refused.value.what, "flint", "2 ranks")
    assert "parallel.shard=4" in refused.value.fix
    check_mesh(run, spec, MeshShape(replicate=1, shard=4, tensor=1), per_node=4)

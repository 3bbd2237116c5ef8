"""Layers of other families than Llama's, cut over ranks by Transformers' own plan: the numbers of
one rank, and files of the same tensors. What the plan does not know is refused with the reason.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import default_config
from tensor_cuts import ADAPTER, STEPS, TOLERANCE, backward, build, on_ranks
from test_data_parallel import (
    FULL,
    LORA,
    TENSOR,
    assert_those_of_one_process,
    run_alone,
    tensors_in,
)
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import vision_models
from devices import graphs_compiled
from errors import holds, refuses
from ranks import run_ranks
from recipes import make_run
from tunesmith.config.schema import Adapter
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.decoder import find_decoder
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.model_types import read_model_types
from tunesmith.parallel.cuts import EXPERTS_STYLE, find_blocks
from tunesmith.parallel.mesh import Mesh, check_mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.parallel.tensor import apply_tensor_parallel, reduce_gradients
from tunesmith.runtime.compilation import compile_layers

pytestmark = pytest.mark.slow

TABLE = read_model_types()
# Those with most kinds of layers, in full and with an adapter. `make families` takes every type in
# both ways.
KINDS: dict[str, Adapter | None] = {
    "gemma4_text": ADAPTER,  # keys that are values, heads of two widths; experts beside the MLP
    "llama4_text": None,  # experts with code of their own; chunks
}
REFUSED = {
    "dbrx": "Transformers has no tensor-parallel plan for this model type",
    "flint": "the plan of Transformers does not cover layers.0.self_attn.sinks [4]",
    "qwen3_5_text": "plan has the unsupported action colwise_gather_output for layers.0.linear_attn.",
    "glm4": "plan has the unsupported action colwise_gather_output for layers.0.mlp.gate_up_proj",
    "olmo_hybrid": "the plan of Transformers does not cover",
    "phi3": "plan has the unsupported action rowwise_split_input for layers.0.self_attn.o_proj",
    "gemma3n_text": "does not cover layers.0.altup.",
    "youtu": "the plan of Transformers does not cover layers.0.self_attn.q_a_proj.weight [16 x 64]",
}


@pytest.mark.parametrize(("model_type", "adapter"), KINDS.items(), ids=KINDS)
def test_two_ranks_have_the_losses_and_gradients_of_one(
    model_type: str, adapter: Adapter | None
) -> None:
    assert TABLE[model_type].tensor is not None
    assert STEPS == 5
    assert max(run_ranks(2, on_ranks, TABLE[model_type], adapter)) <= TOLERANCE


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
    with pytest.raises(ModelError) as refused:
        find_blocks(build(TABLE[model_type], None).model)
    assert REFUSED[model_type] in refused.value.why
    assert "parallel.shard" in refused.value.fix


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


RUNS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "full, tensor": (FULL, TENSOR),
    "lora, tensor": (LORA, TENSOR),
    "full, shards of a tensor group": (FULL, {"shard": 2, "tensor": 2}),
}


@pytest.fixture(scope="module")
def gemma3(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.build("gemma3", tmp_path_factory.mktemp("gemma3") / "model", tiny)


@pytest.mark.parametrize("world", [2, 4])
def test_a_vision_language_model_trains_and_is_saved_as_by_one_process(
    world: int, gemma3: Path, tmp_path: Path
) -> None:
    for name in assert_those_of_one_process(world, RUNS, gemma3, tmp_path):
        saved = tensors_in(tmp_path / f"{name}, ranks" / "final")
        assert len(saved) > 10
        assert saved == run_alone(gemma3, json.dumps(RUNS[name][0]))[1]


# Rows of the parts are whole blocks of 64 weights.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
LATENT = {
    "num_key_value_heads": 8, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("starcoder2", {}), ("minicpm3", LATENT), ("qwen3_moe", MIXTURE)],
    ids=["a bias behind a sum", "layers that stay whole", "whole experts in codes"],
)
def test_runs_on_nf4_are_those_of_one_process(
    model_type: str, sizes: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    model = write_model(model_type, tmp_path / "model", tiny, **{**WIDE, **sizes})
    runs = {"lora on nf4, tensor": ({"model": {"quantize": "nf4"}}, TENSOR)}
    # The others are trained in full by `test_tensor.py`, with biases, and `test_experts_on_ranks.py`.
    if model_type == "minicpm3":
        runs["full, tensor"] = (FULL, TENSOR)
    # Latent attention has more products one after another: its norm moves by 1.1e-6 in fp32.
    tolerance = (5e-6, 1e-4)
    for name in assert_those_of_one_process(2, runs, model, tmp_path, tolerance):
        saved = tensors_in(tmp_path / f"{name}, ranks" / "final")
        assert saved == run_alone(model, json.dumps(runs[name][0]))[1]


def compiled(model_type: str) -> tuple[float, list[int]]:
    """The largest difference of the losses, and the graphs that each batch adds."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with join_ranks():
        mesh = Mesh.of(MeshShape(tensor=2), "cpu")
        torch.compiler.reset()
        alone = backward(build(TABLE[model_type], ADAPTER))
        root = build(TABLE[model_type], ADAPTER)
        partial = apply_tensor_parallel(root, mesh)
        compile_layers(root.layers[:1], varied=True, backend="aot_eager")  # the other is like it
        graphs = []
        differences = []
        for _ in range(2):
            before = graphs_compiled()
            differences.append(abs(backward(root) - alone))
            graphs.append(graphs_compiled() - before)
        grads = {name: p.grad for name, p in root.trained_parameters() if p.grad is not None}
        reduce_gradients(grads, partial, mesh)
        return max(differences), graphs


def test_compiled_layers_of_transformers_are_equal() -> None:
    # GPT-OSS: biases behind sums, sinks, windows, and experts
    for difference, (first, second) in run_ranks(2, compiled, "gpt_oss"):
        assert difference < 1e-5
        assert first > 0
        assert second == 0


def test_a_mesh_that_cuts_an_unknown_layer_is_refused_with_one_that_works(
    tiny: Path, tmp_path: Path
) -> None:
    model = write_model("flint", tmp_path / "model", tiny)
    config = AutoConfig.from_pretrained(model)
    spec = model_spec(config.to_dict(), where="config.json")
    run = make_run(model, tmp_path)
    with pytest.raises(RecipeError) as refused:
        check_mesh(run, spec, MeshShape(replicate=1, shard=2, tensor=2), per_node=4)
    assert holds(refused.value.what, "flint", "2 ranks")
    assert "parallel.shard=4" in refused.value.fix
    check_mesh(run, spec, MeshShape(replicate=1, shard=4, tensor=1), per_node=4)

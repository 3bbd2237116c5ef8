"""Packed rows of each model family, as a run computes them, beside each document alone in
Transformers under its eager attention, in fp32. Windows and chunks are shorter than documents.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from errors import refuses
from pairwise import name_of, pairwise
from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch, collate
from tunesmith.config.schema import Adapter, MethodConfig
from tunesmith.errors import ModelError
from tunesmith.methods import make_method
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.known.decoder import Head, find_decoder, find_head, find_layers, head_fits
from tunesmith.model.layers.fused import (
    FusedAttention,
    FusedJoinedMLP,
    FusedMLP,
    FusedNorm,
    FusedZeroCenteredNorm,
    fuse_modules,
)
from tunesmith.model.layers.recurrent import run_by_document
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.tokens.text.example import Example
from tunesmith.train_model import TrainModel

from . import families

KINDS = (FusedAttention, (FusedMLP, FusedJoinedMLP), (FusedNorm, FusedZeroCenteredNorm))
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


class Other(NamedTuple):
    """A family without a row in our table."""

    settings: dict[str, Any]
    recurrent: tuple[str, ...] = ()
    fused: tuple[int, int, int] | None = None  # attentions, MLPs and norms


OTHERS: dict[str, Other] = {
    "qwen3_moe": Other({**EXPERTS, "mlp_only_layers": [1]}, fused=(2, 1, 9)),
    "gpt_oss": Other({**WINDOWS, **LOCAL_EXPERTS}, fused=(0, 0, 5)),
    "qwen3_5_text": Other(DELTA, ("Qwen3_5GatedDeltaNet",), (1, 2, 7)),
    "olmo3": Other(WINDOWS, fused=(2, 2, 9)),
    # Positions beyond 8 make the queries grow.
    "ministral3": Other({"sliding_window": 16, "rope_parameters": YARN}, fused=(2, 2, 5)),
    "stablelm": Other({}),
    "llama4_text": Other(
        {
            **LOCAL_EXPERTS, "num_hidden_layers": 4, "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48, "attention_chunk_size": 8, "floor_scale": 4,
        }
    ),
    "mimo_v2_flash": Other(
        {**WINDOWS, **ROUTED_EXPERTS, "v_head_dim": 12, "mlp_layer_types": ["dense", "sparse"]}
    ),
    "gemma4_text": Other(
        {
            **WINDOWS, "num_hidden_layers": 4, "layer_types": WINDOWS["layer_types"] * 2,
            "num_kv_shared_layers": 2, "global_head_dim": 32, "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
        }
    ),
    "deepseek_v3": Other(
        {
            **ROUTED_EXPERTS, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "head_dim": 8,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
        }
    ),
    "lfm2": Other({"layer_types": ["conv", "full_attention"]}, ("Lfm2ShortConv",)),
    "nemotron_h": Other(
        {
            **ROUTED_EXPERTS, "num_hidden_layers": 4, "moe_shared_expert_intermediate_size": 24,
            "layers_block_type": ["mamba", "mlp", "moe", "attention"], "ssm_state_size": 8,
            "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8,
        },
        ("NemotronHMamba2Mixer",),
    ),
}  # fmt: skip
LAYOUTS = ("packed", "recomputed", "shared prompt")
TRAINED = ("full", "lora")


def can_exist(combination: dict[str, Any]) -> bool:
    """Only attention computes a prompt once for two documents."""
    is_recurrent = combination["family"] in OTHERS and OTHERS[combination["family"]].recurrent != ()
    return not (is_recurrent and combination.get("layout") == "shared prompt")


COVERED_FAMILIES = pairwise(
    {"family": (*families.VARIANTS, *OTHERS), "layout": LAYOUTS, "trained": TRAINED},
    tier_1={"family": families.TIER_1, "layout": LAYOUTS, "trained": TRAINED},
    allows=can_exist,
)


def random_model(family: str) -> PreTrainedModel:
    if family not in OTHERS:
        return families.random_model(families.tiny_config(family))
    config = AutoConfig.for_model(family, **{**BASE, **OTHERS[family].settings})
    return families.random_model(config)


def build(family: str, *, adapted: bool) -> PreTrainedModel:
    model = random_model(family)
    model.set_attn_implementation("eager")
    if adapted:
        lora.attach_lora(model, Adapter(rank=3, alpha=9), seed=1)
        for _, layer in lora.low_ranks(model):
            nn.init.normal_(layer.lora_B, std=0.2)
    return model.train()


def whole_and_laid_out(layout: str) -> tuple[Batch, Batch]:
    """A row of pairs of documents that begin alike, and the row that is computed."""
    random = np.random.default_rng(3)
    pairs = []
    for lengths in ((13, 22), (12, 13)):
        ids = random.integers(3, 64, sum(lengths)).astype(np.int32)
        trained = np.ones(len(ids), dtype=bool)
        for start in (0, lengths[0]):
            ids[start : start + 7] = ids[:7]
            trained[start : start + 7] = False
        pairs.append(Example(ids, trained, lengths))
    length = sum(len(pair.ids) for pair in pairs)
    whole = collate([pairs], length=length, pad_id=0)
    if layout != "shared prompt":
        return whole, whole
    pairs = [pair._replace(shared=pair.count_shared()) for pair in pairs]
    assert [pair.shared for pair in pairs] == [6, 6]
    return whole, collate([pairs], length=length - 12, pad_id=0)


def with_gradients(
    model: PreTrainedModel, logits: Tensor, cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    (logits * cotangent).sum().backward()
    named = [(name, p.grad) for name, p in model.named_parameters()]
    return logits.detach(), {name: grad for name, grad in named if grad is not None}


@pytest.mark.parametrize("case", families.marked(COVERED_FAMILIES), ids=name_of)
def test_packed_documents_are_computed_as_if_alone(case: dict[str, str]) -> None:
    family = case["family"]
    other = OTHERS.get(family, Other({}))
    model = build(family, adapted=case["trained"] == "lora")
    fused = copy.deepcopy(model)
    whole, batch = whole_and_laid_out(case["layout"])
    lengths = whole.cu_seqlens.diff().tolist()
    firsts = torch.arange(sum(lengths)) if batch.whole is None else batch.whole.firsts
    places = torch.arange(sum(lengths)) if batch.whole is None else batch.whole.places
    width = model.config.vocab_size
    cotangent = torch.randn(len(firsts), width, generator=torch.Generator().manual_seed(2))
    of_whole = torch.zeros(sum(lengths), width)
    of_whole[firsts] = cotangent
    alone = [
        model(input_ids=ids, use_cache=False).logits[0]
        for ids in whole.input_ids.split(lengths, dim=1)
    ]
    expected, wanted = with_gradients(model, torch.cat(alone), of_whole)

    count = fuse_modules(fused, project=lora.project)
    for number, kinds in enumerate(KINDS):
        found = sum(isinstance(module, kinds) for module in fused.modules())
        if other.fused is not None:
            assert (found, count) == (other.fused[number], sum(other.fused))
        assert family in OTHERS or found >= model.config.num_hidden_layers
    method = make_method(MethodConfig())
    root = TrainModel(fused, method, attention_backend="batched_matmul", recurrent=other.recurrent)
    root.train()
    if case["layout"] == "recomputed":
        recompute_layers(root.layers, len(root.layers))
    with root.step_context(batch):
        logits = root.logit_rule.logits(root.head(root.hidden(batch)))
        logits, gradients = with_gradients(fused, logits, cotangent)

    scale = expected.abs().max()
    assert (logits[places] - expected).abs().max() <= 1e-5 * scale
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = gradients[name] - gradient
        assert error.abs().max() <= 1e-4 * largest, name
        if family in families.VARIANTS:
            assert error.norm() <= 3e-5 * gradient.norm() > 0, name
    if case["layout"] == "packed":
        merged = replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]], edges=())
        with torch.no_grad(), root.step_context(merged):
            leaked = root.logit_rule.logits(root.head(root.hidden(merged)))
        assert (leaked - expected).abs().max() > 1e-3 * scale, "the row as one document"


def test_recurrent_layers_refuse_what_would_leak() -> None:
    model = random_model("lfm2").train()
    run_by_document(model, ["Lfm2ShortConv"])
    ids = torch.arange(3, 40)[None]
    with refuses(ModelError, names=["ByDocumentLfm2ShortConv"], fix=["TrainModel.step_context"]):
        model(input_ids=ids)
    expected = random_model("lfm2")(input_ids=ids).logits
    assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    with refuses(ModelError, names=["Lfm2ForCausalLM", "MambaMixer"]):
        run_by_document(model, ["Lfm2ShortConv", "MambaMixer"])


def test_every_row_of_the_table_is_a_variant() -> None:
    assert {*ARCHITECTURES} == {variant.split("-")[0] for variant in families.VARIANTS}


MAMBA2 = {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}
# type -> its settings, the name of its layers, what it does to its logits
HEADS = {
    "gpt2": ({}, "transformer.h", Head()),
    "mamba2": (MAMBA2, "backbone.layers", Head()),
    "phi": ({}, "model.layers", Head()),  # its head has a bias
    "minicpm3": (
        {"dim_model_base": 16, "num_key_value_heads": 8}, "model.layers", Head(scale=0.25)
    ),
    "nanochat": ({"final_logit_softcapping": 15.0}, "model.layers", Head(softcap=15.0)),
}  # fmt: skip


@pytest.mark.parametrize("model_type", HEADS)
def test_decoder_layers_and_head_give_the_models_own_logits(model_type: str) -> None:
    settings, layers, head = HEADS[model_type]
    config = AutoConfig.for_model(
        model_type, **{**families.SMALL, "num_hidden_layers": 1, **settings}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    output_layer = model.get_output_embeddings()
    if output_layer.bias is not None:  # zero in a new model
        nn.init.normal_(output_layer.bias)
    assert find_decoder(model) is not model
    assert find_layers(model) == layers
    assert find_head(model) == head
    assert head_fits(model, head)
    assert not head_fits(model, Head(head.softcap, head.scale * 1.01))
    assert not head_fits(model, Head(20.0, head.scale))

"""Packed documents in many families: equal to each document alone under Transformers' own eager
attention.

Windows and chunks are shorter than the documents, so that each rule shows. Modules are fused as in
a run. The models are in fp32; what they differ by is the order of sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from errors import refuses
from tunesmith.adapter import lora
from tunesmith.config.schema import MethodConfig
from tunesmith.data.batches.batch import Batch, collate
from tunesmith.data.text.example import Example
from tunesmith.errors import ModelError
from tunesmith.methods import make_method
from tunesmith.methods.base import TrainModel
from tunesmith.model.fused import fuse_modules
from tunesmith.model.recurrent import run_by_document
from tunesmith.runtime.recompute import recompute_layers

pytestmark = pytest.mark.slow

LENGTHS = (13, 22, 12)  # the first and the last are run together
BASE: dict[str, Any] = {
    "vocab_size": 64,
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
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
# type -> its settings, and the classes of its recurrent layers
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nemotron": ({}, ()),
    "stablelm": ({}, ()),
    "llama4_text": (
        {
            **LOCAL_EXPERTS,
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 8,
            "floor_scale": 4,
        },
        (),
    ),
    "gpt_oss": ({**WINDOWS, **LOCAL_EXPERTS}, ()),
    "flint": ({**WINDOWS, **EXPERTS, "shared_expert_intermediate_size": 24}, ()),
    "granite_swa": (WINDOWS, ()),
    "granitemoe_swa": ({**WINDOWS, **LOCAL_EXPERTS}, ()),
    "mimo_v2_flash": (
        {
            **WINDOWS,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_layer_types": ["dense", "sparse"],
        },
        (),
    ),
    "gemma4_text": (
        {
            **WINDOWS,
            "num_hidden_layers": 4,
            "layer_types": WINDOWS["layer_types"] * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
        (),
    ),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "head_dim": 8,
        },
        (),
    ),
    "qwen3_5_text": (DELTA, ("Qwen3_5GatedDeltaNet",)),
    "qwen3_next": (
        {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24},
        ("Qwen3NextGatedDeltaNet",),
    ),
    # Its layer returns its last state beside the tokens.
    "minimax": (
        {**LOCAL_EXPERTS, "block_size": 8, "layer_types": DELTA["layer_types"]},
        ("MiniMaxLightningAttention",),
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, ("Lfm2ShortConv",)),
    "nemotron_h": (
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "mlp", "moe", "attention"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
        ("NemotronHMamba2Mixer",),
    ),
    "granitemoehybrid": (
        {**LOCAL_EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "logits_scaling": 4.0},
        ("GraniteMoeHybridMambaLayer",),
    ),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}, ("FalconH1Mixer",)),
    "bamba": ({**MAMBA, "attn_layer_indices": [1]}, ("BambaMixer",)),
    "mamba2": (
        {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
        ("Mamba2Mixer",),
    ),
    "jamba": (
        {
            **LOCAL_EXPERTS,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
        },
        ("JambaMambaMixer",),
    ),
    "recurrent_gemma": (
        {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
        ("RecurrentGemmaRecurrentBlock",),
    ),
    "zamba2": (
        {
            "layers_block_type": ["mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "num_key_value_heads": 4,
        },
        ("Zamba2MambaMixer",),
    ),
    "olmo3": (WINDOWS, ()),
    "glm4": ({}, ()),
    "ministral3": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.5,
            }
        },
        (),
    ),
}


def build(model_type: str) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**BASE, **FAMILIES[model_type][0]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero or one would hide a fault
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def packed_batch() -> Batch:
    n = sum(LENGTHS)
    ids = torch.randint(3, 64, (1, n), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return Batch(ids, positions, ids, edges, max(LENGTHS), n, n, len(LENGTHS))


def logits_and_gradients(
    model: PreTrainedModel, logits: Tensor, cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    (logits * cotangent).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


def alone(
    model: PreTrainedModel, batch: Batch, cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each document by itself, as Transformers computes it."""
    parts = []
    for ids in batch.input_ids.split(LENGTHS, dim=1):
        parts.append(model(input_ids=ids, use_cache=False).logits[0])
    return logits_and_gradients(model, torch.cat(parts), cotangent)


def packed(root: TrainModel, batch: Batch, cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with root.step_context(batch):
        logits = root.logit_rule.logits(root.head(root.hidden(batch)))
        return logits_and_gradients(root.model, logits, cotangent)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_documents_are_computed_as_if_alone(model_type: str) -> None:
    model = build(model_type)
    batch = packed_batch()
    cotangent = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(2))
    expected_logits, expected = alone(model, batch, cotangent)
    recurrent = FAMILIES[model_type][1]
    fuse_modules(model, project=lora.project)
    root = TrainModel(
        model, make_method(MethodConfig()), attention_backend="products", recurrent=recurrent
    ).train()
    if model_type in ("nemotron", "jamba"):
        recompute_layers(root.layers, len(root.layers))
    logits, gradients = packed(root, batch, cotangent)
    scale = expected_logits.abs().max()
    assert (logits - expected_logits).abs().max() <= 1e-5 * scale
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * largest, name

    # The same row as one document: what the rule is for.
    merged = Batch(**{**vars(batch), "cu_seqlens": batch.cu_seqlens[[0, -1]]})
    with torch.no_grad(), root.step_context(merged):
        leaked = root.logit_rule.logits(root.head(root.hidden(merged)))
    assert (leaked - expected_logits).abs().max() > 1e-3 * scale


def test_recurrent_layers_refuse_what_would_leak() -> None:
    """A training forward outside of `step_context`, and a class that the model has not."""
    model = build("lfm2")
    run_by_document(model, ["Lfm2ShortConv"])
    ids = packed_batch().input_ids
    with refuses(ModelError, names=["ByDocumentLfm2ShortConv"], fix=["TrainModel.step_context"]):
        model(input_ids=ids)
    expected = build("lfm2").eval()(input_ids=ids).logits
    assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    with refuses(ModelError, names=["Lfm2ForCausalLM", "MambaMixer"]):
        run_by_document(model, ["Lfm2ShortConv", "MambaMixer"])


OF_ATTENTION = [name for name, (_, recurrent) in FAMILIES.items() if not recurrent]


@pytest.mark.parametrize("model_type", OF_ATTENTION)
def test_a_prompt_that_a_row_holds_once_is_computed_as_in_both_documents(model_type: str) -> None:
    """The second document of a pair without its own copy of the prompt, beside it with one."""
    model = build(model_type)
    fuse_modules(model, project=lora.project)
    root = TrainModel(model, make_method(MethodConfig()), attention_backend="products").train()
    random = np.random.default_rng(3)
    pairs = []
    for lengths in ((13, 22), (12, 9)):
        ids = random.integers(3, 64, sum(lengths)).astype(np.int32)
        trained = np.ones(len(ids), dtype=bool)
        for start in (0, lengths[0]):
            ids[start : start + 7] = ids[:7]
            trained[start : start + 7] = False
        pairs.append(Example(ids, trained, lengths))
    length = sum(len(pair.ids) for pair in pairs)
    whole = collate([pairs], length=length, pad_id=0)
    pairs = [pair._replace(shared=pair.count_shared()) for pair in pairs]
    assert [pair.shared for pair in pairs] == [6, 6]
    once = collate([pairs], length=length - 12, pad_id=0)
    assert once.whole is not None
    cotangent = torch.randn(length - 12, 64, generator=torch.Generator().manual_seed(2))
    of_whole = torch.zeros(length, 64)
    of_whole[once.whole.firsts] = cotangent
    expected_logits, expected = packed(root, whole, of_whole)
    logits, gradients = packed(root, once, cotangent)
    scale = expected_logits.abs().max()
    assert (logits[once.whole.places] - expected_logits).abs().max() <= 1e-5 * scale
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * largest, name

"""Decoder, layers and head of models of many shapes, against the models' own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from errors import refuses
from tunesmith.errors import ModelError
from tunesmith.model.decoder import Head, find_decoder, find_head, find_layers, head_fits

from .families import SMALL

MAMBA2 = {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}
# type -> its settings, the name of its layers, what it does to its logits
MODELS = {
    "llama4_text": ({"head_dim": 16}, "model.layers", Head()),
    "gpt2": ({}, "transformer.h", Head()),
    "mamba2": (MAMBA2, "backbone.layers", Head()),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, "model.decoder.layers", Head()),
    "phi": ({}, "model.layers", Head()),  # its head has a bias
    "cohere": ({"logit_scale": 0.25}, "model.layers", Head(scale=0.25)),
    "granite": ({"logits_scaling": 4.0}, "model.layers", Head(scale=0.25)),
    "hyperclovax": ({"logits_scaling": 4.0}, "model.layers", Head(scale=4.0)),
    "minicpm3": (
        {"dim_model_base": 16, "num_key_value_heads": 8},
        "model.layers",
        Head(scale=0.25),
    ),
    "nanochat": ({"final_logit_softcapping": 15.0}, "model.layers", Head(softcap=15.0)),
    "gemma2": ({"head_dim": 16}, "model.layers", Head(softcap=30.0)),
}


@pytest.mark.parametrize("model_type", MODELS)
def test_decoder_layers_and_head_give_the_models_own_logits(model_type: str) -> None:
    settings, layers, head = MODELS[model_type]
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    output_layer = model.get_output_embeddings()
    if output_layer.bias is not None:  # zero in a new model
        torch.nn.init.normal_(output_layer.bias)
    assert find_decoder(model) is not model
    assert find_layers(model) == layers
    assert find_head(model) == head
    assert head_fits(model, head)
    assert not head_fits(model, Head(head.softcap, head.scale * 1.01))
    assert not head_fits(model, Head(20.0, head.scale))


def test_a_model_without_a_decoder_is_refused() -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    model = AutoModelForCausalLM.from_config(config)
    with refuses(ModelError, names=["LlamaModel"]):
        find_decoder(model.model)

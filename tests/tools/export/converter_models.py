"""Tiny random models of the families that llama.cpp's converter writes, as they are on the Hub.

The keys of config.json and the names of tensors are those of the published checkpoints, where they
differ from what Transformers saves: a converter reads both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from export.tiny_gguf import chat_tokenizer
from model import families
from shipped_bases import fp8_config, rounded

SMALL: dict[str, Any] = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
# The converter cuts Gemma's embedding to the tokenizer: it has no padding there.
TOKENS = len(chat_tokenizer())
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.5,
                        "mrope_section": [2, 1, 1], "mrope_interleaved": True},
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
               "out_hidden_size": 64, "num_position_embeddings": 16}  # fmt: skip
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25,
                       "rope_theta": 1e6},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 128}  # fmt: skip

# Settings of the text model; and what of config.json is otherwise on the Hub, None for a key that
# is not there. A text model inside another has the rest of the other's config under "whole".
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "config": {**EXPERTS, "norm_topk_prob": True},
        "hub": {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": None,
                "decoder_sparse_step": 1},
    },
    "qwen3_5": {
        "config": DELTA,
        "whole": {"vision_config": QWEN_VISION},
        "hub": {"mtp_num_hidden_layers": 1},
        "aside": {"mtp.fc.weight": (64, 128), "mtp.norm.weight": (64,)},
    },
    "gpt_oss": {
        "config": {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2,
                   "rope_parameters": {**YARN, "rope_theta": 150000.0, "truncate": False}},
        "hub": {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 150000.0,
                "rope_parameters": None, "experts_per_token": 2, "swiglu_limit": 7.0},
    },
    "gemma4": {  # the 26B form, with all experts chosen: rounding flips near ties of its router
        "config": {**WINDOWS, "vocab_size": TOKENS, "global_head_dim": 32, "num_global_key_value_heads": 2,
                   "attention_k_eq_v": True, "rope_parameters": GEMMA_ROPE,
                   "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0,
                   "tie_word_embeddings": True, "enable_moe_block": True, "num_experts": 4,
                   "top_k_experts": 4, "moe_intermediate_size": 32},
        "whole": {"vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
                  "audio_config": None},
        "hub": {"per_layer_config": None, "global_head_dim": 32, "num_global_key_value_heads": 2,
                "attention_k_eq_v": True},
    },
    "mistral3": {
        "config": {"model_type": "ministral3", "rope_parameters": {
            **YARN, "type": "yarn", "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1, "max_position_embeddings": 512}},
        "whole": {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}},
        "fp8": True,
    },
    "nemotron_h": {
        "config": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "ssm_state_size": 16,
                   "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16,
                   "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "moe_shared_expert_intermediate_size": 48},
        "hub": {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4,
                "layers_block_type": None},
    },
    "glm4": {
        "config": {"attention_bias": True, "rope_parameters": {
            "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        "hub": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_parameters": None},
    },
    "llama4": {
        "config": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96,
                   "interleave_moe_layer_step": 1, "attention_chunk_size": 512},
        "whole": {"vision_config": {**VISION, "vision_output_dim": 32, "projector_input_dim": 32,
                                    "projector_output_dim": 32}},
    },
}  # fmt: skip


def write_base(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Write a model of MODELS, with a tokenizer that llama.cpp knows; return it as it was written.

    changes: of the text model's settings.
    """
    spec = MODELS[name]
    settings = {**SMALL, **spec["config"], **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    whole = spec.get("whole")
    if whole is None:
        model = families.random_model(AutoConfig.for_model(name, **settings))
    else:
        config = AutoConfig.for_model(name, text_config=settings, **whole)
        config.tie_word_embeddings = settings["tie_word_embeddings"]
        torch.manual_seed(7)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
    for buffer_name, buffer in model.named_buffers():
        # It changes which experts are chosen, and it is zero in a new model.
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.data += torch.randn_like(buffer) * 0.1
    scales = {}
    for layer, weight in model.named_parameters() if spec.get("fp8") else ():
        if "language_model" in layer and "_proj.weight" in layer:
            codes, scale = rounded(weight.data, None)
            weight.data = codes.float() * scale
            scales[layer.removeprefix("model.language_model.")] = scale
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = config["text_config"] if whole else config
    for key, value in spec.get("hub", {}).items():
        text[key] = value
        if value is None and key != "rope_scaling":
            del text[key]
    tensors = load_file(folder / "model.safetensors")
    tensors |= {aside: torch.randn(shape) for aside, shape in spec.get("aside", {}).items()}
    for name_in_text, scale in scales.items():
        (layer,) = [key for key in tensors if key.endswith(f".{name_in_text}")]
        stem = layer.removesuffix("weight")
        tensors[layer] = (tensors[layer] / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{stem}weight_scale_inv": scale, f"{stem}activation_scale": torch.tensor(0.5)}
    if scales:
        kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        config["quantization_config"] = fp8_config(None, modules_to_not_convert=kept)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file.write_text(json.dumps(config))
    return model

"""Tiny random vision-language models, one of each family whose text part is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
               "out_hidden_size": 64, "num_position_embeddings": 16}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# model_type -> settings of the text part, of the vision part, and of the whole. The outer config of
# mistral3 ties by default, the inner one does not.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_5": (DELTA, QWEN_VISION, {"tie_word_embeddings": False}),
    "qwen3_5_moe": ({**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24}, QWEN_VISION, {"tie_word_embeddings": False}),
    "gemma3": ({**WINDOWS, "query_pre_attn_scalar": 16}, VISION, {"mm_tokens_per_image": 1}),
    "gemma4": (
        {**WINDOWS, "num_kv_shared_layers": 0, "global_head_dim": 32, "vocab_size_per_layer_input": 272,
         "hidden_size_per_layer_input": 8},
        {**VISION, "num_key_value_heads": 2, "head_dim": 16}, {"audio_config": None},
    ),
    "mistral3": ({"model_type": "ministral3"}, {**VISION, "model_type": "pixtral", "head_dim": 16}, {}),
    "llama4": (
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
         "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
        {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {"tie_word_embeddings": False},
    ),
}  # fmt: skip


def build(
    model_type: str,
    folder: Path,
    tokenizer: Path,
    *,
    whole: dict[str, Any] | None = None,
    **text: Any,
) -> Path:
    """Save a random model; norms and biases are drawn too, so that a lost one shows."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    own_text, vision, own_whole = FAMILIES[model_type]
    config = AutoConfig.for_model(
        model_type,
        text_config={**TEXT, **own_text, **text},
        vision_config=vision,
        **{**own_whole, **(whole or {})},
    )
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    model.save_pretrained(folder, max_shard_size="200KB")
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder

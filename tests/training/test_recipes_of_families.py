"""Shipped recipes, each on a tiny random model of its family in the form that the Hub has: trained,
resumed, merged, and asked.

Templates are read where TRL and Axolotl are installed; a case without its template is skipped.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from runs import write_rows
from shipped_bases import change_config, change_tensors, write_fp8_stacks
from stored_templates import template_names, tokenizer_of
from tunesmith.cli.main import main
from tunesmith.model.weights.safetensors_files import ADAPTER_WEIGHTS

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DELTA = {
    "model_type": "qwen3_5_text", "full_attention_interval": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5,
                        "mrope_section": [2, 1, 1], "mrope_interleaved": True},
}  # fmt: skip
MAMBA = {
    "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4,
    "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
LATENT = {
    "model_type": "mistral4", "num_key_value_heads": 4, "moe_intermediate_size": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
# Recipe -> its chat template, the model type, and the config: of the text model, and the rest.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3.8-27b-lora": (
        "trl/qwen3_8", "qwen3_5", DELTA,
        {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                           "out_hidden_size": 64, "num_position_embeddings": 16}},
    ),
    "nemotron-3.5-30b-lora": ("trl/nemotron_3_5_lightning", "nemotron_h", MAMBA, {}),
    # The template of an earlier Mistral: its own is in neither package.
    "mistral-small-4-qlora": (
        "axolotl/mistral_v7_tekken", "mistral3", LATENT,
        {"vision_config": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32,
                           "num_attention_heads": 2, "image_size": 32, "patch_size": 8}, "tie_word_embeddings": False},
    ),
}  # fmt: skip
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WEATHER = {"name": "weather", "description": "Say the weather.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": WEATHER}]


def write_base(recipe: str, folder: Path) -> Path:
    """A tiny random model of a recipe's family, with the draft heads that some have on the Hub."""
    template, model_type, text, rest = MODELS[recipe]
    tokenizer = tokenizer_of(template)
    text = TEXT | text | {"vocab_size": len(tokenizer) + 8}
    if text.get("kv_lora_rank"):
        del text["head_dim"]
    is_entire = "model_type" in text
    values = {**rest, "text_config": text} if is_entire else text
    config = AutoConfig.for_model(model_type, **values)
    factory = AutoModelForMultimodalLM if is_entire else AutoModelForCausalLM
    torch.manual_seed(3)
    factory.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model_type in ("qwen3_5", "nemotron_h"):
        change_tensors(folder, {"mtp.layers.0.norm.weight": torch.ones(64, dtype=torch.bfloat16)})
    if model_type == "nemotron_h":
        change_config(folder, layers_block_type=text["layers_block_type"])
    if model_type == "mistral3":
        return write_fp8_stacks(folder, folder.with_name("fp8"), None)  # as it ships
    return folder


def write_chats(file: Path, *, calls: bool) -> Path:
    def chat(*messages: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "Say it."}, *messages]}

    answers = [{"role": "assistant", "content": f"It is {i}."} for i in range(12)]
    rows = [chat(answer) for answer in answers]
    result = {"role": "tool", "name": "weather", "content": "sun"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    if calls:
        rows.append(chat(called, result, answers[0]) | {"tools": TOOLS})
    return write_rows(file, rows)


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_trains_resumes_and_merges(recipe: str, tmp_path: Path) -> None:
    if MODELS[recipe][0] not in template_names():
        pytest.skip(f"{MODELS[recipe][0]} is not installed")
    base = write_base(recipe, tmp_path / "base")
    rows = write_chats(tmp_path / "rows.jsonl", calls="mistral" not in recipe)
    out, merged = tmp_path / "run", tmp_path / "merged"
    source = f"{{source: {rows}, format: messages}}"
    words = [
        "train", recipe, f"model.name={base}", f"data.train={source}", "data.validation=null",
        "data.seq_len=4096", "train.global_batch=2 examples", "train.duration=4 steps",
        "checkpoint.every=2 steps", "log.samples=0", f"output_dir={out}",
    ]  # fmt: skip
    assert main(words) == 0
    adapter = out / "final" / ADAPTER_WEIGHTS
    unbroken = adapter.read_bytes()
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-4")
    assert main(words) == 0
    assert adapter.read_bytes() == unbroken
    # It compares the merged model with base and adapter.
    assert main(["merge", str(out), "--output", str(merged)]) == 0
    is_entire = "model_type" in MODELS[recipe][2]
    factory = AutoModelForMultimodalLM if is_entire else AutoModelForCausalLM
    _, info = factory.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values()), info
    answers = tmp_path / "answers.jsonl"
    question = ["generate", str(out), "--input", str(rows), "--output", str(answers)]
    assert main([*question, "--max-new-tokens", "2"]) == 0
    assert len(answers.read_text().splitlines()) == len(rows.read_text().splitlines())

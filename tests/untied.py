"""A small Llama whose head has a weight of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write_untied(model: Path, folder: Path) -> Path:
    """Write a random model of the shape in `model`, with its tokenizer and a head of its own."""
    shutil.copytree(model, folder)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(model, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
